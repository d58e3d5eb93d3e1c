"""Find the samples of a dataset that begin alike: the same images, and ids up to the last one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lapilli.data.dataset.dataset import Dataset

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["SharedPrefixes", "shared_prefixes"]

# Odd constants of splitmix64 (Steele, Lea, Flood 2014), whose output mixes every bit of its input.
MIX, FIRST, SECOND = (
    np.uint64(one) for one in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


@dataclass(frozen=True, eq=False)
class SharedPrefixes:
    """How the samples of a dataset begin.

    Attributes:
        groups: int64 [len]; samples with the same number begin alike.
        prefixes: int64 [len], tokens up to and including the last image, the images' among them; 0
            for a sample that shares nothing: it has no image, trains a token before its last one,
            or no other sample begins like it.
    """

    groups: NDArray[np.int64]
    prefixes: NDArray[np.int64]


def shared_prefixes(dataset: Dataset) -> SharedPrefixes:
    """Compare the beginnings of all samples; reads every token shard once.

    Beginnings are compared by a 64-bit hash of image slots and ids; the collator compares those
    that it puts into one row id by id.
    """
    shards, rows, slots = dataset.places
    selected = dataset.rows
    prefixes = np.zeros(len(dataset), np.int64)
    hashes = _hash_lists(slots, selected)
    for number in np.unique(shards[selected]):
        here = np.flatnonzero(shards[selected] == number)
        _, ids, spans = dataset.token_columns(int(number))
        size, hashed = _beginnings(ids, spans, rows[selected[here]])
        prefixes[here] = size
        hashes[here] = _mix(hashes[here] ^ hashed)
    _, groups, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    prefixes += np.where(prefixes > 0, dataset.num_images * (dataset.image_tokens - 1), 0)
    prefixes[counts[groups] == 1] = 0
    return SharedPrefixes(groups.astype(np.int64), prefixes)


def _beginnings(
    ids: Any, spans: Any, rows: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Ids up to the last image of each row, 0 where one of them is trained, and their hash."""
    offsets, values = ids
    marks = np.flatnonzero(values < 0)
    last = np.full(len(offsets) - 1, -1, np.int64)
    last[np.searchsorted(offsets, marks, side="right") - 1] = marks  # the last one stays
    sizes = np.where(last < 0, 0, last - offsets[:-1] + 1)[rows]
    firsts, ends = spans[0][:-1][rows], spans[0][1:][rows]
    is_trained = firsts < ends
    first_trained = np.full(len(rows), np.iinfo(np.int64).max)
    first_trained[is_trained] = spans[1][firsts[is_trained]]
    sizes = np.where(first_trained < sizes, 0, sizes)
    return sizes, _hash_ranges(values, offsets[:-1][rows].astype(np.int64), sizes)


def _hash_lists(column: Any, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A hash of each row's list."""
    offsets, values = column
    starts = offsets[:-1][rows].astype(np.int64)
    return _hash_ranges(values, starts, offsets[1:][rows] - starts)


def _hash_ranges(
    values: NDArray[Any], starts: NDArray[np.int64], sizes: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """A hash of `values[start : start + size]` for each pair; ranges of one size at once."""
    hashes = np.zeros(len(starts), np.uint64)
    for size in np.unique(sizes).tolist():
        here = np.flatnonzero(sizes == size)
        hashed = np.full(len(here), size, np.uint64)
        for place in range(size):
            found = values[starts[here] + place].astype(np.int64).view(np.uint64)
            hashed = _mix(hashed ^ found)
        hashes[here] = hashed
    return hashes


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Splitmix64's step."""
    mixed = values + MIX
    mixed = (mixed ^ (mixed >> np.uint64(30))) * FIRST
    mixed = (mixed ^ (mixed >> np.uint64(27))) * SECOND
    return mixed ^ (mixed >> np.uint64(31))
