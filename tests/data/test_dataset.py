"""A dataset opened for a tower: the rows of the shards, read in place."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lapilli.data.dataset.dataset import Dataset, open_dataset
from lapilli.data.errors import DataError
from lapilli.data.images.view import prepare
from lapilli.data.shards.manifest import read_manifest
from tests.factories import build_config, build_dataset, make_mixture, make_tokenizer

VIEW, IMAGE_TOKENS = "pad32", 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`root`, `tokenizer` and the dataset `out`, with records that were left out."""
    folder = tmp_path_factory.mktemp("dataset")
    mixture = make_mixture(folder / "root", defects=True)
    build_dataset(mixture, folder / "out", make_tokenizer(folder / "tokenizer"))
    return folder


@pytest.fixture(scope="module")
def dataset(folder: Path) -> Dataset:
    return open_dataset(folder / "out", view=VIEW, image_tokens=IMAGE_TOKENS)


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Any]]:
    """The kept token rows in order, read by pyarrow alone."""
    manifest = read_manifest(folder / "out")
    tables = [pa.ipc.open_file(str(folder / "out" / s.path)).read_all() for s in manifest.tokens]
    selection = pa.ipc.open_file(str(folder / "out" / "selection.arrow")).read_all().to_pylist()
    return [tables[s["token_shard"]].to_pylist()[s["token_row"]] for s in selection]


def test_lengths_count_tokens_as_the_tower_sees_them(
    dataset: Dataset, rows: list[dict[str, Any]]
) -> None:
    assert len(dataset) == len(rows)
    for index, row in enumerate(rows):
        images = row["input_ids"].count(-200)
        assert dataset.num_images[index] == images == len(row["image_ids"])
        assert dataset.has_images[index] == (images > 0)
        assert dataset.lengths[index] == len(row["input_ids"]) + images * (IMAGE_TOKENS - 1)
        assert dataset.num_trained[index] == row["num_trained"]
    assert {0, 1, 2} <= set(dataset.num_images.tolist())


@pytest.mark.parametrize("view", ["pad32", "crop24"])
def test_samples_are_the_rows_and_their_pixels(
    folder: Path, rows: list[dict[str, Any]], view: str
) -> None:
    dataset = open_dataset(folder / "out", view=view, image_tokens=1)
    spec = build_config(make_mixture(folder / "x"), folder, folder / "tokenizer").views[view]
    assert dataset.image_size == spec.size
    for index, row in enumerate(rows):
        sample = dataset.sample(index)
        assert sample.sample_id == row["sample_id"] == dataset.token_row(index)["sample_id"]
        assert sample.input_ids.tolist() == row["input_ids"]
        assert sample.label_spans.reshape(-1).tolist() == row["label_spans"]
        assert sample.pixels.shape == (len(row["image_ids"]), spec.size, spec.size, 3)
        for pixels, image_id in zip(sample.pixels, row["image_ids"], strict=True):
            data = (folder / "root" / image_id).read_bytes()
            np.testing.assert_array_equal(pixels, prepare(data, spec))


def test_one_image_is_read_in_the_memory_map(dataset: Dataset) -> None:
    index = int(np.flatnonzero(dataset.num_images == 1)[0])
    first, second = dataset.sample(index).pixels, dataset.sample(index).pixels
    assert np.shares_memory(first, second)
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0, 0] = 0


def test_what_is_too_long_is_left_out_and_counted(folder: Path, dataset: Dataset) -> None:
    limit = int(np.median(dataset.lengths))
    short = open_dataset(folder / "out", view=VIEW, image_tokens=IMAGE_TOKENS, max_length=limit)
    fits = dataset.lengths <= limit
    assert short.too_long == int((~fits).sum()) > 0
    assert len(short) == int(fits.sum())
    assert short.lengths.tolist() == dataset.lengths[fits].tolist()
    for index, place in enumerate(np.flatnonzero(fits)):
        assert short.sample(index).sample_id == dataset.sample(int(place)).sample_id
    longest = int(dataset.lengths.max())
    all_fit = open_dataset(folder / "out", view=VIEW, image_tokens=IMAGE_TOKENS, max_length=longest)
    assert all_fit.too_long == 0


def test_what_is_too_long_is_cut_behind_its_images_rows(folder: Path, dataset: Dataset) -> None:
    """Against the expanded rows of the whole samples, cut by hand."""
    limit = int(np.sort(dataset.lengths)[len(dataset) // 2])
    cut = open_dataset(
        folder / "out", view=VIEW, image_tokens=IMAGE_TOKENS, max_length=limit, truncate=True
    )
    lost = {*dataset.rows.tolist()} - {*cut.rows.tolist()}
    assert len(lost) == cut.too_long
    assert cut.num_cut == int((dataset.lengths > limit).sum()) - cut.too_long > 0
    whole = {int(row): index for index, row in enumerate(dataset.rows)}
    for index, row in enumerate(cut.rows.tolist()):
        before, after = dataset.sample(whole[row]), cut.sample(index)
        expanded = _expanded(before.input_ids)[:limit]
        assert _expanded(after.input_ids) == expanded
        assert cut.lengths[index] == len(expanded) <= limit
        assert np.array_equal(before.pixels, after.pixels)
        labels = np.zeros(len(before.input_ids), np.bool_)
        for start, end in before.label_spans:
            labels[start:end] = True
        kept = labels[: len(after.input_ids)]
        assert cut.num_trained[index] == kept.sum()
        assert sum(end - start for start, end in after.label_spans) == kept.sum()
    for row in lost:
        assert -200 in _expanded(dataset.sample(whole[row]).input_ids)[limit:]


def _expanded(ids: Any) -> list[int]:
    return [i for one in ids.tolist() for i in [one] * (IMAGE_TOKENS if one == -200 else 1)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"view": "clip"}, r"view: 'clip' is not in .*; expected one of pad32, crop24"),
        ({"image_tokens": 0}, "image_tokens: 0; expected at least 1"),
        ({"max_length": 3}, r"max_length: 3 tokens; the shortest of \d+ samples .* raise it"),
        ({"max_length": 0}, r"max_length: 0 tokens"),
    ],
)
def test_a_wrong_setting_is_named(folder: Path, settings: dict[str, Any], message: str) -> None:
    defaults: dict[str, Any] = {"view": VIEW, "image_tokens": 4}
    with pytest.raises(DataError, match=message):
        open_dataset(folder / "out", **(defaults | settings))


@pytest.mark.parametrize("pattern", ["tokens/*/*.arrow", "images/pad32/00001-*.arrow"])
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_missing_or_cut_shard_is_noticed_when_opening(
    folder: Path, tmp_path: Path, pattern: str, damage: str
) -> None:
    shutil.copytree(folder / "out", tmp_path / "out")
    victim = next((tmp_path / "out").glob(pattern))
    if damage == "gone":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{victim}: missing or cut short; run the same prep"):
        open_dataset(tmp_path / "out", view=VIEW, image_tokens=4)
    if "pad32" in pattern:  # the other view is whole
        assert len(open_dataset(tmp_path / "out", view="crop24", image_tokens=4)) > 0


def test_a_dataset_can_be_moved(folder: Path, dataset: Dataset, tmp_path: Path) -> None:
    shutil.copytree(folder / "out", tmp_path / "moved")
    moved = open_dataset(tmp_path / "moved", view=VIEW, image_tokens=IMAGE_TOKENS)
    for index in range(0, len(dataset), 7):
        one, other = moved.sample(index), dataset.sample(index)
        assert one.sample_id == other.sample_id
        np.testing.assert_array_equal(one.pixels, other.pixels)
