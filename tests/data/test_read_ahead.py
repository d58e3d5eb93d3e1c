"""Shards fetched from a real S3 server ahead of their batches, counted by a proxy before it."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest

from lapilli.data.dataset.cache_room import Announcement, announced, cache_lock, cached_bytes
from lapilli.data.dataset.dataset import Dataset, open_dataset
from lapilli.data.dataset.read_ahead import ReadAhead, fetch_first
from lapilli.data.dataset.shard_cache import Mirror
from lapilli.data.dataset.shard_plan import NEVER, plan_fetches
from lapilli.data.io.atomic import ShardFacts, sha256_file
from tests.data.test_shard_plan import fewest_fetches, oldest_first
from tests.factories import build_dataset, make_mixture, make_tokenizer
from tests.object_store import failing_proxy, serve, use_endpoint

ADDRESS = "s3://datasets/small"
SPAWN = multiprocessing.get_context("spawn")


@dataclass
class Store:
    """A server with a dataset, and what it was asked for."""

    seen: list[str] = field(default_factory=list[str])

    def fetched(self) -> Counter[str]:
        """How often each image shard was read from its beginning."""
        paths = [unquote(call.split()[1].partition("?")[0]) for call in self.seen
                 if call.startswith("GET") and "/images/" in call]  # fmt: skip
        return Counter(path.rpartition("/datasets/small/")[2] for path in paths)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("ahead")
    mixture = make_mixture(folder / "root", images=40)
    build_dataset(
        mixture, folder / "served" / "datasets" / "small", make_tokenizer(folder / "tokenizer")
    )
    store = Store()
    with (
        serve(folder / "served", remembers="1h") as server,
        failing_proxy(server, lambda number: False, seen=store.seen) as (port, _),
        use_endpoint(port),
    ):
        yield store


@pytest.fixture
def store(served: Store) -> Store:
    served.seen.clear()
    return served


def opened(cache: Path, limit: int | None = None) -> Dataset:
    return open_dataset(ADDRESS, view="pad32", image_tokens=4, cache=cache, cache_limit=limit)


def mirror_of(dataset: Dataset) -> Mirror:
    assert dataset.mirror is not None
    return dataset.mirror


def drawn(shards: int, batches: int, each: int) -> list[list[int]]:
    draw = np.random.default_rng(3)
    return [sorted(draw.choice(shards, each, replace=False).tolist()) for _ in range(batches)]


def read_all(
    mirror: Mirror, shards: Sequence[ShardFacts], batches: Sequence[Sequence[int]], *,
    ahead: int, waits: bool = False, kept: Sequence[ShardFacts] = (),
) -> int:  # fmt: skip
    """Read batch after batch; the most bytes that were in the cache."""
    most = 0
    planned = (np.array(batch, np.int64) for batch in batches)
    with ReadAhead(mirror, shards, planned, ahead=ahead, requests=2, kept=kept) as reader:
        for number, batch in enumerate(batches):
            if waits:
                assert reader.wait(20)
            for shard in batch:
                with mirror.held(shards[shard]) as folder:
                    assert (folder / shards[shard].path).stat().st_size == shards[shard].bytes
            most = max(most, cached_bytes(mirror.cache))
            reader.done(number)
    return most


def test_an_epoch_is_fetched_as_often_as_the_best_order_of_removing_needs(
    store: Store, tmp_path: Path
) -> None:
    """And less often than by age. The shards have about one size; all others fit beside them."""
    shards = opened(tmp_path / "looked").facts.shards[:8]
    batches = drawn(8, 24, 2)
    size = max(shard.bytes for shard in shards)
    sizes = [size] * 8
    store.seen.clear()
    dataset = opened(tmp_path / "cache", 4 * size + 2000)
    kept = dataset.manifest.selection
    limit = 4 * size + kept.bytes
    mirror = Mirror(ADDRESS, mirror_of(dataset).cache, mirror_of(dataset).folder, limit)
    assert 5 * min(shard.bytes for shard in shards) > 4 * size  # so that 4 fit, and no 5
    most = read_all(mirror, shards, batches, ahead=0, kept=[kept])
    best = fewest_fetches(batches, 4)
    assert sum(store.fetched().values()) == mirror.counts.misses == best
    assert best < oldest_first(sizes, batches, 4 * size)
    assert most <= limit
    assert mirror.counts.evictions == best - 4


def test_shards_are_there_when_they_are_read(store: Store, tmp_path: Path) -> None:
    dataset = opened(tmp_path)
    mirror, shards = mirror_of(dataset), dataset.facts.shards[:8]
    batches = drawn(8, 12, 2)
    store.seen.clear()
    before = mirror.counts.hits
    read_all(mirror, shards, batches, ahead=2, waits=True)
    assert mirror.counts.misses == 1  # the selection, as the dataset was opened
    assert mirror.counts.hits - before == 24
    named = {shards[shard].path for batch in batches for shard in batch}
    assert mirror.counts.ahead == len(named)
    assert store.fetched() == dict.fromkeys(named, 1)  # nothing is fetched twice that fits


def test_reading_ahead_stays_within_the_limit_and_near_the_plan(
    store: Store, tmp_path: Path
) -> None:
    dataset = opened(tmp_path)
    shards, kept = dataset.facts.shards[:8], dataset.manifest.selection
    size = max(shard.bytes for shard in shards)
    limit = 6 * size + kept.bytes
    mirror = Mirror(ADDRESS, tmp_path, mirror_of(dataset).folder, limit)
    batches = drawn(8, 24, 2)
    planned = plan_fetches([size] * 8, [np.array(one) for one in batches], 6 * size, ahead=1)
    store.seen.clear()
    assert read_all(mirror, shards, batches, ahead=1, waits=True, kept=[kept]) <= limit
    assert mirror.counts.misses == 0
    # a fetch that is asked for after another may be done before it
    assert abs(mirror.counts.ahead - len(planned)) <= 2
    assert sum(store.fetched().values()) == mirror.counts.ahead


def test_a_warm_up_takes_rounds(store: Store, tmp_path: Path) -> None:
    dataset = opened(tmp_path)
    shards = dataset.facts.shards[:6]
    left = fetch_first(mirror_of(dataset), shards, 2, 0.0)
    assert left == list(shards)
    assert fetch_first(mirror_of(dataset), left, 2, 60.0) == []
    store.seen.clear()
    assert fetch_first(mirror_of(dataset), shards, 2, 60.0) == []
    assert store.fetched() == {}


def test_an_announcement_ends_with_its_reader(tmp_path: Path) -> None:
    uses = np.array([3, NEVER, 0], np.int32)
    with (
        Announcement(tmp_path, ["d/a.arrow", "d/b.arrow", "d/c.arrow"]) as one,
        Announcement(tmp_path, ["d/c.arrow", "e/a.arrow"]) as other,
    ):
        one.put(uses)
        other.put(np.array([7, 1], np.int32))
        with cache_lock(tmp_path):
            assert announced(tmp_path) == {"d/a.arrow": 3, "d/c.arrow": 0, "e/a.arrow": 1}
        one.put(np.array([NEVER, NEVER, 9], np.int32))
        with cache_lock(tmp_path):
            assert announced(tmp_path) == {"d/c.arrow": 7, "e/a.arrow": 1}
    with cache_lock(tmp_path):
        assert announced(tmp_path) == {}
    process = SPAWN.Process(target=_announce_for_ever, args=(str(tmp_path),))
    process.start()
    for _ in range(600):
        with cache_lock(tmp_path):
            if announced(tmp_path):
                break
        time.sleep(0.1)
    with cache_lock(tmp_path):
        assert announced(tmp_path) == {"d/a.arrow": 0}
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(20)
    with cache_lock(tmp_path):
        assert announced(tmp_path) == {}
    assert list((tmp_path / ".readers").glob("*.names")) == []


def _announce_for_ever(cache: str) -> None:
    with Announcement(Path(cache), ["d/a.arrow"]) as one:
        one.put(np.zeros(1, np.int32))
        time.sleep(600)


def _read_with_others(cache: str, limit: int, seed: int, batches: int) -> None:
    dataset = opened(Path(cache), limit)
    shards = dataset.facts.shards[:8]
    draw = np.random.default_rng(seed)
    own = [draw.choice(8, 2, replace=False).tolist() for _ in range(batches)]
    read_all(mirror_of(dataset), shards, own, ahead=2, kept=[dataset.manifest.selection])


@pytest.mark.faults
def test_processes_share_a_cache_and_one_that_is_killed_blocks_nobody(
    store: Store, tmp_path: Path
) -> None:
    dataset = opened(tmp_path)
    shards, kept = dataset.facts.shards[:8], dataset.manifest.selection
    limit = 4 * max(shard.bytes for shard in shards) + kept.bytes  # 2 readers' batches
    args: list[tuple[Any, ...]] = [(str(tmp_path), limit, seed, 40) for seed in range(2)]
    endless = SPAWN.Process(target=_read_with_others, args=(str(tmp_path), limit, 9, 10**6))
    others = [SPAWN.Process(target=_read_with_others, args=one) for one in args]
    for process in (endless, *others):
        process.start()
    for _ in itertools.takewhile(lambda _: sum(store.fetched().values()) < 6, range(600)):
        time.sleep(0.05)
    assert endless.pid is not None
    os.kill(endless.pid, signal.SIGKILL)
    for process in others:
        process.join(60)
        assert process.exitcode == 0
    endless.join(10)
    assert cached_bytes(tmp_path) <= limit
    for shard in shards:
        path = mirror_of(dataset).folder / shard.path
        assert not path.exists() or sha256_file(path) == shard.sha256
