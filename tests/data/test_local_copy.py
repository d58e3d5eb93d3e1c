"""Folders and files of a store are brought to this node's disk once, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lapilli.data.errors import DataError
from lapilli.data.io import local_copy as module
from lapilli.data.io.atomic import sha256_file
from lapilli.data.io.local_copy import local_copy
from lapilli.data.text.encode import load_tokenizer, train_tokenizer
from lapilli.data.text.tokenizer_files import tokenizer_folder
from tests.object_store import serve_s3


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder behind `s3://bucket`."""
    store = tmp_path_factory.mktemp("store")
    (store / "bucket").mkdir()
    with serve_s3(store):
        yield store / "bucket"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAPILLI_CACHE", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return tmp_path / "cache"


def filled(folder: Path) -> Path:
    (folder / "below").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "below" / "weights.safetensors").write_bytes(b"\1" * 3000)
    return folder


def test_a_folder_is_brought_once_and_anew_when_it_changes(
    bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = filled(bucket / "model")
    downloads = list[str]()
    whole = module.download

    def counting(remote: module.RemotePath, path: Path) -> None:
        downloads.append(remote.name)
        whole(remote, path)

    monkeypatch.setattr(module, "download", counting)
    first = local_copy("s3://bucket/model", "init_from")
    assert {str(p.relative_to(first)) for p in first.rglob("*") if p.is_file()} == {
        "config.json", "below/weights.safetensors",
    }  # fmt: skip
    facts = json.loads((first.parent / ".copy.json").read_text())
    weights = source / "below" / "weights.safetensors"
    assert facts["model/below/weights.safetensors"]["sha256"] == sha256_file(weights)
    assert local_copy("s3://bucket/model/", "init_from") == first
    assert len(downloads) == 2
    # damaged here: made again
    (first / "config.json").unlink()
    assert (local_copy("s3://bucket/model", "init_from") / "config.json").exists()
    assert len(downloads) == 4
    # changed there: another copy
    weights.write_bytes(b"\2" * 3001)
    second = local_copy("s3://bucket/model", "init_from")
    assert second != first
    assert (second / "below" / "weights.safetensors").read_bytes() == b"\2" * 3001
    assert not list(Path().iterdir())


def test_a_file_alone_and_a_part_of_a_folder(bucket: Path) -> None:
    filled(bucket / "other")
    assert local_copy("s3://bucket/other/config.json", "answers").read_text() == "{}"
    some = local_copy("s3://bucket/other", "tokenizer", lambda name: name == "config.json")
    assert [path.name for path in some.iterdir()] == ["config.json"]


def test_paths_and_names_are_themselves() -> None:
    assert local_copy("lmsys/vicuna-7b-v1.5", "tokenizer") == Path("lmsys/vicuna-7b-v1.5")


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("s3://bucket/nothing", "init_from: s3://bucket/nothing: nothing there"),
        ("https://a.org/model", "init_from: 'https://a.org/model' is on the web"),
        ("nosuch://a/b", "nosuch:// cannot be read"),
    ],
)
def test_what_cannot_be_brought_is_one_line(address: str, said: str, cache: Path) -> None:
    with pytest.raises(DataError) as error:
        local_copy(address, "init_from")
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)
    assert not list(cache.rglob(".copy.json"))


def test_a_cut_download_leaves_nothing(
    bucket: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(bucket / "third")

    def cut(remote: module.RemotePath, path: Path) -> None:
        path.write_bytes(b"1")

    monkeypatch.setattr(module, "download", cut)
    with pytest.raises(DataError, match="changed while it was copied"):
        local_copy("s3://bucket/third", "init_from")
    assert not list(cache.rglob(".copy.json"))


def test_a_tokenizer_is_read_from_a_folder_with_weights(bucket: Path, tmp_path: Path) -> None:
    train_tokenizer(["All of it is red."], tmp_path / "tokenizer", vocab_size=300)
    shutil.copytree(tmp_path / "tokenizer", bucket / "llm")
    (bucket / "llm" / "model.safetensors").write_bytes(b"\0" * 1000)
    loaded = load_tokenizer("s3://bucket/llm")
    assert loaded.name_or_path == "s3://bucket/llm"
    expected = load_tokenizer(tmp_path / "tokenizer")
    assert loaded("All of it is red.")["input_ids"] == expected("All of it is red.")["input_ids"]
    names = {path.name for path in tokenizer_folder("s3://bucket/llm").iterdir()}
    assert "model.safetensors" not in names
    assert "tokenizer.json" in names
