"""What a file is that is not what was expected: told by its bytes, named with what to do."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from lapilli.data.images.view import BadImage, ImageSpec, decode
from lapilli.data.io.file_kinds import Expected, file_kind, what_it_is_instead
from lapilli.data.mounts import Mount
from lapilli.data.record import Reason, Verdict
from tests.factories import conversation, image_bytes

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n"


def box(brand: bytes, *others: bytes) -> bytes:
    size = 16 + 4 * len(others)
    return size.to_bytes(4, "big") + b"ftyp" + brand + b"\0\0\2\0" + b"".join(others) + b"\0" * 64


def packed(kind: str) -> bytes:
    sink = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(sink, "w") as archive:
            archive.writestr(zipfile.ZipInfo("a"), b"x")  # of 1980: a test's id holds the bytes
    elif kind == "tar":
        with tarfile.open(fileobj=sink, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("a"))
    elif kind == "parquet":
        pq.write_table(pa.table({"a": [1]}), sink)
    else:
        np.save(sink, np.zeros(3))
    return sink.getvalue()


COCO = {"images": [{"id": 7, "file_name": "7.jpg"}], "annotations": [{"id": 1, "image_id": 7}]}
KINDS: dict[str, bytes] = {
    "empty file": b"",
    "Git LFS pointer": LFS,
    "web page": b"\n <!-- x --><!DOCTYPE html><html>404</html>",
    "SVG": b'<?xml version="1.0"?>\n<!-- made --><svg xmlns="x"/>',
    "HEIC": box(b"heic", b"mif1"),
    "AVIF": box(b"avif"),
    "MP4": box(b"isom", b"avc1"),
    "MOV": box(b"qt  "),
    "WebM": b"\x1a\x45\xdf\xa3" + b"\0" * 40,
    "PDF": b"%PDF-1.4\n",
    "JPEG XL": b"\xff\x0a" + b"\1" * 20,
    "gzip": gzip.compress(b"[]"),
    "zstd": pa.Codec("zstd").compress(b"[]", asbytes=True),
    "xz": lzma.compress(b"[]"),
    "ZIP": packed("zip"),
    "tar": packed("tar"),
    "Parquet": packed("parquet"),
    "NumPy": packed("npy"),
    "UTF-16": '[{"id": 1}]'.encode("utf-16"),
    "UTF-16LE": '[{"id": 1}]'.encode("utf-16-le"),
    "UTF-16BE": '[{"id": 1}]'.encode("utf-16-be"),
    "UTF-32": "[]".encode("utf-32"),
    "COCO": json.dumps(COCO).encode(),
    "`data`": json.dumps({"data": [conversation("a")]}, indent=1).encode(),
    "`mine`": json.dumps({"version": 1, "mine": [conversation("a")]}, indent=1).encode(),
    "tiktoken": b"IQ== 0\nIg== 1\nIw== 2\n",
    "pickle": pickle.dumps({"a": [1, 2]}),
    "safetensors": save({"a": np.zeros(3)}),
}


@pytest.mark.parametrize("name", KINDS)
def test_each_is_named_with_what_to_do(name: str) -> None:
    kind = file_kind(KINDS[name])
    assert kind is not None
    assert name in kind.name
    assert kind.remedy
    assert "\n" not in str(kind)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", [{"a": 1}, [1, 2], "text", (1, 2), b"bytes", 7])
def test_a_pickle_of_any_protocol(value: object, protocol: int) -> None:
    kind = file_kind(pickle.dumps(value, protocol))
    assert kind is not None
    assert "pickle" in kind.name


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (image_bytes("jpeg"), "image"),
        (image_bytes("png"), "image"),
        (packed("zip"), "archive"),
        (packed("tar"), "archive"),
        (b'{"id": 1, "conversations": [{"from": "human"}]}', "annotations"),
        (b'{"id": 1, "dialog": [{"from": "human"}]}\n{"id": 2, "dialog": []}', "annotations"),
        (b'{"id": 1, "dialog": [{"from": "human"}]}', "annotations"),
        (b'[{"data": [{"a": 1}]}]', "annotations"),
        (b'{"version": "1.0", "added_tokens": [{"id": 0}], "model": {}}', "tokenizer"),
        (b'{"chat_template": [{"name": "default"}],\n"x": 1}', "tokenizer"),
        (b"IQ== 0\nIg== 1\n", "ranks"),
    ],
)
def test_what_is_in_its_place_is_nothing_else(data: bytes, expected: Expected) -> None:
    assert what_it_is_instead(data, expected) == ""


@given(st.binary(max_size=300))
def test_any_bytes_have_an_answer_of_one_line(data: bytes) -> None:
    for expected in ("image", "annotations", "archive", "tokenizer", "ranks"):
        assert "\n" not in what_it_is_instead(data, expected)


@pytest.mark.parametrize(
    "name",
    [n for n in KINDS if n not in ("AVIF", "safetensors")],  # Pillow takes these for images
)
def test_an_image_that_is_something_else_says_so(name: str) -> None:
    with pytest.raises(BadImage) as caught:
        decode(KINDS[name], ImageSpec(8, (0, 0, 0)))
    assert caught.value.reason == Reason.IMAGE_UNDECODABLE
    assert f"{len(KINDS[name])} bytes: this is " in caught.value.detail
    assert name in caught.value.detail


def test_what_a_server_answered_is_shown() -> None:
    with pytest.raises(BadImage, match=r"text \('404: Not Found'\)"):
        decode(b"404: Not Found\n", ImageSpec(8, (0, 0, 0)))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.zip", lambda: LFS),
        ("a.tar", lambda: gzip.compress(packed("tar"), mtime=0)),
        ("a.zip", lambda: b"<html>"),
    ],
)
def test_an_archive_that_is_something_else_says_so(
    tmp_path: Path, name: str, write: Callable[[], bytes]
) -> None:
    (tmp_path / name).write_bytes(write())
    verdict = Mount(tmp_path).locate(f"{name}/1.jpg")
    assert isinstance(verdict, Verdict)
    assert what_it_is_instead(write(), "archive") in verdict.detail
