"""Plan the order of an epoch and assign each global batch to ranks. Pure: no files, no devices.

`plan_epoch` turns lengths and modalities into global batches and knows neither the number of
workers nor the micro-batch, so a run resumes on another cluster with the same batches (resuming at
step k is starting at `global_batch(k)`). `assign` then shares one global batch among the ranks.

An empty slot is -1. It fills what is left of a batch and weighs nothing in the loss.

Shape legend: n samples, G slots of a global batch, W ranks x accumulation (the micro-batches of a
global batch), b slots of a micro-batch (G = W x b).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lapilli.data.batches.llava_sampler import EMPTY, llava_steps
from lapilli.data.errors import DataError

__all__ = ["EpochPlan", "Remainder", "Sampler", "Steps", "assign", "plan_epoch"]

Sampler = Literal["grouped", "random", "llava"]
Remainder = Literal["auto", "pad", "short", "drop", "llava"]

Ids = NDArray[np.int64]
IntArray = NDArray[np.integer[Any]]

# In a large window ranks wait less for each other; a window of the whole dataset gives nearly the
# same batches every epoch. On 665K made-up lengths like LLaVA-1.5's, 8 ranks x 16, padded tokens
# and the time a rank waits were 7.8 % and 42 % with a window of 1, 0.7 % and 5.5 % with 16, 0.17 %
# and 1.4 % with 64, 0.05 % and 0.4 % with 256. 64 leaves little to gain and mixes 80 windows.
DEFAULT_WINDOW = 64

# A small dataset is sorted in smaller windows: its batches must differ from epoch to epoch.
LEAST_WINDOWS = 8


class Steps(Protocol):
    """The global batches of an epoch, by number: `EpochPlan`, or one made window by window."""

    @property
    def num_steps(self) -> int:
        """Number of global batches."""
        ...

    @property
    def whole(self) -> int | None:
        """Slots of a global batch that is not cut short."""
        ...

    @property
    def fixed_micro_batch(self) -> int | None:
        """Slots of the micro-batches that a batch consists of, where they are fixed."""
        ...

    def global_batch(self, step: int) -> Ids:
        """Slots of one global batch."""
        ...


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The global batches of one epoch.

    Attributes:
        order: int64 [slots], sample indices in the order they are trained on, -1 = empty slot.
        offsets: int64 [steps + 1]; global batch k is `order[offsets[k]:offsets[k + 1]]`.
        fixed_micro_batch: None where `assign` may arrange a batch as it likes; otherwise the slots
            lie micro-batch by micro-batch of this size and stay so (sampler `llava`, in which the
            micro-batches are part of the order).
        whole: slots of a global batch that is not cut short; None where none is.
    """

    order: Ids
    offsets: Ids
    fixed_micro_batch: int | None = None
    whole: int | None = None

    def __post_init__(self) -> None:
        # A plan is shared by everything that resumes from it; a stray write would be silent.
        self.order.flags.writeable = False
        self.offsets.flags.writeable = False

    @property
    def num_steps(self) -> int:
        """Number of global batches, which is the number of optimizer steps."""
        return self.offsets.size - 1

    def global_batch(self, step: int) -> Ids:
        """Slots of one global batch, int64 [G], a read-only view.

        Raises:
            IndexError: `step` is not in [0, num_steps).
        """
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of an epoch plan with {self.num_steps} steps")
        return self.order[self.offsets[step] : self.offsets[step + 1]]


def plan_epoch(
    lengths: ArrayLike,
    modalities: ArrayLike,
    *,
    global_batch_size: int,
    seed: int,
    epoch: int,
    sampler: Sampler,
    window: int | None = None,
    llava_micro_batch: int | None = None,
    llava_processes: int = 1,
    group_by_modality_length: bool = True,
    remainder: Remainder = "pad",
) -> EpochPlan:
    """Order every sample exactly once into global batches of `global_batch_size` slots.

    The same arguments give the same plan on any platform and any version of numpy.

    Args:
        lengths: int [n], > 0; all tokens of a sample, image tokens included. For `llava` its word
            counts (`llava_length`).
        modalities: bool or int [n]; `grouped` keeps different values apart; for `llava` true (or
            non-zero) means that the sample has an image; `random` does not look at it.
        global_batch_size: slots of a global batch, over all ranks and accumulation steps.
        seed: >= 0; with `epoch` it decides every draw. For `llava` it is LLaVA's `--seed`.
        epoch: >= 0.
        sampler: `grouped`, one modality a global batch (the tails included), similar lengths in it,
            the batch with the longest sample first so that what does not fit in memory fails at
            once; `random`, a permutation; `llava`, LLaVA's own trainer's order (`llava_steps`).
        window: `grouped` sorts by length within this many randomly drawn global batches. None
            takes `DEFAULT_WINDOW`, or less where an epoch would have under `LEAST_WINDOWS`.
        llava_micro_batch: samples of one rank's micro-batch; `llava` needs it, no other takes it.
        llava_processes: see `llava_steps`.
        group_by_modality_length: likewise.
        remainder: what becomes of a batch that the samples (with `grouped`, of a modality) do not
            fill: `pad` keeps its size with empty slots, `short` makes it smaller (fewer
            micro-steps), `drop` leaves its samples out of this epoch. `llava`, for sampler `llava`,
            is what its trainer does (`llava_steps`): the one case in which a sample may come twice
            in an epoch. `auto` is `llava` for sampler `llava`, else `pad`.

    Raises:
        DataError: an argument that allows no plan.
    """
    counts, kinds = _checked_samples(np.asarray(lengths), np.asarray(modalities), global_batch_size)
    check_at_least("seed", seed, 0)
    check_at_least("epoch", epoch, 0)
    _check_sampler(sampler, window, llava_micro_batch, llava_processes, global_batch_size)
    remainder = checked_remainder(remainder, sampler)
    if llava_micro_batch is not None:
        accumulation = global_batch_size // (llava_micro_batch * llava_processes)
        batches = llava_steps(
            np.where(kinds != 0, counts, -counts), micro_batch_size=llava_micro_batch,
            processes=llava_processes, accumulation=accumulation, seed=seed, epoch=epoch,
            group_by_modality_length=group_by_modality_length, pads=remainder == "pad",
        )  # fmt: skip
    else:
        batches = _own_batches(counts, kinds, sampler, global_batch_size, window, seed, epoch)
    if remainder != "llava":
        _assert_each_sample_once(batches, kinds.size)
    return cut_off(batches, remainder, llava_micro_batch)


def _own_batches(
    lengths: Ids,
    kinds: IntArray,
    sampler: Sampler,
    global_batch_size: int,
    window: int | None,
    seed: int,
    epoch: int,
) -> Ids:
    """Global batches [steps, G] of sampler `grouped` or `random`."""
    bits = random_bits(seed, epoch)
    if sampler == "random":
        return filled_batches(permutation(kinds.size, bits), global_batch_size)
    drawn: list[Ids] = []
    for kind in np.unique(kinds):
        ids = np.flatnonzero(kinds == kind)
        drawn.append(ids[permutation(ids.size, bits)])
    return grouped_batches(drawn, lengths, global_batch_size, window, bits)


def checked_remainder(remainder: Remainder, sampler: Sampler) -> Remainder:
    """Resolve `auto`; reject names that the sampler does not take."""
    if remainder not in get_args(Remainder):
        raise DataError(
            f"remainder is {remainder!r}; choose one of {', '.join(get_args(Remainder))}"
        )
    if remainder == "auto":
        return "llava" if sampler == "llava" else "pad"
    if remainder not in (("llava", "pad") if sampler == "llava" else ("pad", "short", "drop")):
        raise DataError(
            f"remainder is {remainder!r}; sampler 'llava' takes 'llava' or 'pad', the others "
            "'pad', 'short' or 'drop'"
        )
    return remainder


def cut_off(batches: Ids, remainder: Remainder, llava_micro_batch: int | None) -> EpochPlan:
    """A plan of batches [steps, G] with its incomplete ones treated as `remainder` says."""
    if remainder == "drop":
        batches = batches[(batches != EMPTY).all(axis=1)]
        if not len(batches):
            raise DataError(
                "remainder 'drop' leaves nothing: no modality fills a global batch of "
                f"{batches.shape[1]}; use 'pad' or 'short', or a smaller global_batch_size"
            )
    sizes = np.full(len(batches), batches.shape[1], dtype=np.int64)
    order = batches.reshape(-1)
    if remainder == "short":
        sizes = (batches != EMPTY).sum(axis=1)
        order = order[order != EMPTY]
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return EpochPlan(order, offsets, llava_micro_batch, batches.shape[1])


def assign(
    plan: Steps, step: int, lengths: ArrayLike, *, world_size: int, micro_batch_size: int
) -> list[list[Ids]]:
    """Share one global batch among the ranks.

    The samples are sorted by length and cut into micro-batches, so that a micro-batch needs little
    padding. Micro-step k of all ranks holds neighbours of that order, because the ranks wait for
    each other at its end; the ranks take turns in having the longer ones (a snake: 0 1 2 2 1 0),
    which balances their totals. Empty slots are spread evenly, so that a micro-batch is empty only
    where there are fewer samples than micro-batches. A batch cut short (`remainder`) gets as many
    micro-steps as its samples need. A plan whose micro-batches are fixed keeps them: chunk c of the
    batch is micro-step c // world_size of rank c % world_size.

    Args:
        plan: of the epoch.
        step: global batch to share, in [0, plan.num_steps).
        lengths: int [n], the lengths the plan was made of.
        world_size: ranks.
        micro_batch_size: slots of one rank's micro-batch.

    Returns:
        For each rank, for each micro-step: int64 [micro_batch_size] sample indices, -1 = empty
        slot.

    Raises:
        DataError: the global batch cannot be cut that way; names numbers that fit.
    """
    batch = plan.global_batch(step)
    _check_geometry(plan.whole or batch.size, world_size, micro_batch_size, plan.fixed_micro_batch)
    if plan.fixed_micro_batch is None:
        chunks = balanced_chunks(batch, np.asarray(lengths), world_size, micro_batch_size)
    else:
        chunks = batch.reshape(-1, world_size, micro_batch_size)
    return [list(chunks[:, rank]) for rank in range(world_size)]


# ---- grouped and random ------------------------------------------------------------------------


def random_bits(seed: int, epoch: int, *part: int) -> np.random.PCG64:
    """The stream of an epoch, or of a part of it; a part's numbers are at least 1."""
    return np.random.PCG64(np.random.SeedSequence([seed, epoch, *part]))


def permutation(count: int, bits: np.random.PCG64) -> Ids:
    """A permutation of [0, count): the ranks of random 64-bit keys, ties in order.

    Not `Generator.permutation`: numpy promises the raw stream of PCG64 and the hashing of
    SeedSequence across versions, but not what Generator's methods make of them, and a run must
    resume after an upgrade.
    """
    return np.argsort(bits.random_raw(count), kind="stable").astype(np.int64, copy=False)


def filled_batches(ids: Ids, global_batch_size: int) -> Ids:
    """Cut [m] ids into [ceil(m / G), G], the rest of the last batch empty."""
    batches = np.full((-(-ids.size // global_batch_size), global_batch_size), EMPTY, dtype=np.int64)
    batches.reshape(-1)[: ids.size] = ids
    return batches


def grouped_batches(
    drawn: list[Ids],
    lengths: IntArray,
    global_batch_size: int,
    window: int | None,
    bits: np.random.PCG64,
) -> Ids:
    """Global batches [steps, G] of one modality and similar lengths, the longest sample first.

    `drawn` holds the ids of each modality, in the order in which they were drawn.
    """
    if window is None:
        count = sum(ids.size for ids in drawn)
        window = max(1, min(DEFAULT_WINDOW, count // (global_batch_size * LEAST_WINDOWS)))
    of_each_kind = [
        filled_batches(
            ids[_sorted_in_windows(lengths[ids], global_batch_size, window)], global_batch_size
        )
        for ids in drawn
    ]
    batches = np.concatenate(of_each_kind)
    batches = batches[permutation(len(batches), bits)]
    return _longest_first(batches, lengths)


def _sorted_in_windows(lengths: IntArray, global_batch_size: int, window: int) -> Ids:
    """Positions [m] that sort [m] lengths, longest first, within windows of global batches.

    The windows are made equally large (65 batches are 33 + 32 and not 64 + 1, where the last would
    hardly be sorted). Descending, so that an incomplete batch holds short samples.
    """
    batches = -(-lengths.size // global_batch_size)
    windows = -(-batches // window)
    window_of = np.arange(lengths.size) // global_batch_size * windows // batches
    # One stable sort by (window, -length) packed into one key, twice as fast as lexsort.
    longest = int(lengths.max())
    return np.argsort(window_of * (longest + 1) + (longest - lengths), kind="stable")


def _longest_first(batches: Ids, lengths: IntArray) -> Ids:
    """Swap the batch [G] of the longest sample to the front; the one with most tokens on a tie.

    A micro-batch is padded to its longest sample, so that sample decides how much memory is needed.
    """
    tokens = np.where(batches == EMPTY, 0, lengths[batches])
    first = int(np.lexsort((tokens.sum(axis=1), tokens.max(axis=1)))[-1])
    batches[[0, first]] = batches[[first, 0]]
    return batches


def _assert_each_sample_once(batches: Ids, count: int) -> None:
    times = np.bincount(batches[batches != EMPTY], minlength=count)
    assert times.size == count, "a plan names a sample that does not exist"
    assert (times == 1).all(), "a plan must hold every sample exactly once"


# ---- sharing a batch ---------------------------------------------------------------------------


def balanced_chunks(batch: Ids, lengths: IntArray, world_size: int, micro_batch_size: int) -> Ids:
    """Micro-batches [micro-steps, ranks, b] of similar lengths, see `assign`."""
    samples = batch[batch != EMPTY]
    samples = samples[np.argsort(-lengths[samples].astype(np.int64), kind="stable")]
    micro_steps = -(-batch.size // (world_size * micro_batch_size))
    chunks = np.full((micro_steps * world_size, micro_batch_size), EMPTY, dtype=np.int64)
    for chunk, ids in zip(chunks, np.array_split(samples, len(chunks)), strict=True):
        chunk[: ids.size] = ids
    by_step = chunks.reshape(-1, world_size, micro_batch_size)
    by_step[1::2] = by_step[1::2, ::-1].copy()
    return by_step


def _check_geometry(
    global_batch_size: int, world_size: int, micro_batch_size: int, fixed_micro_batch: int | None
) -> None:
    check_at_least("world_size", world_size, 1)
    check_at_least("micro_batch_size", micro_batch_size, 1)
    if fixed_micro_batch not in (None, micro_batch_size):
        raise DataError(
            f"micro_batch_size is {micro_batch_size}, but the plan's sampler 'llava' has "
            f"micro-batches of {fixed_micro_batch} in its order; use {fixed_micro_batch} or make "
            "the plan anew"
        )
    share = world_size * micro_batch_size
    if global_batch_size % share == 0:
        return
    below, above = global_batch_size // share * share, -(-global_batch_size // share) * share
    sizes = " or ".join(str(size) for size in (below, above) if size)
    per_rank, left = divmod(global_batch_size, world_size)
    fitting = [size for size in range(1, per_rank + 1) if left == 0 and per_rank % size == 0]
    remedy = f", or a micro_batch_size of {', '.join(map(str, fitting))}" if fitting else ""
    raise DataError(
        f"global_batch_size {global_batch_size} is not a multiple of world_size {world_size} x "
        f"micro_batch_size {micro_batch_size} = {share}; use a global_batch_size of {sizes}{remedy}"
    )


# ---- checks ------------------------------------------------------------------------------------


def check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise DataError(f"{name} is {value}; it must be at least {least}")


def _checked_samples(
    lengths: NDArray[Any], modalities: NDArray[Any], global_batch_size: int
) -> tuple[Ids, IntArray]:
    """Both columns [n] as int64 and integers, or what is wrong with them."""
    check_samples(lengths, modalities, global_batch_size)
    return lengths.astype(np.int64), modalities.astype(np.int64)


def check_samples(lengths: NDArray[Any], modalities: NDArray[Any], global_batch_size: int) -> None:
    """What is wrong with the columns [n] of which a plan is to be made; they are not copied."""
    check_at_least("global_batch_size", global_batch_size, 1)
    for name, column, kinds in (("lengths", lengths, "iu"), ("modalities", modalities, "biu")):
        if column.ndim != 1 or column.dtype.kind not in kinds:
            raise DataError(
                f"{name} is a {column.dtype} array of shape {column.shape}; "
                "pass one integer per sample"
            )
    if lengths.size != modalities.size:
        raise DataError(
            f"{lengths.size} lengths and {modalities.size} modalities; "
            "pass one of each per sample, both from the same dataset"
        )
    if lengths.size < global_batch_size:
        raise DataError(
            f"{lengths.size} samples are fewer than one global batch of {global_batch_size}; "
            f"use a global_batch_size of at most {lengths.size} or more data"
        )
    if lengths.min() < 1:
        first = int(np.flatnonzero(lengths < 1)[0])
        raise DataError(
            f"sample {first} has length {lengths[first]}; every length must be at least 1: "
            "quarantine the empty sample"
        )


def _check_sampler(
    sampler: Sampler,
    window: int | None,
    llava_micro_batch: int | None,
    llava_processes: int,
    global_batch_size: int,
) -> None:
    """Afterwards `llava_micro_batch` is set under sampler `llava` and under no other."""
    if sampler not in get_args(Sampler):
        raise DataError(f"sampler is {sampler!r}; choose one of {', '.join(get_args(Sampler))}")
    check_at_least("window", 1 if window is None else window, 1)
    if sampler == "llava" and llava_micro_batch is None:
        raise DataError(
            "sampler 'llava' has no llava_micro_batch; its order depends on it: pass the samples "
            "of one rank's micro-batch"
        )
    if llava_micro_batch is None:
        return
    if sampler != "llava":
        raise DataError(
            f"llava_micro_batch is {llava_micro_batch} under sampler {sampler!r}; only 'llava' has "
            "micro-batches in its order: leave it out or choose sampler 'llava'"
        )
    check_at_least("llava_micro_batch", llava_micro_batch, 1)
    check_at_least("llava_processes", llava_processes, 1)
    micro_step = llava_micro_batch * llava_processes
    if global_batch_size % micro_step:
        above = -(-global_batch_size // micro_step) * micro_step
        raise DataError(
            f"global_batch_size {global_batch_size} is not a multiple of llava_micro_batch "
            f"{llava_micro_batch} x llava_processes {llava_processes}; use a global_batch_size of "
            f"{above} or a micro-batch that divides it"
        )
