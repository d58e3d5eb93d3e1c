"""A tokenizer's folder as people have it: packed files, pointers, pages, files cut short."""

from __future__ import annotations

import gzip
import lzma
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from lapilli.data.errors import DataError
from lapilli.data.text.encode import load_tokenizer
from lapilli.data.text.tokenizer import check_agreement, tokenizer_facts
from tests.factories import make_tokenizer

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 499723\n"
TIKTOKEN = b"IQ== 0\nIg== 1\nIw== 2\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "tok"))


def refused(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("content", [LFS, b"", b"<html>", TIKTOKEN, b"\n\x07cut short"])
def test_a_foreign_model_file_beside_a_good_json_is_left_aside(
    whole: Path, folder: Path, content: bytes
) -> None:
    (folder / "tokenizer.model").write_bytes(content)
    tokenizer = load_tokenizer(folder)
    with pytest.warns(UserWarning, match=r"tokenizer\.model is left aside, no id is compared"):
        check_agreement(tokenizer)
    expected = tokenizer_facts(load_tokenizer(whole)).fingerprint
    assert tokenizer_facts(tokenizer).fingerprint == expected


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", LFS, "a Git LFS pointer, not the file: fetch the file with `git lfs"),
        ("tokenizer.json", b"", "an empty file"),
        ("tokenizer.json", b"<!doctype html><html>", "a web page"),
        ("tokenizer.json", b'{"a": 1}', "holds no `model`"),
        ("tokenizer.json", None, "is cut short or damaged"),
        ("tokenizer_config.json", LFS, "a Git LFS pointer"),
        ("tokenizer_config.json", b'{"bos_token": ', "is cut short or damaged"),
    ],
)
def test_the_file_that_is_wrong_is_named(
    folder: Path, name: str, content: bytes | None, words: str
) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    line = refused(folder)
    assert f"{folder / name}" in line
    assert words in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LFS, "a Git LFS pointer"),
        (TIKTOKEN, "a tiktoken file"),
        (b"", "an empty file"),
        (b"\n\x07cut short", "no whole SentencePiece model"),
    ],
)
def test_a_model_file_alone_that_is_wrong_is_named(
    folder: Path, content: bytes, words: str
) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (folder / "tokenizer.model").write_bytes(content)
    line = refused(folder)
    assert f"{folder / 'tokenizer.model'}" in line
    assert words in line


@pytest.mark.parametrize("ranks", [b"IQ== 0\nIg== 2\n", b"IQ== 0\nIg== 1\nIw==", LFS])
def test_ranks_that_are_cut_short_are_named(folder: Path, ranks: bytes) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "qwen.tiktoken").write_bytes(ranks)
    assert f"{folder / 'qwen.tiktoken'}" in refused(folder)


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


@pytest.mark.parametrize(
    ("suffix", "pack"), [("gz", gzip.compress), ("xz", lzma.compress), ("zst", zstd)]
)
def test_packed_files_are_read(
    whole: Path, folder: Path, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    data = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").unlink()
    (folder / f"tokenizer.json.{suffix}").write_bytes(pack(data))
    expected = replace(tokenizer_facts(load_tokenizer(whole)), name=folder.name)
    assert tokenizer_facts(load_tokenizer(folder)) == expected
    (folder / f"tokenizer.json.{suffix}").write_bytes(pack(data)[:200])
    assert "cut short" in refused(folder)
    (folder / f"tokenizer.json.{suffix}").write_bytes(LFS)
    assert "a Git LFS pointer" in refused(folder)
