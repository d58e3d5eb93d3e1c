"""Plan an epoch whose rows hold several samples: trees of samples that share images, and packs.

The order is drawn over trees and not over samples, so that samples of one image meet in a global
batch. Every sample comes exactly once, a global batch has `global_batch_size` samples, and the plan
knows neither the number of workers nor the micro-batch. Pure: no files, no devices.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lapilli.data.batches.sampler import (
    DEFAULT_WINDOW,
    LEAST_WINDOWS,
    balanced_chunks,
    permutation,
    random_bits,
)
from lapilli.data.errors import DataError

__all__ = ["MicroSums", "TreeLimits", "TreePlan", "assign_rows", "micro_sums", "plan_trees"]

Ids = NDArray[np.int64]
LOOK_AHEAD = 256  # rows among which the one is sought that fills a global batch exactly


@dataclass(frozen=True)
class TreeLimits:
    """What a row may hold.

    Attributes:
        share_images: Put samples that begin alike into one tree.
        pack: Put several trees into a row.
        row_length: Most tokens of a row: with `pack` its size, else of a tree.
        max_branches: Most samples of a tree.
    """

    share_images: bool
    pack: bool
    row_length: int
    max_branches: int = 8


@dataclass(frozen=True, eq=False)
class TreePlan:
    """The global batches of an epoch, as rows of trees of samples.

    Attributes:
        order: int64 [n], samples in the order in which they are trained on.
        trees: int64 [trees + 1]; tree t is `order[trees[t]:trees[t + 1]]`.
        rows: int64 [rows + 1]; row r has the trees from `rows[r]` to `rows[r + 1]`.
        steps: int64 [steps + 1]; global batch k has the rows from `steps[k]` to `steps[k + 1]`.
        row_lengths: int64 [rows], tokens of each row, shared ones counted once.
    """

    order: Ids
    trees: Ids
    rows: Ids
    steps: Ids
    row_lengths: Ids

    @property
    def num_steps(self) -> int:
        """Number of global batches, which is the number of optimizer steps."""
        return len(self.steps) - 1

    def global_batch(self, step: int) -> Ids:
        """Samples of one global batch, int64 [G], a view.

        Raises:
            IndexError: `step` is not in [0, num_steps).
        """
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of an epoch plan with {self.num_steps} steps")
        first, end = self.trees[self.rows[self.steps[step : step + 2]]]
        return self.order[first:end]

    def row(self, row: int) -> list[Ids]:
        """The samples of each tree of a row."""
        bounds = self.trees[self.rows[row] : self.rows[row + 1] + 1]
        return [self.order[first:end] for first, end in pairwise(bounds)]


def plan_trees(
    lengths: ArrayLike,
    modalities: ArrayLike,
    groups: ArrayLike,
    prefixes: ArrayLike,
    limits: TreeLimits,
    *,
    global_batch_size: int,
    seed: int,
    epoch: int,
    drop_remainder: bool = False,
) -> TreePlan:
    """Order every sample exactly once into rows, and these into global batches.

    Without `pack` a row is a tree, and rows of a global batch are of one modality and of similar
    lengths, as under sampler `grouped`. With `pack` rows are filled from all trees of a window of
    global batches, the longest first, each into the row that it fills best (best-fit decreasing).

    Args:
        lengths: int [n], tokens of a sample, its images' among them.
        modalities: bool or int [n], as for `plan_epoch`.
        groups: int [n]; samples that begin alike up to their last image have the same number.
        prefixes: int [n], tokens up to and including the last image; 0 for a sample that shares
            nothing.
        limits: What a row may hold.
        global_batch_size: Samples of a global batch; the last of a modality may have fewer.
        seed: With `epoch` it decides every draw.
        epoch: From 0.
        drop_remainder: Leave the last, smaller global batches out of this epoch.

    Raises:
        DataError: A sample longer than a row, or fewer samples than a global batch.
    """
    counted, shared = np.asarray(lengths, np.int64), np.asarray(prefixes, np.int64)
    _check(counted, limits, global_batch_size)
    bits = random_bits(seed, epoch)
    order = permutation(counted.size, bits)
    trees = _trees(order, np.asarray(groups, np.int64), counted, shared, limits)
    sizes = np.array([_tokens(tree, counted, shared) for tree in trees], np.int64)
    kinds = np.asarray(modalities).astype(np.int64)
    window = counted.size // (global_batch_size * LEAST_WINDOWS)
    window = max(1, min(DEFAULT_WINDOW, window)) * global_batch_size
    batches: list[list[_Row]] = []
    for chosen in _by_kind(trees, kinds, limits):
        rows = _rows(chosen, trees, sizes, limits, window, bits)
        batches += _batches(rows, global_batch_size, drop_remainder)
    if not batches:
        raise DataError(
            "remainder 'drop' leaves nothing: no modality fills a global batch of "
            f"{global_batch_size}; use 'short', or a smaller global_batch_size"
        )
    batches = [batches[place] for place in permutation(len(batches), bits)]
    return _plan(_longest_first(batches, counted, shared), counted, shared)


def assign_rows(
    plan: TreePlan, step: int, *, world_size: int, micro_batch_size: int
) -> list[list[Ids]]:
    """Share the rows of a global batch among the ranks, as `assign` shares samples.

    Args:
        plan: Of the epoch.
        step: Global batch, in [0, plan.num_steps).
        world_size: Ranks.
        micro_batch_size: Rows of one rank's micro-batch.

    Returns:
        By rank and micro-step, int64 [micro_batch_size] row numbers of the plan, -1 = empty slot.
        There are as many micro-steps as the rows need.
    """
    rows = np.arange(plan.steps[step], plan.steps[step + 1])
    chunks = balanced_chunks(rows, plan.row_lengths, world_size, micro_batch_size)
    return [list(chunks[:, rank]) for rank in range(world_size)]


@dataclass(frozen=True, eq=False)
class MicroSums:
    """Of each micro-batch of an epoch on one rank; on several they are nearly these.

    Attributes:
        longest: int64 [m], tokens of its longest row.
        sums: int64 [m], what its samples have in all.
    """

    longest: Ids
    sums: Ids


def micro_sums(
    plan: TreePlan, amounts: ArrayLike | None = None, *, micro_batch_size: int
) -> MicroSums:
    """What the micro-batches of an epoch must be padded to.

    Args:
        plan: Of the epoch.
        amounts: int [n], trained tokens of the samples, or any other amount; left out, 1 each.
        micro_batch_size: Rows of one rank's micro-batch.
    """
    of_samples = np.ones(len(plan.order), np.int64) if amounts is None else np.asarray(amounts)
    ends = np.concatenate([[0], np.cumsum(of_samples[plan.order])])
    of_rows = np.diff(ends[plan.trees[plan.rows]])
    micros = [
        micro[micro >= 0]
        for step in range(plan.num_steps)
        for micro in assign_rows(plan, step, world_size=1, micro_batch_size=micro_batch_size)[0]
    ]
    return MicroSums(
        longest=np.array([plan.row_lengths[micro].max() for micro in micros]),
        sums=np.array([of_rows[micro].sum() for micro in micros]),
    )


# ---- trees ---------------------------------------------------------------------------------------

_Tree = list[int]
_Row = list[_Tree]


def _trees(order: Ids, groups: Ids, lengths: Ids, prefixes: Ids, limits: TreeLimits) -> list[_Tree]:
    """Samples in the drawn order, each group's together where its first one stands."""
    if not limits.share_images:
        return [[one] for one in order.tolist()]
    trees: list[_Tree] = []
    open_trees: dict[int, tuple[_Tree, int]] = {}
    columns = (order, groups[order], lengths[order], prefixes[order])
    for sample, group, length, prefix in zip(*(one.tolist() for one in columns), strict=True):
        tree, tokens = open_trees.get(group, ([], 0))
        fits = 0 < len(tree) < limits.max_branches and tokens + length - prefix <= limits.row_length
        if prefix and fits:
            tree.append(sample)
            open_trees[group] = tree, tokens + length - prefix
        else:
            trees.append([sample])
            if prefix:
                open_trees[group] = trees[-1], length
    return trees


def _tokens(tree: _Tree, lengths: Ids, prefixes: Ids) -> int:
    """Tokens of a tree, shared ones once."""
    return int(lengths[tree].sum()) - (len(tree) - 1) * int(prefixes[tree[0]])


def _by_kind(trees: list[_Tree], kinds: Ids, limits: TreeLimits) -> list[Ids]:
    """Numbers of the trees of each modality; of all where rows are packed."""
    of_trees = kinds[[tree[0] for tree in trees]]
    if limits.pack:
        return [np.arange(len(trees))]
    return [np.flatnonzero(of_trees == kind) for kind in np.unique(of_trees)]


# ---- rows and global batches ---------------------------------------------------------------------


def _rows(
    chosen: Ids,
    trees: list[_Tree],
    sizes: Ids,
    limits: TreeLimits,
    window: int,
    bits: np.random.PCG64,
) -> list[_Row]:
    """Rows in windows of so many samples: packed and mixed, or a tree each, the longest first."""
    counts = np.cumsum([len(trees[one]) for one in chosen.tolist()])
    window_of = (counts - 1) // window
    rows: list[_Row] = []
    for one in np.unique(window_of):
        inside = chosen[window_of == one]
        inside = inside[np.argsort(-sizes[inside], kind="stable")]
        if limits.pack:
            packed = _packed(sizes[inside].tolist(), limits.row_length)
            for number in permutation(len(packed), bits).tolist():
                rows.append([trees[inside[place]] for place in packed[number]])
        else:
            rows += [[trees[tree]] for tree in inside.tolist()]
    return rows


def _packed(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Places of the sizes, descending, by bin: each goes where it leaves least room."""
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)
    rooms = 0  # bit r is set while a bin has room r
    for place, size in enumerate(sizes):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            number = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(place)
        left = room - size
        with_room[left].append(number)
        rooms |= 1 << left
    return bins


def _batches(rows: list[_Row], size: int, drop_remainder: bool) -> list[list[_Row]]:
    """Global batches of exactly `size` samples: neighbours, and at the end of each what fills it.

    A row is cut in two where none of the next `LOOK_AHEAD` fills a batch.
    """
    batches: list[list[_Row]] = []
    waiting = _Waiting(rows)
    while waiting:
        batch: list[_Row] = []
        missing = size
        while missing and waiting:
            row = waiting.take(missing)
            batch.append(row)
            missing -= sum(map(len, row))
        if not missing or not drop_remainder:
            batches.append(batch)
    return batches


class _Waiting:
    """Rows that are not in a batch yet, in their order."""

    def __init__(self, rows: Sequence[_Row]) -> None:
        self._rest: Iterator[_Row] = iter(rows)
        self._near: deque[_Row] = deque()
        self._refill()

    def __bool__(self) -> bool:
        return bool(self._near)

    def take(self, most: int) -> _Row:
        """The next row; near the end of a batch the first that fills it, or part of the next."""
        first = self._near[0]
        if sum(map(len, first)) <= most:
            self._near.popleft()
            self._refill()
            return first
        for place, row in enumerate(self._near):
            if sum(map(len, row)) == most:
                del self._near[place]
                self._refill()
                return row
        self._near.popleft()
        front, back = _cut(first, most)
        self._near.appendleft(back)
        return front

    def _refill(self) -> None:
        while len(self._near) < LOOK_AHEAD and (row := next(self._rest, None)) is not None:
            self._near.append(row)


def _cut(row: _Row, count: int) -> tuple[_Row, _Row]:
    """A row's first `count` samples, and the others."""
    front: _Row = []
    back: _Row = []
    for tree in row:
        here = min(count, len(tree))
        if here:
            front.append(tree[:here])
        if here < len(tree):
            back.append(tree[here:])
        count -= here
    return front, back


def _longest_first(batches: list[list[_Row]], lengths: Ids, prefixes: Ids) -> list[list[_Row]]:
    """Swap the batch of the longest row to the front: it decides how much memory is needed."""
    longest = [
        max(sum(_tokens(tree, lengths, prefixes) for tree in row) for row in batch)
        for batch in batches
    ]
    first = int(np.argmax(longest))
    batches[0], batches[first] = batches[first], batches[0]
    return batches


def _plan(batches: list[list[_Row]], lengths: Ids, prefixes: Ids) -> TreePlan:
    """Nested lists as flat arrays."""
    rows = [row for batch in batches for row in batch]
    trees = [tree for row in rows for tree in row]
    tokens = np.array([_tokens(tree, lengths, prefixes) for tree in trees], np.int64)
    ends = [_offsets(map(len, parts)) for parts in (trees, rows, batches)]
    return TreePlan(
        order=np.array([one for tree in trees for one in tree], np.int64),
        trees=ends[0],
        rows=ends[1],
        steps=ends[2],
        row_lengths=np.add.reduceat(tokens, ends[1][:-1]),
    )


def _offsets(sizes: Iterator[int] | map[int]) -> Ids:
    return np.concatenate([[0], np.cumsum(list(sizes))]).astype(np.int64)


def _check(lengths: Ids, limits: TreeLimits, global_batch_size: int) -> None:
    if limits.row_length < 1 or limits.max_branches < 1 or global_batch_size < 1:
        raise DataError(
            f"row_length {limits.row_length}, max_branches {limits.max_branches}, "
            f"global_batch_size {global_batch_size}; expected at least 1 each"
        )
    if lengths.size < global_batch_size:
        raise DataError(
            f"{lengths.size} samples are fewer than one global batch of {global_batch_size}; "
            f"use a global_batch_size of at most {lengths.size} or more data"
        )
    longest = int(lengths.argmax())
    if limits.pack and lengths[longest] > limits.row_length:
        count = int((lengths > limits.row_length).sum())
        raise DataError(
            f"row_length is {limits.row_length}, but {count} samples are longer, sample {longest} "
            f"has {lengths[longest]} tokens; use a row_length of at least that, or a max_length "
            "that leaves them out"
        )
