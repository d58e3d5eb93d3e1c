"""A run on a dataset in a bucket with a cache smaller than it: the same losses, and what cannot be.

The server is a real one; that workers of a node share a cache is tested with two feeds of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lapilli.data.dataset import shard_cache
from lapilli.data.dataset.cache_room import cached_bytes
from lapilli.data.dataset.dataset import Dataset, open_dataset
from lapilli.data.dataset.shard_cache import dataset_folder
from lapilli.data.errors import DataError
from lapilli.train.config import CacheConfig, CheckpointConfig, RunConfig
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.dataset_files import read_data, training_data
from lapilli.train.run_folder.restarts import read_starts
from lapilli.train.run_folder.settings import write_run_config
from lapilli.train.steps.feed import Feed, StepBatches
from lapilli.train.worker import node_cache
from lapilli.train.worker.node_cache import prepare_cache
from pipelines.train import train
from tests.object_store import failing_proxy, serve, use_endpoint
from tests.train.small_run import VIEW, small_dataset, small_run

DATA = "s3://bucket/small"


@dataclass
class Store:
    """The dataset on a disk and the calls that were made for the one in the bucket."""

    local: Path
    seen: list[str]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder, seen = tmp_path_factory.mktemp("node"), list[str]()
    local = small_dataset(folder / "made", images=60, text_only=8)
    shutil.copytree(local, folder / "store" / "bucket" / "small")
    with (
        serve(folder / "store", remembers="1h") as server,
        failing_proxy(server, lambda number: False, seen=seen) as (port, _),
        use_endpoint(port),
    ):
        yield Store(local, seen)


def config_of(dataset: str, output: Path, cache: CacheConfig, **values: Any) -> RunConfig:
    config = small_run(
        Path("d"), output, num_workers=1, launcher="process", global_batch_size=4,
        max_steps=6, checkpoint=CheckpointConfig(every=2), **values,
    )  # fmt: skip
    return replace(config, dataset=dataset, cache=cache)


def opened(cache: CacheConfig) -> Dataset:
    return open_dataset(
        DATA, view=VIEW, image_tokens=4, cache=cache.folder, cache_limit=cache.limit
    )


def feed_of(cache: CacheConfig, rank: int = 0, workers: int = 1) -> Feed:
    config = replace(config_of(DATA, Path("unused"), cache), launcher="ray", num_workers=workers)
    return Feed(opened(cache), config, rank=rank, world_size=workers)


def least_limit(folder: Path) -> int:
    """What the line says that one more byte than too few is."""
    with pytest.raises(
        TrainError, match=r"cache\.limit: .* for a node's workers \(rank 0\)"
    ) as said:
        prepare_cache(feed_of(CacheConfig(folder=str(folder), limit="30000")), 0)
    return int(str(said.value).partition("set at least ")[2].split()[0])


def test_a_limit_below_a_batch_says_what_it_needs(store: Store, tmp_path: Path) -> None:
    least = least_limit(tmp_path)
    shards = opened(CacheConfig(folder=str(tmp_path))).facts.shards
    assert 30_000 < least < sum(shard.bytes for shard in shards)
    prepare_cache(feed_of(CacheConfig(folder=str(tmp_path), limit=str(least))), 0)
    with pytest.raises(TrainError, match=r"cache\.limit: .*; step \d+ reads .* set at least"):
        prepare_cache(feed_of(CacheConfig(folder=str(tmp_path), limit=str(least - 1))), 0)


def test_a_run_with_a_small_cache_is_a_local_one_and_goes_on(
    store: Store,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LAPILLI_CACHE", str(tmp_path / "another"))
    cache = CacheConfig(folder=str(tmp_path / "cache"))
    cache = replace(cache, limit=str(least_limit(tmp_path / "cache")), warm_up="20kB")
    expected = [row.loss for row in train(config_of(str(store.local), tmp_path / "local", cache))]
    capsys.readouterr()
    remote = config_of(DATA, tmp_path / "run", cache)
    assert [row.loss for row in train(remote)] == expected
    said = capsys.readouterr().out
    assert "of shards are there, before the first step" in said
    assert "of them before they were read" in said
    assert cached_bytes(tmp_path / "cache") <= int(cache.limit)
    # again from the middle of an epoch, on another machine
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    shutil.rmtree(checkpoints[-1])
    shutil.rmtree(tmp_path / "cache")
    assert [row.loss for row in train(remote)] == expected
    steps = [start.step for start in read_starts(tmp_path / "run")]
    assert steps == [0, 4]
    assert not (tmp_path / "another").exists()  # preflight, worker and report take the setting
    assert not [*(tmp_path / "cache" / ".readers").iterdir()]


def arrays(step: StepBatches) -> list[Any]:
    return [(batch.sample_ids, np.asarray(batch.pixels).tolist()) for batch in step.batches]


def test_two_workers_of_a_node_share_a_cache(store: Store, tmp_path: Path) -> None:
    limit = least_limit(tmp_path) + 30_000
    cache = CacheConfig(folder=str(tmp_path), limit=str(limit), read_ahead=1)
    feeds = [feed_of(cache, rank, 2) for rank in range(2)]
    local = open_dataset(store.local, view=VIEW, image_tokens=4)
    alone = [Feed(local, feeds[0].config, rank=rank, world_size=2) for rank in range(2)]
    for step, made in enumerate(zip(*(feed.steps(3) for feed in feeds), strict=True), 3):
        for rank, one in enumerate(made):
            assert arrays(one) == arrays(alone[rank].make(step))
        assert cached_bytes(tmp_path) <= limit
    counts = [feed.dataset.mirror.counts for feed in feeds if feed.dataset.mirror]
    assert sum(one.ahead for one in counts) > sum(one.misses for one in counts)
    assert sum(one.evictions for one in counts) > 0


def test_a_warm_up_of_all_leaves_nothing_to_fetch(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = list[str]()
    monkeypatch.setattr(node_cache, "note", lambda run, line: notes.append(line))
    feed = feed_of(CacheConfig(folder=str(tmp_path), warm_up="all"))
    prepare_cache(feed, 0)
    assert "of shards are there, before the first step" in notes[-1]
    store.seen.clear()
    for _ in feed.steps(0):
        pass
    assert [call for call in store.seen if "/small/images/" in call or "/tokens/" in call] == []
    assert feed.dataset.mirror is not None
    assert feed.dataset.mirror.counts.evictions == 0


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"limit": "much"}, r"cache\.limit: 'much'; expected bytes, or a text like 500GB"),
        ({"warm_up": "some"}, r"cache\.warm_up: 'some'; expected bytes like 100GB, a share"),
        ({"warm_up": "101%"}, r"cache\.warm_up: '101%'; expected"),
        ({"warm_up": "2GB", "limit": "1GB"}, r"cache\.warm_up: 2GB is more than cache\.limit 1GB"),
        ({"read_ahead": -1}, r"cache\.read_ahead: -1; expected 0 or more"),
        ({"requests": 0}, r"cache\.requests: 0; expected at least 1"),
    ],
)
def test_settings_that_are_none(values: dict[str, Any], said: str) -> None:
    with pytest.raises(TrainError, match=said):
        CacheConfig(**values)


def test_a_warm_up_that_the_limit_does_not_hold(store: Store, tmp_path: Path) -> None:
    limit = str(least_limit(tmp_path))
    with pytest.raises(TrainError, match=r"cache\.warm_up: all is .* more than cache\.limit"):
        prepare_cache(feed_of(CacheConfig(str(tmp_path), limit, "all")), 0)


@pytest.mark.parametrize("limit", ["", "the least"])
def test_a_disk_that_is_too_small(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    limit = limit and str(least_limit(tmp_path))
    feed = feed_of(CacheConfig(folder=str(tmp_path), limit=limit))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(node_cache.shutil, "disk_usage", lambda path: usage._replace(free=20_000))
    name = "limit" if limit else "folder"
    with pytest.raises(TrainError, match=rf"cache\.{name}: .* has 20\.0 kB free .* set a cache"):
        prepare_cache(feed, 0)


def test_a_folder_that_cannot_be_written(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DataError, match=r"file/cache/\S+: cannot be written .* choose another cache"
    ):
        opened(CacheConfig(folder=str(tmp_path / "file" / "cache")))


def test_readers_of_a_dataset_use_the_copy_of_its_tokenizer(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it is there, nobody reads the bucket for it."""
    folder = dataset_folder(DATA, tmp_path)
    dataset = opened(CacheConfig(folder=str(tmp_path)))
    monkeypatch.setattr(shard_cache.Mirror, "download", None)
    assert len(dataset.tokenizer) > 0
    assert (folder / "config.json").is_file()
    # a run that keeps nothing of its dataset
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setenv("LAPILLI_CACHE", str(tmp_path))
    write_run_config(run, config_of(DATA, run, CacheConfig()))
    assert read_data(run, training_data(dataset)).tokenizer.vocab == dataset.tokenizer.vocab
