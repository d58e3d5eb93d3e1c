"""A dataset that somebody else made is opened, or one line says why, whatever its files hold."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from fsspec import AbstractFileSystem

from lapilli.data.building.repair import repair_dataset
from lapilli.data.config import MixtureConfig
from lapilli.data.dataset.build_settings import read_build_config
from lapilli.data.dataset.dataset import open_dataset
from lapilli.data.dataset.verify import verify_dataset
from lapilli.data.errors import DataError
from lapilli.data.shards.manifest import read_manifest
from lapilli.data.text.tokenizer_files import load_tokenizer
from lapilli.data.trust import NOTHING
from pipelines.reports.dataset_report import write_dataset_report
from pipelines.reports.describe import describe_dataset
from tests.data.flipped_files import read_all
from tests.factories import build_dataset, make_mixture, make_tokenizer
from tests.hostile import is_one_line, refuses, replaced, vouch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with records of all kinds: quarantined, held out, with images and without."""
    folder = tmp_path_factory.mktemp("whole")
    mixture = make_mixture(folder / "raw", images=6, text_only=2)
    build_dataset(
        mixture,
        folder / "data",
        make_tokenizer(folder / "tokenizer"),
        mixture=MixtureConfig(held_out=2),
    )
    return folder / "data"


@pytest.fixture
def dataset(whole: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(whole, tmp_path / "data"))


def test_any_value_of_the_manifest_may_be_wrong(whole: Path, dataset: Path) -> None:
    config = read_build_config(dataset, NOTHING)
    looks: list[Callable[[], object]] = [
        lambda: read_all(dataset),
        lambda: describe_dataset(dataset),
        lambda: verify_dataset(dataset),
        lambda: write_dataset_report(dataset, config),
    ]
    refused = passed = 0
    for what, changed in replaced((whole / "manifest.json").read_text()):
        (dataset / "manifest.json").write_text(changed)
        if refuses(lambda: read_manifest(dataset), what):
            refused += 1
            continue
        passed += 1  # a name or a count, of which any is as good
        if passed % 8 == 0:
            refuses(looks[passed // 8 % len(looks)], what)
    assert refused > passed


def test_any_value_of_its_settings_may_be_wrong(whole: Path, dataset: Path) -> None:
    refused = 0
    for what, changed in replaced((whole / "config.json").read_text()):
        (dataset / "config.json").write_text(changed)
        refused += refuses(lambda: read_build_config(dataset, NOTHING), what)
    assert refused > 300


def test_flipped_bytes_end_no_process(dataset: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.data.flipped_files", str(dataset), "8"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]  # -11 is a segmentation fault
    refused, read = map(int, done.stdout.split())
    assert refused > 5
    assert read > 5


def rewritten(dataset: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the columns of an Arrow file, and let the manifest say what it is now."""
    with pa.ipc.open_file(str(dataset / name)) as reader:
        table = reader.read_all()
    columns = table.to_pydict()
    change(columns)
    batch = pa.RecordBatch.from_pydict(columns, schema=table.schema)
    (dataset / name).unlink()
    with pa.ipc.new_file(str(dataset / name), table.schema) as writer:
        writer.write_batch(batch)
    vouch(dataset, name)


def put(column: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(columns: dict[str, Any]) -> None:
        columns[column][0] = value

    return change


@pytest.mark.parametrize(
    ("kind", "column", "value", "line"),
    [
        ("selection", "token_shard", 9, "token_shard 9, token_row 0: there is no such row"),
        ("selection", "token_shard", -1, "token_shard -1, token_row"),
        ("selection", "token_row", 10**6, "token_row 1000000: there is no such row"),
        ("selection", "image_slots", [10**6], "there is no such row"),
        ("selection", "image_slots", [-1], "image slot -1"),
        ("selection", "repeats", 2**31 - 1, "an epoch of 2,147,483,"),
        ("selection", "repeats", -1, "repeats -1; expected 0 or more"),
        ("selection", "split", "other", "split 'other'; expected train or held_out"),
        ("selection", "sample_id", None, "column sample_id has nulls"),
        ("tokens", "input_ids", [1, 10**6], "token id 1000000 of a tokenizer with"),
        ("tokens", "input_ids", [-7], "token id -7"),
        ("tokens", "label_spans", [0, 10**6], "a trained span 0 to 1000000"),
        ("tokens", "label_spans", [3, 2], "a trained span 3 to 2"),
        ("tokens", "label_spans", [1], "a trained span without an end"),
        ("tokens", "num_trained", 10**6, "num_trained is not the trained spans' length"),
    ],
)
def test_numbers_that_point_outside_are_one_line(
    dataset: Path, kind: str, column: str, value: Any, line: str
) -> None:
    manifest = read_manifest(dataset)
    name = (manifest.selection if kind == "selection" else manifest.tokens[0]).path
    rewritten(dataset, name, put(column, value))
    with pytest.raises(DataError, match=line) as caught:
        read_all(dataset)
    assert is_one_line(caught.value)


def test_rows_that_are_other_than_the_selection_says_are_one_line(dataset: Path) -> None:
    manifest = read_manifest(dataset)
    rewritten(dataset, manifest.selection.path, put("text_length", 3))
    with pytest.raises(DataError, match="its selection says"):
        read_all(dataset)


def test_an_image_of_another_size_is_one_line(dataset: Path) -> None:
    view = next(iter(read_manifest(dataset).views.values()))
    rewritten(dataset, view.shards[0].path, put("pixels", b"\x00" * 7))
    with pytest.raises(DataError, match="row 0 has 7 bytes and no image of"):
        read_all(dataset)


def test_offsets_beyond_their_buffer_are_one_line(dataset: Path) -> None:
    """What Arrow follows without a look: a segmentation fault, or other data of the process."""
    name = read_manifest(dataset).tokens[0].path
    data = bytearray((dataset / name).read_bytes())
    with pa.ipc.open_file(str(dataset / name)) as reader:
        offsets = reader.read_all()["input_ids"].chunk(0).offsets.to_numpy()
    at = data.index(offsets.tobytes())
    wild = offsets.copy()
    wild[1:] = np.iinfo(np.int32).max
    data[at : at + wild.nbytes] = wild.tobytes()
    (dataset / name).write_bytes(data)
    vouch(dataset, name)
    with pytest.raises(DataError, match=r"damaged \(ArrowInvalid\)"):
        read_all(dataset)


# ---- paths -------------------------------------------------------------------------------------


OUTSIDE = ("../../home/key", "/etc/passwd", "a/../../b", "./x", "", "a//b", "a\\b", "x\x00y", "..")


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("field", ["selection", "tokens", "views", "tokenizer_files", "inputs"])
def test_a_path_of_the_manifest_stays_below_the_dataset(
    dataset: Path, field: str, name: str
) -> None:
    manifest = json.loads((dataset / "manifest.json").read_text())
    value = manifest[field]
    if field == "views":
        value = next(iter(value.values()))["shards"]
    (value[0] if isinstance(value, list) else value)["path"] = name
    (dataset / "manifest.json").write_text(json.dumps(manifest))
    for look in (read_manifest, verify_dataset, describe_dataset):
        with pytest.raises(DataError, match="expected a path below the folder") as caught:
            look(dataset)
        assert is_one_line(caught.value)


def test_a_store_writes_nothing_outside_of_the_cache(dataset: Path, tmp_path: Path) -> None:
    store: dict[str, bytes] = {}

    base: Any = AbstractFileSystem

    class Store(base):
        """Keys are any text, as an object store's are."""

        protocol = "planted"

        def cat_file(self, path: str, **options: Any) -> bytes:
            return store[path]

        def find(self, path: str, **options: Any) -> dict[str, Any]:
            return {n: {"name": n, "size": len(d), "type": "file"} for n, d in store.items()}

        def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
            return io.BytesIO(store[path])

    fsspec.register_implementation("planted", Store, clobber=True)
    manifest = json.loads((dataset / "manifest.json").read_text())
    data, name = b"ssh-rsa somebody", "../../home/authorized_keys"
    facts = {"path": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["selection"] |= facts
    view = next(iter(manifest["views"]))
    for shard in [*manifest["tokens"], *manifest["views"][view]["shards"]]:
        store[f"bucket/ds/{shard['path']}"] = (dataset / shard["path"]).read_bytes()
    store |= {"bucket/ds/manifest.json": json.dumps(manifest).encode(), f"bucket/ds/{name}": data}
    cache = tmp_path / "deep" / "cache"
    with pytest.raises(DataError, match="authorized_keys'; expected a path below"):
        open_dataset("planted://bucket/ds", view=view, image_tokens=4, cache=cache)
    assert not (tmp_path / "deep" / "home").exists()


def test_a_repair_writes_through_no_link(dataset: Path, tmp_path: Path) -> None:
    shard = next(iter(read_manifest(dataset).views.values())).shards[0]
    folder = (dataset / shard.path).parent
    elsewhere = tmp_path / "elsewhere"
    shutil.move(folder, elsewhere)
    folder.symlink_to(elsewhere)
    (elsewhere / Path(shard.path).name).unlink()
    before = sorted(elsewhere.iterdir())
    with pytest.raises(DataError, match="leads out of the dataset"):
        repair_dataset(dataset, read_build_config(dataset, NOTHING))
    assert sorted(elsewhere.iterdir()) == before


# ---- tokenizers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["{}", "[]", "null", '{"model": {}}', '{"model": null}', "[" * 9999]
)
def test_a_tokenizers_file_that_is_none_is_one_line(dataset: Path, text: str) -> None:
    (dataset / "tokenizer" / "tokenizer.json").write_text(text)
    vouch(dataset, "tokenizer/tokenizer.json")
    with pytest.raises(DataError, match="tokenizer") as caught:
        load_tokenizer(dataset / "tokenizer")
    assert is_one_line(caught.value)
    view = next(iter(read_manifest(dataset).views))
    with pytest.raises(DataError, match="tokenizer"):
        _ = open_dataset(dataset, view=view, image_tokens=4).tokenizer
