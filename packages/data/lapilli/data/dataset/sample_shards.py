"""Which shards samples are read from: where windows of an order are cut, and what a batch reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lapilli.data.dataset.dataset import Dataset
from lapilli.data.io.atomic import ShardFacts

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["sample_blocks", "shards_of"]

AT_ONCE = 1 << 20  # samples that are looked at at once


def sample_blocks(dataset: Dataset) -> NDArray[np.int64]:
    """Where a dataset's samples can be cut into runs that lie in the same shards.

    A run has the samples of one token shard, and so their images, which lie in the order of the
    records that name them first. Runs shorter than a quarter of an average shard's stay with the
    next: records that came into a dataset later lie between others.

    Returns:
        int64 [runs + 1], ascending from 0 to the number of samples. One pass over the samples, of
        which it keeps no copy.
    """
    shards, _, _ = dataset.places
    count = len(dataset)
    least = max(1, count // (4 * len(dataset.manifest.tokens)))
    ends, before = [0], -1
    for first in range(0, count, AT_ONCE):
        here = shards[dataset.rows[first : first + AT_ONCE]]
        changes = first + np.flatnonzero(here != np.concatenate([[before], here[:-1]]))
        before = int(here[-1])
        at = 0
        while (at := int(np.searchsorted(changes, ends[-1] + least))) < len(changes):
            ends.append(int(changes[at]))
    if count - ends[-1] < least and len(ends) > 1:
        ends.pop()
    return np.array([*ends, count], np.int64)


def shards_of(dataset: Dataset, samples: NDArray[np.int64]) -> list[ShardFacts]:
    """The shards that samples are read from: those of their tokens, then those of their images.

    Args:
        dataset: The samples' dataset.
        samples: int64 [n], as a plan gives them: -1 is an empty slot.

    Returns:
        Each shard once, by its number; the view's are those of `Dataset.view`.
    """
    shards, _, (offsets, slots) = dataset.places
    rows = dataset.rows[samples[samples >= 0]]
    starts, ends = offsets[rows].astype(np.int64), offsets[rows + 1].astype(np.int64)
    counts = ends - starts
    places = np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
    view = dataset.facts
    return [
        *(dataset.manifest.tokens[one] for one in np.unique(shards[rows]).tolist()),
        *(view.shards[one] for one in np.unique(slots[places] // view.images_per_shard).tolist()),
    ]
