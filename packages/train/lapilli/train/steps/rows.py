"""A run's rows: one sample each, or trees of samples that share images, and packs of these."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lapilli.data.batches.sampler import EpochPlan, assign, plan_epoch
from lapilli.data.batches.tree_plan import TreeLimits, TreePlan, assign_rows, plan_trees
from lapilli.data.dataset.dataset import Dataset
from lapilli.data.dataset.prefixes import SharedPrefixes
from lapilli.train.config import RunConfig

__all__ = [
    "MicroRows", "RowSamples", "StepRows", "plan_rows", "row_pairs", "row_tokens", "share_rows",
]  # fmt: skip

RowSamples = list[NDArray[np.int64]]  # the samples of each of a row's trees
MicroRows = list[RowSamples]
StepRows = list[list[MicroRows]]  # by rank and micro-step


def plan_rows(
    dataset: Dataset, prefixes: SharedPrefixes | None, config: RunConfig, epoch: int
) -> EpochPlan | TreePlan:
    """An epoch's plan, as the run's settings want its rows.

    Args:
        dataset: What is trained on.
        prefixes: How its samples begin, where they share images.
        config: The run's settings.
        epoch: From 0.

    Raises:
        DataError: Settings of which no plan can be made.
    """
    if config.shares_rows:
        none = np.zeros(len(dataset), np.int64)
        return plan_trees(
            dataset.lengths, dataset.has_images,
            none if prefixes is None else prefixes.groups,
            none if prefixes is None else prefixes.prefixes,
            TreeLimits(
                config.share_images, config.pack,
                config.row_length or config.max_length, config.max_branches,
            ),
            global_batch_size=config.global_batch_size, seed=config.seed, epoch=epoch,
            drop_remainder=config.remainder == "drop",
        )  # fmt: skip
    is_llava = config.sampler == "llava"
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


def share_rows(
    plan: EpochPlan | TreePlan,
    step: int,
    lengths: NDArray[np.int64],
    *,
    world_size: int,
    micro_batch_size: int,
) -> tuple[StepRows, NDArray[np.int64]]:
    """Share a global batch's rows among the ranks.

    Args:
        plan: Of the epoch.
        step: In the epoch.
        lengths: int64 [n], tokens of the samples.
        world_size: Ranks.
        micro_batch_size: Rows of one rank's micro-batch.

    Returns:
        The rows by rank and micro-step; and their samples, rank by rank, -1 for empty slots.
    """
    if isinstance(plan, TreePlan):
        of_rank = assign_rows(plan, step, world_size=world_size, micro_batch_size=micro_batch_size)
        rows = [
            [[plan.row(int(row)) for row in micro if row >= 0] for micro in micros]
            for micros in of_rank
        ]
        trees = [tree for micros in rows for micro in micros for row in micro for tree in row]
        return rows, np.concatenate(trees)
    ranks = assign(plan, step, lengths, world_size=world_size, micro_batch_size=micro_batch_size)
    rows = [
        [[[ids[place : place + 1]] for place in np.flatnonzero(ids >= 0)] for ids in micros]
        for micros in ranks
    ]
    return rows, np.concatenate([ids for micros in ranks for ids in micros])


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
