"""Reproduce LLaVA-1.5's order of samples exactly, including its random generators.

`llava_order` is one call of its sampler. `llava_steps` is what its trainer makes of it: which
samples each optimizer step takes, over several epochs, processes and accumulation steps
(`llava_trainer.py` of c121f04 under transformers 4.37.2, accelerate 0.21 and torch's DataLoader).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lapilli.data.errors import DataError

__all__ = ["EMPTY", "llava_order", "llava_steps"]

EMPTY = -1
"""An empty slot."""

Ids = NDArray[np.int64]

# torch.randperm on the CPU draws 32 bits a swap below this size and something else from there on
# (seen by experiment on torch 2.13: 2**32 // 20 - 1 agrees, 2**32 // 20 does not).
TORCH_RANDPERM_LIMIT = 2**32 // 20

# What a `torch.Generator()` is seeded with when nobody seeds it (c10's default_rng_seed_val).
UNSEEDED = 67280421310721


def llava_order(
    lengths: ArrayLike,
    *,
    batch_size: int,
    world_size: int,
    global_seed: int,
    generator_seed: int | None = None,
) -> Ids:
    """The order LLaVA-1.5's sampler gives, index for index (`llava_trainer.py`, c121f043).

    Its algorithm: permute; cut into stretches of world_size x batch_size; sort each by length and
    deal it into world_size chunks of equal count and similar sum. With two modalities each is
    treated so by itself; all stretches but each modality's last are shuffled; the two last ones,
    sorted by index, end the epoch as one mixed stretch.

    Args:
        lengths: int [n], not 0; a sample without an image has its length negated.
        batch_size: samples of one micro-batch, b.
        world_size: micro-batches of an optimizer step, W (ranks x accumulation).
        global_seed: torch.manual_seed's value before the call.
        generator_seed: manual_seed of the generator passed to the call; None = none was passed.

    Returns:
        int64 [n], a permutation.

    Raises:
        DataError: a length of 0, or more samples than the generators are known to agree for.
    """
    signed = np.asarray(lengths, dtype=np.int64)
    if signed.size and not signed.all():
        first = int(np.flatnonzero(signed == 0)[0])
        raise DataError(
            f"sample {first} has length 0 and LLaVA's sampler needs one that is not; "
            "quarantine the empty conversation or use sampler 'grouped'"
        )
    global_stream = _torch_stream(global_seed)
    own = global_stream if generator_seed is None else _torch_stream(generator_seed)
    return _by_modality(signed, batch_size, world_size, global_stream, own)


def llava_steps(
    signed: Ids,
    *,
    micro_batch_size: int,
    processes: int,
    accumulation: int,
    seed: int,
    epoch: int,
    group_by_modality_length: bool = True,
    pads: bool = False,
) -> Ids:
    """The samples of an epoch's optimizer steps, as LLaVA's trainer takes them.

    One process keeps the epoch's last micro-batch short; several fill theirs with the epoch's first
    samples (Accelerate's `BatchSamplerShard`). Micro-batches are then accumulated as one stream:
    what does not fill a step waits for the next epoch's first, and is dropped after the last, so
    that each epoch has `micro-steps // accumulation` steps.

    Args:
        signed: int64 [n], words of a sample, negated where it has no image.
        micro_batch_size: Samples of one process's micro-batch, b.
        processes: LLaVA's processes, R.
        accumulation: Its gradient accumulation steps, A.
        seed: Its `--seed`.
        epoch: Which block of steps, from 0.
        group_by_modality_length: Its flag; without it the order is torch's RandomSampler's.
        pads: End an epoch in LLaVA's order without repeating or dropping a sample: the last step's
            empty slots stay empty.

    Returns:
        int64 [steps, A x R x b], -1 for an empty slot.

    Raises:
        DataError: More samples than the generators are known to agree for.
    """
    orders = _epochs(
        signed, micro_batch_size, processes, accumulation, seed, group_by_modality_length
    )
    width = processes * micro_batch_size
    if pads:
        order = next(islice(orders, epoch, None))
        return _micro_steps(order, accumulation * width, fill=False)
    per_epoch = -(-signed.size // width)
    steps = per_epoch // accumulation
    first = epoch * steps * accumulation
    last = first + steps * accumulation  # of the micro-steps of all epochs in a row
    needed = islice(orders, first // per_epoch, -(-last // per_epoch))
    rows = np.concatenate([_micro_steps(order, width, fill=processes > 1) for order in needed])
    begin = first % per_epoch
    return rows[begin : begin + last - first].reshape(steps, accumulation * width)


def _micro_steps(order: Ids, width: int, *, fill: bool) -> Ids:
    """An epoch's order as micro-steps [k, R x b]; `fill` repeats its first samples at the end."""
    count = -(-order.size // width)
    rows = np.full(count * width, EMPTY, dtype=np.int64)
    rows[: order.size] = order
    if fill:
        rows[order.size :] = np.resize(order[:width], rows.size - order.size)
    return rows.reshape(count, width)


def _epochs(
    signed: Ids, micro_batch_size: int, processes: int, accumulation: int, seed: int, grouped: bool
) -> Iterator[Ids]:
    """The sampler's order in each epoch; the generators go on from one to the next.

    A DataLoader draws one int64 from the global generator before it asks its sampler. From two
    processes on Accelerate gives the sampler a generator that nobody has seeded.
    """
    stream = _torch_stream(seed)
    own = stream if processes == 1 else _torch_stream(UNSEEDED)
    while True:
        _torch_int64(stream)
        if grouped:
            yield _by_modality(signed, micro_batch_size, processes * accumulation, stream, own)
        elif processes == 1:
            yield _torch_randperm(signed.size, _torch_stream(_torch_int64(stream)))
        else:
            yield _torch_randperm(signed.size, own)
            # RandomSampler draws a second permutation, of which it takes nothing
            own.randint(0, 2**32, size=signed.size - 1, dtype=np.uint32)


def _by_modality(
    signed: Ids,
    batch_size: int,
    world_size: int,
    global_stream: np.random.RandomState,
    own: np.random.RandomState,
) -> Ids:
    positive = signed > 0
    if positive.all() or not positive.any():
        return _llava_grouped(signed, batch_size, world_size, own)
    stretch = batch_size * world_size
    leading: list[Ids] = []
    last: list[Ids] = []
    for ids in (np.flatnonzero(positive), np.flatnonzero(~positive)):
        # The passed generator is not used here, only for the shuffle below; kept as it is there.
        grouped = ids[_llava_grouped(np.abs(signed[ids]), batch_size, world_size, global_stream)]
        # The last stretch is set aside even when it is full.
        cut = (ids.size - 1) // stretch * stretch
        leading.append(grouped[:cut].reshape(-1, stretch))
        last.append(grouped[cut:])
    stretches = np.concatenate(leading)
    shuffled = stretches[_torch_randperm(len(stretches), own)]
    return np.concatenate([shuffled.reshape(-1), np.sort(np.concatenate(last))])


def _torch_stream(seed: int) -> np.random.RandomState:
    """The 32-bit stream of torch's CPU generator: MT19937 seeded with the low 32 bits.

    RandomState is frozen for good by numpy's policy, so this stays equal.
    """
    return np.random.RandomState(seed & 0xFFFFFFFF)


def _torch_int64(stream: np.random.RandomState) -> int:
    """`torch.empty((), dtype=torch.int64).random_()`: two draws, high bits first, no sign."""
    high, low = stream.randint(0, 2**32, size=2, dtype=np.uint32).tolist()
    return (high << 32 | low) & (2**63 - 1)


def _torch_randperm(count: int, stream: np.random.RandomState) -> Ids:
    """torch.randperm(count): Fisher-Yates from the front, one draw modulo what is left a swap."""
    if count >= TORCH_RANDPERM_LIMIT:
        raise DataError(
            f"{count} samples under sampler 'llava'; torch's permutation is known below "
            f"{TORCH_RANDPERM_LIMIT}: use sampler 'grouped'"
        )
    swaps = max(count - 1, 0)
    draws = stream.randint(0, 2**32, size=swaps, dtype=np.uint32).astype(np.int64)
    at = np.arange(swaps, dtype=np.int64)
    permutation = list(range(count))
    for here, there in enumerate((at + draws % (count - at)).tolist()):
        permutation[here], permutation[there] = permutation[there], permutation[here]
    return np.asarray(permutation, dtype=np.int64)


def _llava_grouped(
    lengths: Ids, batch_size: int, world_size: int, stream: np.random.RandomState
) -> Ids:
    """LLaVA's order [m] of samples [m] of one modality."""
    shuffled = _torch_randperm(lengths.size, stream)
    stretch = batch_size * world_size
    full = shuffled.size // stretch * stretch
    parts = [shuffled[:full].reshape(-1, stretch), shuffled[full:].reshape(1, -1)]
    return np.concatenate([_dealt(part, lengths, world_size).reshape(-1) for part in parts])


def _dealt(stretches: Ids, lengths: Ids, chunks: int) -> Ids:
    """Sort each row of [k, L] ids by length and deal it into equal chunks [k, L], laid in a row.

    A sample goes, longest first, to the chunk of the smallest sum so far that has room, the first
    on a tie. Rows that cannot be cut evenly are dealt round robin. All rows at once, since there
    are thousands of them and few columns.
    """
    longest_first = np.argsort(-lengths[stretches], axis=1, kind="stable")
    stretches = np.take_along_axis(stretches, longest_first, axis=1)
    count, width = stretches.shape
    if width % chunks:
        return np.concatenate([stretches[:, first::chunks] for first in range(chunks)], axis=1)
    room = width // chunks
    row = np.arange(count, dtype=np.int64)
    dealt = np.empty((count, chunks, room), dtype=np.int64)
    filled = np.zeros((count, chunks), dtype=np.int64)
    sums = np.zeros((count, chunks))
    for ids in stretches.T:
        chunk = sums.argmin(axis=1)
        dealt[row, chunk, filled[row, chunk]] = ids
        filled[row, chunk] += 1
        sums[row, chunk] += lengths[ids]
        sums[filled == room] = np.inf
    return dealt.reshape(count, width)
