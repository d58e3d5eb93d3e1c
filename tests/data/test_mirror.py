"""Remote shards in a node's cache: a real S3 server, several processes, a kill in the middle."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lapilli.data.dataset import shard_cache as mirror_module
from lapilli.data.dataset.dataset import Dataset, open_dataset
from lapilli.data.dataset.shard_cache import dataset_folder, open_mirror, parse_bytes
from lapilli.data.errors import DataError
from lapilli.data.io.atomic import TEMPORARY, sha256_file
from tests.factories import build_dataset, make_mixture, make_tokenizer
from tests.object_store import serve_s3

ADDRESS = "s3://datasets/made/small"
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder behind `ADDRESS`."""
    folder = tmp_path_factory.mktemp("mirror")
    path = folder / "served" / "datasets" / "made" / "small"
    mixture = make_mixture(folder / "root", images=40)
    build_dataset(mixture, path, make_tokenizer(folder / "tokenizer"))
    with serve_s3(folder / "served"):
        yield path


def opened(path: str | Path, **settings: Any) -> Dataset:
    return open_dataset(path, view="pad32", image_tokens=4, **settings)


def assert_same_samples(one: Dataset, other: Dataset) -> None:
    assert one.lengths.tolist() == other.lengths.tolist()
    for index in range(len(one)):
        a, b = one.sample(index), other.sample(index)
        assert a.sample_id == b.sample_id
        np.testing.assert_array_equal(a.input_ids, b.input_ids)
        np.testing.assert_array_equal(a.pixels, b.pixels)


def cached(cache: Path) -> list[Path]:
    return [file for file in cache.rglob("*.arrow") if not file.name.startswith(".")]


def test_a_dataset_is_read_from_a_bucket_shard_by_shard(remote: Path, tmp_path: Path) -> None:
    dataset = opened(ADDRESS, cache=tmp_path)
    assert [file.name for file in cached(tmp_path)] == ["selection.arrow"]
    dataset.sample(0)
    assert len(cached(tmp_path)) <= 4
    again: Dataset = pickle.loads(pickle.dumps(dataset))
    assert_same_samples(again, opened(remote))
    assert not list(tmp_path.rglob(f"*{TEMPORARY}"))


def test_a_second_process_reads_the_copy_and_not_the_bucket(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened(ADDRESS, cache=tmp_path)
    assert_same_samples(first, opened(remote))
    monkeypatch.setenv("LAPILLI_CACHE", str(tmp_path))
    monkeypatch.setattr(mirror_module.Mirror, "download", None)
    assert_same_samples(opened(ADDRESS), first)


def test_the_cache_keeps_to_its_limit_and_what_is_mapped_stays_readable(
    remote: Path, tmp_path: Path
) -> None:
    limit = 40_000  # two or three of the image shards
    dataset = opened(ADDRESS, cache=tmp_path, cache_limit=limit)
    largest = 0
    local = opened(remote)
    held = [dataset.sample(index) for index in range(len(dataset))]
    for index in range(len(dataset)):
        opened(ADDRESS, cache=tmp_path, cache_limit="40kB").sample(index)
        largest = max(largest, sum(file.stat().st_size for file in cached(tmp_path)))
        np.testing.assert_array_equal(held[index].pixels, local.sample(index).pixels)
    assert 10_000 < largest <= limit
    assert sum(shard.bytes for shard in local.facts.shards) > 2 * limit


def test_a_limit_below_a_shard_is_one_line(remote: Path, tmp_path: Path) -> None:
    largest = max(remote.rglob("*.arrow"), key=lambda path: path.stat().st_size)
    limit = largest.stat().st_size - 1
    with pytest.raises(DataError, match=r"cache_limit: 0\.\d MB; \S+\.arrow alone has"):
        opened(ADDRESS, cache=tmp_path, cache_limit=limit)
    assert cached(tmp_path) == []  # before anything is copied
    with pytest.raises(
        DataError, match="cache_limit: 'much'; expected bytes, or a text like 500GB"
    ):
        opened(ADDRESS, cache=tmp_path, cache_limit="much")
    assert [parse_bytes(text) for text in ("1.5 GB", "2KiB", 7, "7", "1tb")] == [
        1_500_000_000,
        2048,
        7,
        7,
        10**12,
    ]


def test_the_copy_has_settings_and_tokenizer(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAPILLI_CACHE", str(tmp_path))
    folder = dataset_folder(ADDRESS)
    names = [
        "config.json",
        *(f"tokenizer/{path.name}" for path in (remote / "tokenizer").iterdir()),
    ]
    assert [(folder / name).read_bytes() for name in names] == [
        (remote / name).read_bytes() for name in names
    ]
    assert cached(tmp_path) == []


def test_a_shard_damaged_in_the_bucket_is_named(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_module.time, "sleep", lambda seconds: None)
    other = remote.parent / "damaged"
    shutil.copytree(remote, other)
    victim = next(other.glob("images/pad32/00000-*.arrow"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    dataset = opened("s3://datasets/made/damaged", cache=tmp_path)
    with pytest.raises(DataError, match=rf"{victim.name}: damaged there \(its SHA-256"):
        [dataset.sample(index) for index in range(len(dataset))]
    assert not [file for file in cached(tmp_path) if file.name == victim.name]
    victim.write_bytes(data[:-1])
    with pytest.raises(DataError, match=rf"{victim.name}: missing or cut short"):
        opened("s3://datasets/made/damaged", cache=tmp_path)


def test_no_dataset_at_an_address_is_one_line(remote: Path, tmp_path: Path) -> None:
    assert remote.is_dir()
    with pytest.raises(DataError, match="s3://datasets/made/none: no dataset there"):
        opened("s3://datasets/made/none", cache=tmp_path)


def _read_all(cache: str, limit: str | None) -> None:
    dataset = opened(ADDRESS, cache=cache, cache_limit=limit)
    for index in np.random.default_rng(os.getpid()).permutation(len(dataset)):
        dataset.sample(int(index))


def _with_small_files(cache: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))
    with pytest.raises(DataError, match=r"cache: .* has no room for .* free space"):
        _read_all(cache, None)


def _end(*processes: Any) -> None:
    for process in processes:
        process.join(100)
        assert process.exitcode == 0


@pytest.mark.parametrize("limit", [None, "60kB"])
def test_several_processes_at_once_share_a_cache(
    remote: Path, tmp_path: Path, limit: str | None
) -> None:
    processes = [SPAWN.Process(target=_read_all, args=(str(tmp_path), limit)) for _ in range(3)]
    for process in processes:
        process.start()
    _end(*processes)
    facts = {shard.path: shard.sha256 for shard in opened(remote).facts.shards}
    folder = open_mirror(ADDRESS, tmp_path).folder
    found = {file.relative_to(folder).as_posix(): file for file in cached(folder)}
    assert len(found.keys() & facts.keys()) > 1
    for name in found.keys() & facts.keys():
        assert sha256_file(found[name]) == facts[name]
    if limit:
        assert sum(file.stat().st_size for file in found.values()) <= 60_000


def test_a_file_that_cannot_be_written_whole_is_one_line(remote: Path, tmp_path: Path) -> None:
    assert remote.is_dir()
    process = SPAWN.Process(target=_with_small_files, args=(str(tmp_path),))
    process.start()
    _end(process)
    assert not list(tmp_path.rglob(f"*{TEMPORARY}"))


def _die_while_copying(cache: str) -> None:
    """Hold a copy half done until somebody kills this process."""

    def copy_half(mirror: mirror_module.Mirror, shard: Any, temporary: Path) -> str:
        if shard.path == "selection.arrow":
            return download(mirror, shard, temporary)
        temporary.write_bytes(b"half")
        time.sleep(600)
        return ""

    download = mirror_module.Mirror.download
    mirror_module.Mirror.download = copy_half  # type: ignore[method-assign]
    opened(ADDRESS, cache=cache).sample(0)


def test_a_process_killed_while_copying_leaves_nothing_broken(remote: Path, tmp_path: Path) -> None:
    process = SPAWN.Process(target=_die_while_copying, args=(str(tmp_path),))
    process.start()
    for _ in range(600):
        if any(file.read_bytes() == b"half" for file in tmp_path.rglob(f"*{TEMPORARY}")):
            break
        time.sleep(0.1)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(20)
    assert process.exitcode == -signal.SIGKILL
    (left,) = tmp_path.rglob(f"*{TEMPORARY}")
    assert left.read_bytes() == b"half"
    assert_same_samples(opened(ADDRESS, cache=tmp_path), opened(remote))
    assert not list(tmp_path.rglob(f"*{TEMPORARY}"))
