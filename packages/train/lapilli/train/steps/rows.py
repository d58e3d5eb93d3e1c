"""A run's rows: one sample each, or trees of samples that share images, and packs of these."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lapilli.data.batches.collate import BatchShape
from lapilli.data.batches.sampler import EpochPlan, Steps, assign, plan_epoch
from lapilli.data.batches.token_budget import budget_chunks
from lapilli.data.batches.tree_plan import TreeLimits, TreePlan, assign_rows, plan_trees
from lapilli.data.batches.windows import WindowedPlan, plan_windows, window_size
from lapilli.data.dataset.dataset import Dataset
from lapilli.data.dataset.prefixes import SharedPrefixes, shared_prefixes
from lapilli.data.dataset.sample_shards import sample_blocks
from lapilli.train.config import RunConfig

__all__ = [
    "EpochPlans", "MicroRows", "PlannedRows", "RowSamples", "StepRows",
    "planned_rows", "row_pairs", "row_tokens", "share_rows",
]  # fmt: skip

RowSamples = list[NDArray[np.int64]]  # the samples of each of a row's trees
MicroRows = list[RowSamples]
StepRows = list[list[MicroRows]]  # by rank and micro-step


class EpochPlans:
    """The plans of a run's epochs; the first is kept.

    Args:
        dataset: What is trained on.
        config: The run's settings; for sampler `llava` with its micro-batch.

    Raises:
        DataError: Settings of which no plan can be made.
    """

    def __init__(self, dataset: Dataset, config: RunConfig) -> None:
        self._dataset, self._config = dataset, config
        self.prefixes = shared_prefixes(dataset) if config.share_images else None
        self.first = _plan(dataset, self.prefixes, config, 0)

    @property
    def sampled(self) -> EpochPlan | TreePlan:
        """What of the first epoch shapes and estimates are made of: all, or its first window."""
        return self.first.first_window if isinstance(self.first, WindowedPlan) else self.first

    def of(self, epoch: int) -> EpochPlan | TreePlan | WindowedPlan:
        """The plan of an epoch, from 0."""
        if not epoch:
            return self.first
        return _plan(self._dataset, self.prefixes, self._config, epoch)

    @property
    def shared_tokens(self) -> NDArray[np.int64]:
        """int64 [len], tokens that a sample shares with the others of its tree."""
        if self.prefixes is None:
            return np.broadcast_to(np.int64(0), len(self._dataset))
        return self.prefixes.prefixes


def _plan(
    dataset: Dataset, prefixes: SharedPrefixes | None, config: RunConfig, epoch: int
) -> EpochPlan | TreePlan | WindowedPlan:
    if config.shares_rows:
        none = np.zeros(len(dataset), np.int64)
        return plan_trees(
            dataset.lengths, dataset.has_images,
            none if prefixes is None else prefixes.groups,
            none if prefixes is None else prefixes.prefixes,
            TreeLimits(
                config.share_images, config.pack,
                config.longest_row, config.max_branches,
            ),
            global_batch_size=config.global_batch_size, seed=config.seed, epoch=epoch,
            drop_remainder=config.remainder == "drop",
        )  # fmt: skip
    is_llava = config.sampler == "llava"
    window = 0 if is_llava else window_size(config.order_window, len(dataset))
    if window:
        return plan_windows(
            dataset.lengths, dataset.num_images, sample_blocks(dataset), order_window=window,
            global_batch_size=config.global_batch_size, seed=config.seed, epoch=epoch,
            sampler=config.sampler, remainder=config.remainder,
        )  # fmt: skip
    return plan_epoch(
        dataset.llava_lengths if is_llava else dataset.lengths,
        dataset.has_images,
        global_batch_size=config.global_batch_size,
        seed=config.seed,
        epoch=epoch,
        sampler=config.sampler,
        remainder=config.remainder,
        llava_micro_batch=config.micro_batch_size if is_llava else None,
        llava_processes=config.llava_processes or config.num_workers,
        group_by_modality_length=config.group_by_modality_length is not False,
    )


MUCH_PADDING = 0.25  # of the rows computed


@dataclass(frozen=True, eq=False)
class PlannedRows:
    """The rows of an epoch, in the plan's order, without empty slots.

    Attributes:
        steps: int64 [steps + 1]; global batch k has the rows from `steps[k]` to `steps[k + 1]`.
        lengths: int64 [rows], tokens, shared ones once.
        samples: int64 [rows], samples.
        images: int64 [rows], images, shared ones once.
        trained: int64 [rows], trained tokens.
    """

    steps: NDArray[np.int64]
    lengths: NDArray[np.int64]
    samples: NDArray[np.int64]
    images: NDArray[np.int64]
    trained: NDArray[np.int64]

    @property
    def note(self) -> str:
        """What global batches are composed of, in words: gradients hang on fewer images."""
        firsts = self.steps[:-1]
        rows = np.diff(self.steps)
        images, samples = (np.add.reduceat(of, firsts) for of in (self.images, self.samples))
        carrying = self.samples[self.images > 0].sum()
        each = f", {carrying / images.sum():.3g} samples an image" if images.any() else ""
        return (
            f"rows: {samples.mean():.1f} samples of a global batch lie in {rows.mean():.1f} rows "
            f"with {images.mean():.1f} images ({images.min()} to {images.max()}){each}"
        )

    def padding_note(self, micro_batch_size: int, num_workers: int) -> str:
        """What share of the rows computed is padding, and what size has less; "" if it is small.

        Args:
            micro_batch_size: Rows of a micro-batch; 0 where tokens bound it.
            num_workers: Workers, whose micro-batches are filled side by side.
        """
        rows = np.diff(self.steps)

        def padding(size: int) -> float:
            computed = -(-rows // (size * num_workers)) * (size * num_workers)
            return float(1 - rows.sum() / computed.sum())

        if not micro_batch_size or padding(micro_batch_size) <= MUCH_PADDING:
            return ""
        divisors = [n for n in range(micro_batch_size, 0, -1) if micro_batch_size % n == 0]
        better = next(n for n in divisors if n == 1 or padding(n) <= MUCH_PADDING / 2)
        share = padding(micro_batch_size)
        return (
            f"rows: {share:.0%} of the rows computed are padding: a global batch fills "
            f"{rows.mean():.1f} of them, a micro-batch has {micro_batch_size}; with "
            f"micro_batch_size {better} it is {padding(better):.0%}, with micro_batch_tokens less"
        )


def planned_rows(plan: EpochPlan | TreePlan, dataset: Dataset) -> PlannedRows:
    """What the rows of an epoch hold.

    Args:
        plan: Of the epoch.
        dataset: What it was made of.
    """
    images, trained = (of.astype(np.int64) for of in (dataset.num_images, dataset.num_trained))
    if isinstance(plan, TreePlan):
        firsts = plan.trees[plan.rows]  # of each row's samples
        return PlannedRows(
            steps=plan.steps,
            lengths=plan.row_lengths,
            samples=np.diff(firsts),
            images=_sums(images[plan.order[plan.trees[:-1]]], plan.rows),
            trained=_sums(trained[plan.order], firsts),
        )
    filled = plan.order >= 0
    order = plan.order[filled]
    return PlannedRows(
        steps=np.concatenate([[0], np.cumsum(filled)])[plan.offsets],
        lengths=dataset.lengths[order].astype(np.int64),
        samples=np.ones(len(order), np.int64),
        images=images[order],
        trained=trained[order],
    )


def _sums(values: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sums of `values[ends[i] : ends[i + 1]]`."""
    return np.diff(np.concatenate([[0], np.cumsum(values)])[ends])


def share_rows(
    plan: Steps | TreePlan, step: int, dataset: Dataset, shape: BatchShape, *, world_size: int
) -> tuple[StepRows, NDArray[np.int64]]:
    """Share a global batch's rows among the ranks.

    Args:
        plan: Of the epoch.
        step: In the epoch.
        dataset: What the plan was made of.
        shape: The shapes a micro-batch may have.
        world_size: Ranks.

    Returns:
        The rows by rank and micro-step; and their samples, rank by rank, -1 for empty slots.
    """
    if shape.tokens:
        rows = _within_budget(plan, step, dataset, shape, world_size)
    elif isinstance(plan, TreePlan):
        of_rank = assign_rows(plan, step, world_size=world_size, micro_batch_size=shape.rows)
        rows = [
            [[plan.row(int(row)) for row in micro if row >= 0] for micro in micros]
            for micros in of_rank
        ]
    else:
        ranks = assign(
            plan, step, dataset.lengths, world_size=world_size, micro_batch_size=shape.rows
        )
        rows = [
            [[[ids[place : place + 1]] for place in np.flatnonzero(ids >= 0)] for ids in micros]
            for micros in ranks
        ]
        return rows, np.concatenate([ids for micros in ranks for ids in micros])
    trees = [tree for micros in rows for micro in micros for row in micro for tree in row]
    return rows, np.concatenate(trees)


def _within_budget(
    plan: Steps | TreePlan, step: int, dataset: Dataset, shape: BatchShape, world_size: int
) -> StepRows:
    """Rows by rank and micro-step, as many in each as `shape.tokens` allows."""
    if isinstance(plan, TreePlan):
        numbers = range(plan.steps[step], plan.steps[step + 1])
        rows = [plan.row(number) for number in numbers]
        lengths = plan.row_lengths[numbers.start : numbers.stop]
    else:
        order = plan.global_batch(step)
        order = order[order >= 0]
        rows = [[order[place : place + 1]] for place in range(len(order))]
        lengths = dataset.lengths[order].astype(np.int64)
    has_images = any(dataset.num_images[tree[0]] > 0 for row in rows for tree in row)
    limits = shape.most_rows(lengths, has_images=has_images)
    return [
        [[rows[place] for place in micro] for micro in micros]
        for micros in budget_chunks(lengths, limits, world_size)
    ]


def row_tokens(row: RowSamples, lengths: NDArray[np.int64], prefixes: NDArray[np.int64]) -> int:
    """Tokens of a row, shared ones once.

    Args:
        row: Its trees.
        lengths: int64 [n], tokens of the samples.
        prefixes: int64 [n], tokens that a sample's tree shares.
    """
    return sum(int(lengths[tree].sum()) - (len(tree) - 1) * int(prefixes[tree[0]]) for tree in row)


def row_pairs(row: RowSamples, lengths: NDArray[np.int64], prefixes: NDArray[np.int64]) -> int:
    """Pairs of a query and a key that it sees, of a row; arguments as for `row_tokens`."""
    pairs = 0
    for tree in row:
        sizes, shared = lengths[tree], int(prefixes[tree[0]])
        own = sizes * (sizes + 1) // 2  # of the samples alone; a prefix's own pairs count once
        pairs += int(own.sum()) - (len(tree) - 1) * (shared * (shared + 1) // 2)
    return pairs
