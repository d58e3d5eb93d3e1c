"""Annotation files of every format, and what is read of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from webdataset.writer import TarWriter

from lapilli.data.config import SourceConfig
from lapilli.data.errors import DataError
from lapilli.data.record import Entry, Record, TextPart
from lapilli.data.sources.validation import read_entries
from tests.factories import conversation, image_bytes

Said = list[tuple[str, str]]


def entries(root: Path, **config: Any) -> list[Entry]:
    return list(read_entries(SourceConfig("src", **config), root))


def records(found: list[Entry]) -> list[Record]:
    assert [entry.verdict for entry in found if not entry.verdict.kept] == []
    return [entry.record for entry in found if entry.record is not None]


def said(record: Record) -> Said:
    """A record's turns as text, its images as `<image>`."""
    return [
        (
            turn.role,
            "".join(p.text if isinstance(p, TextPart) else "<image>" for p in turn.parts),
        )
        for turn in record.turns
    ]


def refused(root: Path, **config: Any) -> str:
    with pytest.raises(DataError) as caught:
        entries(root, **config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_lines(path: Path, elements: list[Any]) -> None:
    path.write_text("".join(json.dumps(element) + "\n" for element in elements))


def write_tar(path: Path, samples: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with TarWriter(str(path), encoder=False) as tar:
        for sample in samples:
            tar.write(sample)


JPEG = image_bytes("jpeg")


def as_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


def write_parquet(path: Path, elements: list[dict[str, Any]], **options: Any) -> None:
    pq.write_table(pa.Table.from_pylist(elements), path, **options)


def pair(root: Path, image_map: str, captions: str, **config: Any) -> list[Entry]:
    (root / "image_map.json").write_text(image_map)
    (root / "captions.json").write_text(captions)
    names = ["image_map.json", "captions.json"]
    return entries(root, annotations=names, format="basic_vlm", **config)


def message(*contents: Any, **fields: Any) -> dict[str, Any]:
    roles = ("user", "assistant") * len(contents)
    turns = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return {"messages": turns, **fields}


def image_url(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": url}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


MIXED = [
    conversation("a", "coco/1.jpg", turns=2),
    conversation("b"),
    conversation("c", ["x/1.jpg", "x/2.jpg"]),
]
