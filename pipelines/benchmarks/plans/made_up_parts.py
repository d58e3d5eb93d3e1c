"""What the tasks of a plan would give back for millions of records, and the names of as many files.

Nothing is written for them but a stub that is cut into ranges. Each record has a short conversation
and a picture of its own.
"""

from __future__ import annotations

import marshal
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from lapilli.data.mounts import Located
from lapilli.data.mounts.folders import Boundary, Folder, Listing
from lapilli.data.numbered import NumberedNames
from lapilli.data.planning.parts.scan_part import PART_SCHEMA, Part, ScanSettings
from lapilli.data.record import ImagePart, Record, TextPart, Turn, pack_content
from lapilli.data.sources.reading.json_ranges import JsonRange

__all__ = ["made_up_folder", "made_up_parts", "write_stub"]

PART = 3000  # records, about 4 MB of JSON
FOLDERS = ("coco/train2017", "gqa/images", "ocr_vqa/images", "vg/VG_100K")


def write_stub(root: Path, records: int) -> None:
    """Write a file under the name of so many records, of more than one range."""
    (root / f"mix_{records}.json").write_text('[{"id": "1"}, {"id": "2"}, {"id": "3"}]')


def made_up_parts(
    records: int, ranges: Sequence[JsonRange], settings: ScanSettings
) -> Iterator[Part]:
    """The parts of so many records, whatever the ranges are."""
    del ranges, settings
    turns = (
        Turn("user", (ImagePart(0), TextPart("\nWhat is it?"))),
        Turn("assistant", (TextPart("A car."),)),
    )
    record = Record(
        record_id="", sample_id="", source="mix", turns=turns, images=("coco/train2017/1.jpg",)
    )
    content = pack_content(record)
    for start in range(0, records, PART):
        numbers = range(start, min(records, start + PART))
        count = len(numbers)
        keys = [f"{FOLDERS[n % len(FOLDERS)]}/{n:012d}.jpg" for n in numbers]
        columns: dict[str, list[Any]] = {
            "record_id": [f"{n:012d}" for n in numbers],
            "reason": [None] * count,
            "detail": [None] * count,
            "raw_json": ["{}"] * count,
            "digest": [n.to_bytes(16, "big") for n in numbers],
            "images": [marshal.dumps((key,)) for key in keys],
            "content": [content] * count,
            "stamp": [n.to_bytes(8, "big") for n in numbers],
        }
        yield Part(pa.table(columns, schema=PART_SCHEMA), Counter())


@dataclass
class _MadeUpFolder(Folder):
    """A folder of names that are on no disk."""

    path: str
    records: int

    def read(self) -> Listing:
        files = NumberedNames()
        if self.path in FOLDERS:
            first = FOLDERS.index(self.path)
            for number in range(first, self.records, len(FOLDERS)):
                files.add(f"{number:012d}.jpg")
        below = f"{self.path}/" if self.path else ""
        inner = (one.removeprefix(below) for one in FOLDERS if one.startswith(below))
        return Listing(files, frozenset(one.partition("/")[0] for one in inner))

    def child(self, name: str) -> Folder:
        return _MadeUpFolder(self.path_of(name), self.records)

    def locate(self, name: str, repair: str) -> Located:
        path = self.path_of(name)
        return Located(
            image_id=path,
            container=path,
            size=100_000,
            mtime_ns=1_700_000_000_000_000_000 + len(name),
            repair=repair,
        )

    def path_of(self, name: str) -> str:
        return f"{self.path}/{name}" if self.path else name


def made_up_folder(records: int, path: str, boundary: Boundary) -> Folder:
    """The folder that the pictures of so many records lie below; see `open_folder`."""
    del path, boundary
    return _MadeUpFolder("", records)
