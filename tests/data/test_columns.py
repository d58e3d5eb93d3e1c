"""Columns in files are those in memory, whoever makes them and whatever is in their way."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lapilli.data import DataError, Dataset, open_dataset
from lapilli.data.dataset import columns, sample_shards
from lapilli.data.dataset import dataset as dataset_module
from lapilli.data.dataset.columns import Columns, columns_of
from lapilli.data.dataset.sample_shards import sample_blocks, shards_of
from pipelines.benchmarks.material.large import write_large
from tests.object_store import serve_s3

RECORDS = 10_000  # in two token shards
FIELDS = ("rows", "lengths", "num_trained", "num_images", "has_images", "llava_lengths")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("columns") / "served" / "datasets"
    folder.mkdir(parents=True)
    return write_large(folder / "large", records=RECORDS, size=8, shards=3, per_shard=40)


@pytest.fixture
def in_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Columns of any size lie in files here, made in pieces of 1,000 rows."""
    monkeypatch.setenv("LAPILLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(columns, "IN_MEMORY", 0)
    monkeypatch.setattr(dataset_module, "AT_ONCE", 1000)
    return tmp_path / "cache" / "columns"


def opened(path: Path | str, **settings: Any) -> Dataset:
    return open_dataset(path, view="wide", image_tokens=576, **settings)


def assert_same(one: Dataset, other: Dataset) -> None:
    for name in FIELDS:
        found, expected = getattr(one, name), getattr(other, name)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    assert (one.too_long, one.num_cut) == (other.too_long, other.num_cut)
    for index in range(0, len(one), 500):
        np.testing.assert_array_equal(one.sample(index).input_ids, other.sample(index).input_ids)


SETTINGS: list[dict[str, Any]] = [{}, {"max_length": 900}, {"max_length": 900, "truncate": True}]


@pytest.mark.parametrize("settings", SETTINGS, ids=["all", "left out", "cut"])
def test_files_hold_what_memory_holds(
    path: Path, in_files: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    made = opened(path, **settings)
    assert len([*in_files.glob("*/columns.json")]) == 1
    monkeypatch.setattr(dataset_module, "_pieces", None)  # whoever comes later makes nothing
    mapped = opened(path, **settings)
    monkeypatch.undo()
    in_memory = opened(path, **settings)
    for found in (made, mapped, pickle.loads(pickle.dumps(mapped))):
        assert_same(found, in_memory)
    with pytest.raises(ValueError, match="read-only"):
        mapped.lengths[0] = 0


def test_other_settings_and_another_selection_have_files_of_their_own(
    path: Path, in_files: Path
) -> None:
    for settings in SETTINGS:
        opened(path, **settings)
    with pytest.raises(DataError, match="holds nothing out"):
        opened(path, split="held_out")
    with pytest.raises(DataError, match=r"max_length: 3 tokens; the shortest of 10000 .* has \d+;"):
        opened(path, max_length=3)
    before = len([*in_files.glob("*/columns.json")])
    selection = path / "selection.arrow"
    os.utime(selection, ns=(0, selection.stat().st_mtime_ns + 1))
    opened(path)
    assert len([*in_files.glob("*/columns.json")]) == before + 1


@pytest.mark.parametrize("name", ["lengths", "columns.json"])
def test_files_cut_short_are_made_again(path: Path, in_files: Path, name: str) -> None:
    expected = opened(path).lengths.copy()
    (file,) = in_files.glob(f"*/{name}")
    file.write_bytes(file.read_bytes()[:-3])
    np.testing.assert_array_equal(opened(path).lengths, expected)


def test_what_is_mapped_stays_when_the_files_are_removed(path: Path, in_files: Path) -> None:
    dataset = opened(path)
    expected = dataset.lengths.copy()
    for file in in_files.glob("*/*"):
        file.unlink()
    np.testing.assert_array_equal(dataset.lengths, expected)


def test_a_cache_that_cannot_be_written_is_told_and_memory_holds_them(
    path: Path, in_files: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LAPILLI_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"cache: .*file/columns.*: set LAPILLI_CACHE to a folder"):
        dataset = opened(path)
    assert len(dataset) == RECORDS


def test_a_full_disk_is_told_and_leaves_nothing(
    tiny_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "IN_MEMORY", 0)
    numbers = np.arange(1_000_000)
    piece = Columns(rows=numbers, lengths=numbers, num_trained=numbers, num_images=numbers)
    with pytest.warns(UserWarning, match="cannot be written .No space left on device.; each"):
        found = columns_of(lambda: [piece], 10**6, tiny_disk / "columns", "one")
    np.testing.assert_array_equal(found.lengths, numbers)
    assert not [one for one in (tiny_disk / "columns").iterdir() if one.is_dir()]


# ---- blocks and shards ---------------------------------------------------------------------------


def test_blocks_are_the_samples_of_token_shards(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_shards, "AT_ONCE", 700)
    assert sample_blocks(opened(path)).tolist() == [0, 8192, RECORDS]
    dataset = opened(path, max_length=900)
    first, last = (dataset.rows < 8192).sum(), len(dataset)
    assert sample_blocks(dataset).tolist() == [0, first, last]


def test_short_runs_stay_with_the_next(path: Path) -> None:
    dataset = opened(path)
    mixed = np.arange(RECORDS)
    mixed[1000:1050] = np.arange(9950, 10_000)  # of the second shard, among the first's
    mixed[9950:] = np.arange(1000, 1050)
    blocks = sample_blocks(replace(dataset, rows=mixed))
    assert blocks[[0, -1]].tolist() == [0, RECORDS]
    assert np.diff(blocks).min() >= RECORDS // 8


def test_shards_of_a_batch_are_those_its_samples_are_read_from(path: Path) -> None:
    dataset = opened(path)
    ids = np.array([5, -1, 9999, 17, 7])
    images = {
        slot // dataset.facts.images_per_shard
        for one in ids[ids >= 0]
        for slot in dataset.image_slots(int(one)).tolist()
    }
    expected = [f.path for f in dataset.manifest.tokens]
    expected += [dataset.facts.shards[number].path for number in sorted(images)]
    assert [facts.path for facts in shards_of(dataset, ids)] == expected
    assert [f.path for f in shards_of(dataset, np.array([7]))] == [dataset.manifest.tokens[0].path]


def test_a_remote_datasets_files_lie_beside_its_copies(
    path: Path, in_files: Path, tmp_path: Path
) -> None:
    with serve_s3(path.parents[1]):
        for _ in range(2):
            found = opened("s3://datasets/large", cache=tmp_path / "mirror")
            assert_same(found, opened(path))
    assert len([*(tmp_path / "mirror").glob("*/columns/*/columns.json")]) == 1
