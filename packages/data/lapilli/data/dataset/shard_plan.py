"""Decide what a cache of shards fetches and removes from the batches to come. Pure: no files.

A batch needs a set of shards at the same time. Where the batches are known, what is needed farthest
from now is removed first (Belady's rule), which fetches the fewest of shards of one size. Fetching
ahead costs some of that: what is removed early could have been read once more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lapilli.data.errors import DataError

__all__ = [
    "NEVER", "Fetch", "largest_batch", "next_uses", "plan_fetches", "removal_order", "warm_order",
]  # fmt: skip

NEVER = int(np.iinfo(np.int32).max)  # batches until a shard is needed that no known batch needs

Shards = NDArray[np.integer[Any]]  # numbers of shards, each once


@dataclass(frozen=True)
class Fetch:
    """One shard fetched while batch `batch` was read, and the shards removed to make room."""

    batch: int
    shard: int
    removed: tuple[int, ...]


def next_uses(batches: Sequence[Shards], shards: int) -> NDArray[np.int32]:
    """Batches until each shard is needed: 0 for those of the first batch, `NEVER` for none.

    Args:
        batches: The shards of each batch to come.
        shards: Number of shards.

    Returns:
        int32 [shards].
    """
    found = np.full(shards, NEVER, np.int32)
    for distance, batch in zip(range(len(batches) - 1, -1, -1), reversed(batches), strict=True):
        found[batch] = distance
    return found


def removal_order(uses: ArrayLike, read: ArrayLike, spared: int = 0) -> NDArray[np.int64]:
    """What is removed first: what is needed last, of these what was read longest ago.

    Args:
        uses: int [n], batches until each is needed, as of `next_uses`.
        read: [n], when each was read last.
        spared: What is needed in fewer batches is left out.

    Returns:
        int64 [m], places in `uses`.
    """
    distances = np.asarray(uses, np.int64)
    order = np.lexsort((np.asarray(read), -distances))
    return order[distances[order] >= spared]


def largest_batch(sizes: ArrayLike, batches: Iterable[Shards]) -> tuple[int, int]:
    """The batch whose shards have the most bytes, and these bytes; (0, 0) without batches.

    Args:
        sizes: int [n], bytes of each shard.
        batches: The shards of each batch.
    """
    of = np.asarray(sizes, np.int64)
    found = [int(of[batch].sum()) for batch in batches]
    most = max(found, default=0)
    return (found.index(most), most) if found else (0, 0)


def warm_order(sizes: ArrayLike, batches: Iterable[Shards], most: int) -> list[int]:
    """The shards to fetch before the first batch: those needed first, of at most `most` bytes.

    Those that no batch needs come last, by their number.

    Args:
        sizes: int [n], bytes of each shard.
        batches: The shards of each batch, read as far as is needed.
        most: Bytes.
    """
    of, left = np.asarray(sizes, np.int64), most
    chosen = dict[int, None]()
    for batch in chain(batches, [np.arange(len(of))] if most >= of.sum() else []):
        for shard in batch.tolist():
            if shard in chosen:
                continue
            left -= int(of[shard])
            if left < 0:
                return list(chosen)
            chosen[shard] = None
        if len(chosen) == len(of):
            break
    return list(chosen)


def plan_fetches(
    sizes: ArrayLike, batches: Sequence[Shards], limit: int, *, ahead: int = 0
) -> list[Fetch]:
    """What one reader's cache fetches, in order, if it is faster than the batches are read.

    Args:
        sizes: int [n], bytes of each shard.
        batches: The shards of each batch.
        limit: Most bytes in the cache.
        ahead: Batches after the one that is read whose shards are fetched while there is room;
            none of them is removed for that.

    Raises:
        DataError: A batch does not fit.
    """
    cache = _Cache(np.asarray(sizes, np.int64), batches, limit, ahead)
    for number in range(len(batches)):
        cache.read(number)
    return cache.fetches


class _Cache:
    """A cache on paper."""

    def __init__(
        self, sizes: NDArray[np.int64], batches: Sequence[Shards], limit: int, ahead: int
    ) -> None:
        self._sizes, self._batches, self._limit, self._ahead = sizes, batches, limit, ahead
        self._is_there = np.zeros(len(sizes), np.bool_)
        self._read = np.zeros(len(sizes), np.int64)
        # the batch that needs each shard next, and after each batch that of its shards
        self._due = np.full(len(sizes), NEVER, np.int64)
        self._following: list[NDArray[np.int64]] = []
        for number in range(len(batches) - 1, -1, -1):
            self._following.append(self._due[batches[number]])
            self._due[batches[number]] = number
        self.fetches: list[Fetch] = []

    def read(self, number: int) -> None:
        """Fetch what a batch needs and what is fetched ahead of it, and read the batch."""
        batch = self._batches[number]
        for shard in batch.tolist():
            if not self._is_there[shard] and not self._fetch(number, shard, 1):
                need = int(self._sizes[batch].sum())
                raise DataError(
                    f"cache_limit: {self._limit} bytes; batch {number} needs {need}; raise it"
                )
        coming = self._batches[number + 1 : number + 1 + self._ahead]
        for shard in (shard for later in coming for shard in later.tolist()):
            if not self._is_there[shard] and not self._fetch(number, shard, self._ahead + 1):
                break
        self._read[batch] = number
        self._due[batch] = self._following.pop()

    def _fetch(self, number: int, shard: int, spared: int) -> bool:
        there = np.flatnonzero(self._is_there)
        excess = int(self._sizes[there].sum() + self._sizes[shard]) - self._limit
        removed = list[int]()
        if excess > 0:
            due = np.where(self._due[there] == NEVER, NEVER, self._due[there] - number)
            for place in removal_order(due, self._read[there], spared).tolist():
                if excess <= 0:
                    break
                removed.append(int(there[place]))
                excess -= int(self._sizes[removed[-1]])
        if excess > 0:
            return False
        self._is_there[removed] = False
        self._is_there[shard] = True
        self.fetches.append(Fetch(number, shard, tuple(removed)))
        return True
