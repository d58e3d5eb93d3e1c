"""Fetch the shards of batches to come while others are read, in background threads.

What is fetched and removed follows from the batches alone (`shard_plan.py`). Reading never depends
on it: a shard that is not there when it is read is copied then, and what cannot be fetched ahead is
an error only of whoever reads it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapilli.data.dataset.cache_room import Announcement
from lapilli.data.dataset.shard_cache import Mirror
from lapilli.data.dataset.shard_plan import next_uses
from lapilli.data.errors import DataError
from lapilli.data.io.atomic import ShardFacts

__all__ = ["HORIZON", "ReadAhead", "fetch_first"]

HORIZON = 2048
PLANNED = 32  # batches that are planned at once
LOOK = 0.5  # seconds between two looks for room that another process made

Batch = NDArray[np.integer[Any]]


class ReadAhead:
    """Fetches shards before their batch is read, and tells the cache when each is needed next.

    A context: its threads end with it.

    Args:
        mirror: The dataset's cache.
        shards: Its shards.
        batches: Of each batch to come, the numbers of its shards; read ahead in a thread.
        ahead: Batches after the one that is read whose shards are fetched.
        requests: Shards copied at a time.
        kept: Shards that are always needed.
        horizon: Batches to come that are planned; what is needed after them is needed never.
    """

    def __init__(
        self,
        mirror: Mirror,
        shards: Sequence[ShardFacts],
        batches: Iterator[Batch],
        *,
        ahead: int,
        requests: int,
        kept: Sequence[ShardFacts] = (),
        horizon: int = HORIZON,
    ) -> None:
        self._mirror, self._shards, self._kept = mirror, shards, len(kept)
        self._batches, self._ahead, self._requests = batches, ahead, requests
        self._coming: deque[Batch] = deque()
        self._horizon = horizon
        self._first = 0  # the batch that is not read yet, counted from the first of all
        self._read = set[int]()  # of later ones
        self._there, self._busy, self._later = set[int](), set[int](), set[int]()
        self._changed = threading.Condition()
        self._telling = threading.Lock()  # held while progress is made and announced
        self._version, self._ended = 0, False
        names = [f"{mirror.folder.name}/{one.path}" for one in (*shards, *kept)]
        self._announcement = Announcement(mirror.cache, names)
        self._thread = threading.Thread(target=self._run, name="read ahead", daemon=True)
        self._pool = ThreadPoolExecutor(max(1, requests), thread_name_prefix="fetch")

    def __enter__(self) -> ReadAhead:
        self._announcement.__enter__()
        self._extend()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._ended = True
        self._notify()
        self._pool.shutdown(cancel_futures=True)
        self._thread.join()
        self._announcement.__exit__(kind, error, trace)

    def done(self, number: int) -> None:
        """A batch has been read, counted from the first of `batches`; in any order."""
        with self._telling:
            with self._changed:
                self._read.add(number)
            self._advance([])

    def wait(self, seconds: float) -> bool:
        """Wait until the shards of the batches to be fetched ahead are there; whether they are."""
        if not self._ahead:
            return True
        with self._changed:
            return self._changed.wait_for(lambda: not self._wanted() and not self._busy, seconds)

    def _advance(self, more: Sequence[Batch]) -> None:
        """Add batches to come, leave those behind that are read, and announce what is needed."""
        with self._changed:
            self._coming += more
            while self._coming and self._first in self._read:
                self._read.discard(self._first)
                self._coming.popleft()
                self._first += 1
            self._there &= {*self._window()}
            self._later.clear()
            uses = next_uses(self._coming, len(self._shards))
        self._announcement.put(np.concatenate([uses, np.zeros(self._kept, np.int32)]))
        self._notify()

    def _window(self) -> dict[int, None]:
        """Shards of the batches to be fetched, those needed first before the others."""
        coming = islice(self._coming, self._ahead + 1)
        return dict.fromkeys(shard for batch in coming for shard in batch.tolist())

    def _wanted(self) -> list[int]:
        known = self._there | self._busy | self._later
        return [shard for shard in self._window() if shard not in known]

    def _extend(self) -> bool:
        """Plan some more batches; whether there are more to plan."""
        with self._changed:
            count = min(PLANNED, self._horizon - len(self._coming))
        if more := list(islice(self._batches, max(0, count))):
            with self._telling:
                self._advance(more)
        return len(more) == PLANNED

    def _run(self) -> None:
        while not self._ended:
            grows = self._extend()
            with self._telling, self._changed:
                seen, chosen = self._version, self._choose()
            if chosen or grows:
                continue
            with self._changed:
                if not self._changed.wait_for(lambda now=seen: self._version != now, LOOK):
                    self._later.clear()  # another process may have made room

    def _choose(self) -> list[int]:
        """Begin to fetch as many as may be."""
        free = self._requests - len(self._busy)
        chosen = self._wanted()[:free] if self._ahead and not self._ended else []
        for shard in chosen:
            self._busy.add(shard)
            try:
                self._pool.submit(self._fetch, shard)
            except RuntimeError:  # the process ends
                self._ended = True
        return chosen

    def _fetch(self, shard: int) -> None:
        is_there = True
        try:
            is_there = self._mirror.fetch(self._shards[shard], self._ahead + 1)
        except (DataError, OSError):
            pass  # whoever reads it meets the same error, and says it
        finally:
            with self._changed:
                self._busy.discard(shard)
                (self._there if is_there else self._later).add(shard)
            self._notify()

    def _notify(self) -> None:
        with self._changed:
            self._version += 1
            self._changed.notify_all()


def fetch_first(
    mirror: Mirror, shards: Sequence[ShardFacts], requests: int, seconds: float
) -> list[ShardFacts]:
    """Fetch shards for some seconds, in order; what is left of them.

    Args:
        mirror: The dataset's cache.
        shards: Its shards.
        requests: Shards copied at a time.
        seconds: When these are over, no other shard is begun.

    Raises:
        DataError: One cannot be read, or the disk is full.
    """
    end = time.monotonic() + seconds
    left = deque([shard for shard in shards if not mirror.has(shard)])
    undone = list[ShardFacts]()
    choosing = threading.Lock()

    def work() -> None:
        while time.monotonic() < end:
            with choosing:
                if not left:
                    return
                shard = left.popleft()
            if not mirror.fetch(shard, 0):
                undone.append(shard)
                time.sleep(LOOK / 10)

    with ThreadPoolExecutor(requests, thread_name_prefix="fetch") as pool:
        for one in [pool.submit(work) for _ in range(requests)]:
            one.result()
    return [*undone, *left]
