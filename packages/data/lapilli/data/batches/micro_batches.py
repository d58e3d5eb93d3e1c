"""What the micro-batches of an epoch must be padded to, for any number of ranks."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lapilli.data.batches.llava_sampler import EMPTY
from lapilli.data.batches.sampler import EpochPlan

__all__ = ["largest_sum", "longest_of", "longest_rows", "trained_counts"]

Ids = NDArray[np.int64]
AT_ONCE = 1 << 20  # numbers of a column that are copied at once


def micro_batches(plan: EpochPlan, lengths: ArrayLike, *, micro_batch_size: int) -> Ids:
    """The micro-batches of an epoch, whatever the number of ranks.

    Args:
        plan: of the epoch; its batches that are cut short are not looked at.
        lengths: int [n], the lengths the plan was made of.
        micro_batch_size: slots of one rank's micro-batch.

    Returns:
        int64 [m, micro_batch_size] sample indices, -1 = empty slot. Where a global batch has empty
        slots, `assign` spreads them and here they are together.
    """
    sizes = np.diff(plan.offsets)
    whole = plan.order[np.repeat(sizes == plan.whole, sizes)].reshape(-1, plan.whole or 1)
    if plan.fixed_micro_batch is None:
        tokens = np.where(whole == EMPTY, 0, np.asarray(lengths)[whole])
        order = np.argsort(-tokens, axis=1, kind="stable")
        whole = np.take_along_axis(whole, order, axis=1)
    return whole.reshape(-1, micro_batch_size)


def longest_rows(
    plan: EpochPlan, lengths: ArrayLike, has_images: ArrayLike, *, micro_batch_size: int
) -> tuple[Ids, Ids]:
    """What the micro-batches of an epoch must be padded to, for any number of ranks.

    Args:
        plan: of the epoch; its batches that are cut short are not looked at.
        lengths: int [n], tokens of the samples.
        has_images: bool [n], or int [n] with their images.
        micro_batch_size: slots of one rank's micro-batch.

    Returns:
        The longest sample of each micro-batch that has images, and of each that has none.
    """
    micros = micro_batches(plan, lengths, micro_batch_size=micro_batch_size)
    longest = np.where(micros == EMPTY, 0, np.asarray(lengths)[micros]).max(axis=1)
    with_images = ((micros != EMPTY) & (np.asarray(has_images)[micros] != 0)).any(axis=1)
    return longest[with_images], longest[~with_images & (longest > 0)]


def trained_counts(
    plan: EpochPlan, lengths: ArrayLike, num_trained: ArrayLike, *, micro_batch_size: int
) -> Ids:
    """Trained tokens of each micro-batch of an epoch, for any number of ranks.

    Args:
        plan: of the epoch; its batches that are cut short are not looked at.
        lengths: int [n], the lengths the plan was made of.
        num_trained: int [n], trained tokens of the samples.
        micro_batch_size: slots of one rank's micro-batch.

    Returns:
        int64 [m]. Exact but for global batches with empty slots (`micro_batches`).
    """
    micros = micro_batches(plan, lengths, micro_batch_size=micro_batch_size)
    return np.where(micros == EMPTY, 0, np.asarray(num_trained)[micros]).sum(axis=1)


def longest_of(lengths: Ids, num_images: Ids, *, with_images: bool) -> int:
    """The longest sample of those that have images, or of those that have none; 0 without any.

    Args:
        lengths: int64 [n], tokens of the samples; not copied as a whole.
        num_images: int64 [n].
        with_images: Which of them.
    """
    return max(
        int(lengths[first:end][(num_images[first:end] > 0) == with_images].max(initial=0))
        for first, end in _pieces(len(lengths))
    )


def largest_sum(amounts: Ids, count: int) -> int:
    """The sum of the `count` largest amounts, int64 [n]; they are not copied as a whole."""
    largest = np.zeros(0, np.int64)
    for first, end in _pieces(len(amounts)):
        largest = np.sort(np.concatenate([largest, amounts[first:end]]))[-count:]
    return int(largest.sum())


def _pieces(count: int) -> list[tuple[int, int]]:
    return [(first, min(count, first + AT_ONCE)) for first in range(0, count, AT_ONCE)]
