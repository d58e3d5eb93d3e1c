"""A node's cache of a remote dataset: checked and warmed up before the first step.

The workers of a node share one cache. What one of them finds wrong all of them say, as they wait
for each other.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from lapilli.data.dataset.cache_room import cached_bytes
from lapilli.data.dataset.read_ahead import fetch_first
from lapilli.data.dataset.shard_cache import CacheCounts, Mirror
from lapilli.data.dataset.shard_plan import largest_batch, warm_order
from lapilli.data.io.printable import bytes_text
from lapilli.train.checkpoint.places import find_places
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.messages import note
from lapilli.train.steps.feed import Feed

__all__ = ["cache_line", "prepare_cache"]

ROUND = 20.0  # seconds between two lines of a warm-up; no worker waits longer for another


def prepare_cache(feed: Feed, start: int) -> None:
    """Check the cache of a dataset at an address, and warm it up. Collective.

    Args:
        feed: The worker's; its share of the node's requests is set.
        start: The first step.

    Raises:
        DataError: A shard cannot be read.
        TrainError: The limit, or the disk, is too small for some node.
    """
    mirror = feed.dataset.mirror
    if mirror is None or start >= feed.total_steps:
        return
    ranks = _ranks_here(mirror.cache, feed.rank)
    feed.requests = max(1, feed.config.cache.requests // len(ranks))
    node = _Node(feed, mirror, ranks, start)
    wrong = [line for line in _gathered(node.why_wrong()) if line]
    if wrong:
        raise TrainError(wrong[0])
    if feed.config.cache.warm_up_bytes(node.total):
        node.warm_up()


def cache_line(feed: Feed) -> str:
    """What the caches of all nodes have done, in words; empty without one. Collective."""
    mirror = feed.dataset.mirror
    if mirror is None:
        return ""
    told = _gathered(asdict(mirror.counts))
    total = CacheCounts(**{name: sum(one[name] for one in told) for name in told[0]})
    reads, copies = total.hits + total.misses, total.ahead + total.misses
    return (
        f"cache: {total.hits / max(1, reads):.1%} of {reads:,} reads found their shard there and "
        f"waited {total.wait_seconds:.1f} s; {copies:,} shards copied ({bytes_text(total.bytes)}), "
        f"{total.ahead:,} of them before they were read; {total.evictions:,} removed"
    )


class _Node:
    """The workers that share a cache, and what they read."""

    def __init__(self, feed: Feed, mirror: Mirror, ranks: Sequence[int], start: int) -> None:
        self._feed, self._mirror, self._ranks, self._start = feed, mirror, ranks, start
        self._shards = feed.shards.all
        self._sizes = np.array([shard.bytes for shard in self._shards], np.int64)
        self._kept = feed.dataset.manifest.selection.bytes
        self.total = int(self._sizes.sum()) + self._kept

    def _batches(self) -> Iterator[NDArray[np.int64]]:
        """The shards of each step of the first epoch to come, of all workers here."""
        end = min(self._feed.total_steps, self._start + self._feed.plans.first.num_steps)
        return (self._feed.shards_of(step, self._ranks) for step in range(self._start, end))

    def why_wrong(self) -> str:
        """What does not fit, in a line; empty where all does."""
        return self._limit_line() or self._disk_line()

    def _limit_line(self) -> str:
        limit, warm_up = self._mirror.limit, self._feed.config.cache.warm_up
        if limit is None or limit >= self.total:
            return ""
        number, most = largest_batch(self._sizes, self._batches())
        need = most + self._kept
        if need > limit:
            return (
                f"cache.limit: {bytes_text(limit)}; step {self._start + number + 1} reads "
                f"{bytes_text(need)} of shards for a node's workers (rank "
                f"{', '.join(map(str, self._ranks))}); set at least {need} bytes, or a smaller "
                "global_batch_size"
            )
        wanted = self._feed.config.cache.warm_up_bytes(self.total)
        if wanted + self._kept > limit:
            return (
                f"cache.warm_up: {warm_up} is {bytes_text(wanted)}, more than cache.limit "
                f"{bytes_text(limit)} holds; lower it, or raise the limit"
            )
        return ""

    def _disk_line(self) -> str:
        cache, limit = self._mirror.cache, self._mirror.limit
        free, copies = shutil.disk_usage(cache).free, cached_bytes(cache)
        wanted = self.total if limit is None else min(limit, self.total)
        if wanted <= free + copies:
            return ""
        if limit is None:  # a short run may not read them all
            read = np.unique(np.concatenate([*self._batches()]))
            wanted = int(self._sizes[read].sum()) + self._kept
            if wanted <= free + copies:
                return ""
        name = "cache.folder" if limit is None else "cache.limit"
        return (
            f"{name}: {cache} has {bytes_text(free)} free beside {bytes_text(copies)} of copies, "
            f"and {bytes_text(wanted)} of shards are to be kept there; set a cache.limit of at "
            f"most {free + copies} bytes, or another cache.folder"
        )

    def warm_up(self) -> None:
        """Fetch the node's first shards, each worker its share; a line now and then. Collective."""
        most = self._feed.config.cache.warm_up_bytes(self.total)
        order = warm_order(self._sizes, self._batches(), most)
        mine = order[self._ranks.index(self._feed.rank) :: len(self._ranks)]
        left = [self._shards[number] for number in mine]
        size = sum(shard.bytes for shard in left)
        while True:
            left = fetch_first(self._mirror, left, self._feed.requests, ROUND)
            told = _gathered((size - sum(shard.bytes for shard in left), size))
            done, wanted = (sum(one[place] for one in told) for place in (0, 1))
            if self._feed.rank == 0:
                note(
                    Path(self._feed.config.output),
                    f"cache: {bytes_text(done)} of {bytes_text(wanted)} of shards are there, "
                    "before the first step",
                )
            if done == wanted:
                return


def _ranks_here(cache: Path, rank: int) -> list[int]:
    """The workers that see the same cache. Collective."""
    leaders = _gathered(find_places(cache).leader)
    return [one for one, leader in enumerate(leaders) if leader == leaders[rank]]


def _gathered(value: Any) -> list[Any]:
    """What each worker says, by rank. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
