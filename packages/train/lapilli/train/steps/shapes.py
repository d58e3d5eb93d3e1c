"""Choose the few shapes that a run's batches have."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lapilli.data.batches.collate import (
    BatchShape,
    choose_buckets,
    choose_target_sizes,
    static_shape,
)
from lapilli.data.batches.micro_batches import longest_of, longest_rows, trained_counts
from lapilli.data.batches.sampler import EpochPlan
from lapilli.data.batches.token_budget import budget_chunks
from lapilli.data.batches.tree_plan import TreePlan, micro_sums
from lapilli.data.dataset.dataset import Dataset
from lapilli.train.config import RunConfig
from lapilli.train.errors import TrainError
from lapilli.train.steps.rows import planned_rows

__all__ = ["batch_shape"]


def batch_shape(
    dataset: Dataset,
    config: RunConfig,
    plan: EpochPlan | TreePlan,
    world_size: int,
    held_out: Dataset | None = None,
) -> BatchShape:
    """The few shapes a run's batches have, chosen for what it begins with; the rest is like it.

    Args:
        dataset: What is trained on.
        config: The run's settings, with a micro-batch.
        plan: Of the first epoch, or of its first window.
        world_size: Ranks; under `micro_batch_tokens` a rank has no more rows than its share.
        held_out: What the run is validated on; with `max_shapes: 1` its batches have the same
            shape.

    Raises:
        TrainError: A row that `micro_batch_tokens` does not hold.
    """
    if config.micro_batch_tokens:
        return _within_budget(dataset, config, plan, world_size)
    if config.is_static:
        return _static(config, [dataset, held_out] if held_out else [dataset])
    images, text = _longest(dataset, config, plan)
    buckets, text_buckets = choose_buckets(
        images[images > 0], text[text > 0], count=config.max_shapes
    )
    shape = BatchShape(
        rows=config.micro_batch_size,
        buckets=buckets,
        image_tokens=dataset.image_tokens,
        predict_chunk=config.model.head_chunk,
        text_buckets=text_buckets,
        target_sizes=_target_sizes(dataset, config, plan),
        has_trees=config.shares_rows,
    )
    if not isinstance(plan, TreePlan):
        return shape
    first, rows = plan.order[plan.trees[:-1]], config.micro_batch_size
    images = np.zeros(len(dataset), np.int64)
    images[first] = dataset.num_images[first]  # of a tree they are there once
    images, samples = (
        micro_sums(plan, amounts, micro_batch_size=rows).sums for amounts in (images, None)
    )
    return _with_slots(shape, config, images, samples, rows)


def _static(config: RunConfig, datasets: list[Dataset]) -> BatchShape:
    """The one shape that holds any micro-batch of these samples, one a row."""
    shape = static_shape(
        config.micro_batch_size,
        config.max_length,
        datasets[0].image_tokens,
        np.concatenate([of.num_images for of in datasets]),
        np.concatenate([of.num_trained for of in datasets]),
    )
    return replace(shape, predict_chunk=config.model.head_chunk)


def _longest(
    dataset: Dataset, config: RunConfig, plan: EpochPlan | TreePlan
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens of the longest row of each micro-batch that has images, and of each that has none.

    Whatever the other epochs put together: the longest sample has a place, and where rows hold
    several, the longest row. Where a text-only micro-batch may stand beside another rank's images,
    it has one among theirs.
    """
    lengths, num_images = dataset.lengths, dataset.num_images
    if isinstance(plan, TreePlan):
        most = max(config.longest_row, int(lengths.max()))
        longest = micro_sums(plan, micro_batch_size=config.micro_batch_size).longest
        return np.array([most]) if config.pack else np.append(longest, most), longest[:0]
    rows = config.micro_batch_size
    images, text = longest_rows(plan, lengths, num_images, micro_batch_size=rows)
    with_images, text_only = (
        longest_of(lengths, num_images, with_images=kind) for kind in (True, False)
    )
    if config.sampler != "grouped" and with_images:  # either kind may stand beside images
        with_images = max(with_images, text_only)
    return np.append(images, with_images), np.append(text, text_only)


def _with_slots(
    shape: BatchShape,
    config: RunConfig,
    images: NDArray[np.int64],
    samples: NDArray[np.int64],
    rows: int,
) -> BatchShape:
    """The shape with the few numbers of images and samples that rows of several of them take.

    Multiples of the rows; a quarter more than in the first epoch has a place too.
    """

    def sizes(counts: NDArray[np.int64]) -> tuple[int, ...]:
        wanted = np.append(counts, counts.max() * 5 // 4)
        return choose_target_sizes(wanted, count=config.max_shapes, multiple=rows)

    carrying = images[images > 0]
    return replace(
        shape,
        image_sizes=sizes(carrying) if config.pack and carrying.size else (),
        sample_sizes=sizes(samples),
    )


def _target_sizes(
    dataset: Dataset, config: RunConfig, plan: EpochPlan | TreePlan
) -> tuple[int, ...]:
    """The few numbers of trained positions.

    Where rows hold several samples a later epoch may have a larger sum than the first: a quarter
    more has a place, and what is larger still is padded to `head_chunk`.
    """
    trained = dataset.num_trained
    if isinstance(plan, TreePlan):
        counts = micro_sums(plan, trained, micro_batch_size=config.micro_batch_size).sums
        counts = np.append(counts, counts.max() * 5 // 4)
    else:
        counts = trained_counts(
            plan, dataset.lengths, trained, micro_batch_size=config.micro_batch_size
        )
        counts = np.append(counts, trained.max(initial=0))
    return choose_target_sizes(counts.astype(np.int64), count=config.max_shapes)


def _within_budget(
    dataset: Dataset, config: RunConfig, plan: EpochPlan | TreePlan, world_size: int
) -> BatchShape:
    """Shapes of at most `micro_batch_tokens` tokens: rows that are shorter are more.

    Lengths are chosen for the first epoch's rows in micro-batches that are padded to a multiple of
    8 tokens. Where a micro-batch without images may stand beside another rank's images, both kinds
    have the same lengths.
    """
    tokens, rows = config.micro_batch_tokens, planned_rows(plan, dataset)
    most = -(-int(np.diff(rows.steps).max()) // world_size)
    limits = (tokens // (-(-rows.lengths // 8) * 8)).clip(1, most)
    padded, micros = np.zeros_like(rows.lengths), list[list[np.int64]]()
    for first, end in itertools.pairwise(rows.steps.tolist()):
        for micro in budget_chunks(rows.lengths[first:end], limits[first:end], 1)[0]:
            placed = first + micro
            padded[placed] = rows.lengths[placed].max(initial=0)
            micros.append([of[placed].sum() for of in (rows.trained, rows.images, rows.samples)])
    is_apart = config.sampler == "grouped" and not config.shares_rows
    kind = rows.images > 0 if is_apart else np.ones(len(padded), np.bool_)
    longest = [padded[kind], padded[~kind]]
    if config.shares_rows:
        longest[0] = np.append(longest[0], config.longest_row)
    buckets, text_buckets = choose_buckets(*longest, count=config.max_shapes)
    largest = max((*buckets, *text_buckets))
    if largest > tokens:
        raise TrainError(
            f"micro_batch_tokens: {tokens} holds no row of {largest} tokens, which the longest is "
            "padded to; set at least that, or a smaller max_length"
        )
    trained, images, samples = np.array(micros).T
    shape = BatchShape(
        rows=most,
        buckets=buckets,
        image_tokens=dataset.image_tokens,
        predict_chunk=config.model.head_chunk,
        text_buckets=text_buckets,
        target_sizes=choose_target_sizes(
            np.append(trained, trained.max() * 5 // 4), count=config.max_shapes
        ),
        has_trees=config.shares_rows,
        tokens=tokens,
    )
    if not config.shares_rows:
        return shape
    return _with_slots(shape, config, images, samples, shape.rows_at(buckets[-1]))
