"""Order an epoch in windows of whole blocks, using the memory of one window.

Blocks are runs of samples in the same shards. They are shuffled for each epoch and grouped into
windows of about equal size; inside a window samples are ordered by the samplers of `plan_epoch`.
The samples of each modality form one stream across all windows: those that do not fill a global
batch at the end of a window begin the next window's first batch. The first step of each window
therefore follows from counts alone, an epoch has as many steps as without windows, and every sample
occurs once. Pure: no files, no devices.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lapilli.data.batches.sampler import (
    EpochPlan,
    Remainder,
    Sampler,
    check_at_least,
    check_samples,
    checked_remainder,
    cut_off,
    filled_batches,
    grouped_batches,
    permutation,
    random_bits,
)
from lapilli.data.errors import DataError

__all__ = [
    "AUTO_ABOVE",
    "AUTO_WINDOW",
    "OrderWindow",
    "WindowedPlan",
    "plan_windows",
    "window_size",
]

Ids = NDArray[np.int64]
OrderWindow: TypeAlias = Literal["auto"] | int

AUTO_ABOVE = 10_000_000  # samples of an epoch; up to here its order is one
AUTO_WINDOW = 4_000_000
OWN = ("_kept", "_making")  # of one process
KEPT = 2  # windows: batches of two are asked for at the same time where one ends


def window_size(order_window: OrderWindow, samples: int) -> int:
    """Samples of a window; 0 where an epoch of so many samples has one order.

    Args:
        order_window: Samples, 0 for one order, or `auto`: 0 up to `AUTO_ABOVE`, else `AUTO_WINDOW`.
        samples: Of the epoch.

    Raises:
        DataError: A negative number.
    """
    if order_window == "auto":
        return AUTO_WINDOW if samples > AUTO_ABOVE else 0
    check_at_least("order_window", order_window, 0)
    return order_window if order_window < samples else 0


@dataclass(frozen=True, eq=False)
class _Layout:
    """Where the windows of an epoch lie.

    Attributes:
        blocks: int64 [blocks + 1]; block b has the samples from `blocks[b]` to `blocks[b + 1]`.
        members: The blocks of each window.
        starts: int64 [windows + 1, kinds], samples of each modality before each window.
        taken: int64 [windows + 1, kinds], those of them that are in batches of earlier windows; in
            its last row those of the epoch.
        steps: int64 [windows + 1], global batches before each window.
    """

    blocks: Ids
    members: list[Ids]
    starts: Ids
    taken: Ids
    steps: Ids


class WindowedPlan:
    """The global batches of one epoch; a window's are made when one of them is asked for.

    Attributes:
        whole: Slots of a global batch that is not cut short.
        fixed_micro_batch: None, as of an `EpochPlan` whose batches `assign` may arrange.
    """

    fixed_micro_batch: int | None = None

    def __init__(
        self,
        lengths: NDArray[np.integer[Any]],
        num_images: NDArray[np.integer[Any]],
        layout: _Layout,
        *,
        global_batch_size: int,
        seed: int,
        epoch: int,
        sampler: Sampler,
        remainder: Remainder,
    ) -> None:
        self.whole: int | None = global_batch_size
        self._size = global_batch_size
        self._lengths, self._num_images, self._layout = lengths, num_images, layout
        self._seed, self._epoch, self._sampler = seed, epoch, sampler
        self._remainder: Remainder = remainder
        self._kept: dict[int, EpochPlan] = {}
        self._making = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """What the plan is made of: another process makes the windows itself."""
        return {name: value for name, value in vars(self).items() if name not in OWN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._kept, self._making = {}, threading.Lock()

    @property
    def num_steps(self) -> int:
        """Number of global batches, which is the number of optimizer steps."""
        return int(self._layout.steps[-1])

    @property
    def num_windows(self) -> int:
        """Number of windows; one of few samples may have no batch."""
        return len(self._layout.members)

    @property
    def first_window(self) -> EpochPlan:
        """The first window that has batches: what the others are like."""
        return self.window(self._window_of(0))

    def global_batch(self, step: int) -> Ids:
        """Slots of one global batch, int64 [G], a read-only view.

        Raises:
            IndexError: `step` is not in [0, num_steps).
        """
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of an epoch plan with {self.num_steps} steps")
        number = self._window_of(step)
        return self.window(number).global_batch(step - int(self._layout.steps[number]))

    def _window_of(self, step: int) -> int:
        return int(np.searchsorted(self._layout.steps, step, side="right")) - 1

    def window(self, number: int) -> EpochPlan:
        """The global batches of window `number`, as a plan; the last two asked for are kept."""
        with self._making:
            found = self._kept.pop(number, None)
            while found is None and len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[number] = found = found or self._make(number)
            return found

    def _make(self, number: int) -> EpochPlan:
        layout = self._layout
        drawn = [
            self._stream(kind, int(first), int(end))
            for kind, (first, end) in enumerate(layout.taken[number : number + 2].T)
            if first < end
        ]
        if not drawn:
            return EpochPlan(np.zeros(0, np.int64), np.zeros(1, np.int64), None, self._size)
        if self._sampler == "random":
            batches = filled_batches(drawn[0], self._size)
        else:
            bits = random_bits(self._seed, self._epoch, number + 1)
            batches = grouped_batches(drawn, self._lengths, self._size, None, bits)
        return cut_off(batches, self._remainder, None)

    def _stream(self, kind: int, first: int, end: int) -> Ids:
        """Samples `first` to `end` of a modality's stream: this window's, and what is left over.

        What earlier windows leave is less than a global batch, and is mostly of one window.
        """
        starts = self._layout.starts[:, kind]
        parts: list[Ids] = []
        for window in range(
            int(np.searchsorted(starts, first, side="right")) - 1,
            int(np.searchsorted(starts, end, side="left")),
        ):
            begin = int(starts[window])
            if begin < starts[window + 1]:
                parts.append(self._drawn(window, kind)[max(0, first - begin) : end - begin])
        return np.concatenate(parts)

    def _drawn(self, window: int, kind: int) -> Ids:
        """A window's samples of a modality, in the order drawn for them."""
        members = self._layout.members[window]
        ends = self._layout.blocks[np.stack([members, members + 1], axis=1)].tolist()
        ids = np.concatenate([np.arange(first, end) for first, end in ends])
        if self._sampler == "grouped":
            ids = ids[(self._num_images[ids] > 0) == kind]
        return ids[
            permutation(ids.size, random_bits(self._seed, self._epoch, window + 1, kind + 1))
        ]


def plan_windows(
    lengths: NDArray[np.integer[Any]],
    num_images: NDArray[np.integer[Any]],
    blocks: NDArray[np.integer[Any]],
    *,
    order_window: int,
    global_batch_size: int,
    seed: int,
    epoch: int,
    sampler: Sampler,
    remainder: Remainder = "pad",
) -> WindowedPlan:
    """Order every sample exactly once into global batches, a window of blocks after the other.

    The same arguments give the same plan on any platform and any version of numpy, whatever step is
    asked for first. The columns are not copied as a whole.

    Args:
        lengths: int [n], as for `plan_epoch`.
        num_images: int [n]; `grouped` keeps samples with images apart from those without.
        blocks: int [blocks + 1], from 0 to n, ascending: where each run of samples begins that a
            window has as a whole (`sample_blocks`).
        order_window: Samples of a window, to a block more or less; windows are about equally large.
        global_batch_size: As for `plan_epoch`.
        seed: With `epoch` it decides every draw.
        epoch: From 0.
        sampler: `grouped`, whose first window has the longest sample of all, and each the batch
            with its own longest first; or `random`.
        remainder: Of the epoch's last window: what becomes of a batch that is not full.

    Raises:
        DataError: An argument that allows no plan; sampler `llava`, ordered as a whole.
    """
    if sampler == "llava":
        raise DataError(
            f"order_window: {order_window} with sampler llava, whose order is one of the whole "
            "epoch; set order_window 0, or another sampler"
        )
    check_samples(lengths, num_images, global_batch_size)
    check_at_least("order_window", order_window, 1)
    check_at_least("seed", seed, 0)
    check_at_least("epoch", epoch, 0)
    remainder = checked_remainder(remainder, sampler)
    ends = _checked_blocks(np.asarray(blocks).astype(np.int64), lengths.size)
    order = permutation(len(ends) - 1, random_bits(seed, epoch))
    if sampler == "grouped":
        longest = np.searchsorted(ends, int(np.argmax(lengths)), side="right") - 1
        place = int(np.flatnonzero(order == longest)[0])
        order[[0, place]] = order[[place, 0]]
    counts = _by_kind(num_images, ends) if sampler == "grouped" else np.diff(ends)[:, None]
    layout = _layout(ends, counts, order, order_window, global_batch_size, remainder == "drop")
    if not layout.steps[-1]:
        raise DataError(
            "remainder 'drop' leaves nothing: no modality fills a global batch of "
            f"{global_batch_size}; use 'pad' or 'short', or a smaller global_batch_size"
        )
    return WindowedPlan(
        lengths, num_images, layout, global_batch_size=global_batch_size,
        seed=seed, epoch=epoch, sampler=sampler, remainder=remainder,
    )  # fmt: skip


def _checked_blocks(ends: Ids, samples: int) -> Ids:
    """The blocks' places, or what is wrong with them."""
    if ends.size < 2 or ends[0] != 0 or ends[-1] != samples or (np.diff(ends) < 1).any():
        raise DataError(
            f"blocks: {ends.size} places for {samples} samples; expected ascending ones from 0 to "
            f"{samples}"
        )
    return ends


def _by_kind(num_images: NDArray[np.integer[Any]], blocks: Ids) -> Ids:
    """int64 [blocks, 2], samples of each block without and with images."""
    pictured = [
        int(np.count_nonzero(num_images[first:end])) for first, end in pairwise(blocks.tolist())
    ]
    return np.stack([np.diff(blocks) - pictured, pictured], axis=1).astype(np.int64)


def _layout(
    blocks: Ids, counts: Ids, order: Ids, window: int, global_batch_size: int, drops: bool
) -> _Layout:
    """Cut the blocks in their order [blocks] into windows; `counts` [blocks, kinds] are theirs."""
    sizes = np.diff(blocks)[order]
    samples = int(sizes.sum())
    windows = -(-samples // window)
    window_of = (np.cumsum(sizes) - sizes) * windows // samples
    of_windows = np.zeros((windows, counts.shape[1]), np.int64)
    np.add.at(of_windows, window_of, counts[order])
    zero = np.zeros((1, counts.shape[1]), np.int64)
    starts = np.concatenate([zero, np.cumsum(of_windows, axis=0)])
    taken = starts // global_batch_size * global_batch_size
    if not drops:
        taken[-1] = starts[-1]
    steps = (-(-taken // global_batch_size)).sum(axis=1)
    bounds = np.searchsorted(window_of, np.arange(windows + 1))
    members = [np.sort(order[first:end]) for first, end in pairwise(bounds.tolist())]
    return _Layout(blocks=blocks, members=members, starts=starts, taken=taken, steps=steps)
