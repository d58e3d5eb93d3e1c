"""Cut JSON files into byte ranges that can be read independently.

Where an element of an array begins is guessed from the name of its first field. A wrong guess
cannot pass: each range must be whole elements, so together they are the elements of the file.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapilli.data.config import SourceConfig
from lapilli.data.errors import DataError
from lapilli.data.io.remote_path import Output, RemotePath
from lapilli.data.sources.reading.bounds import Bounds, holds_too_much
from lapilli.data.sources.reading.files import (
    annotation_places,
    compressed,
    file_error,
    what_it_is_instead,
)
from lapilli.data.sources.reading.json_scanner import Scanner
from lapilli.data.sources.reading.json_stream import read_lines

__all__ = ["RANGE_BYTES", "BadCut", "JsonRange", "cut_file", "cut_source", "read_range"]

RANGE_BYTES = 4 << 20
MOST_RANGES = 4096  # of one file: ranges of a larger file are larger
AT_ONCE = 16 << 20  # bytes of a range that is parsed by one call
SEARCHED = 1 << 20  # bytes in which the beginning of an element is looked for
BOM = b"\xef\xbb\xbf"
SPACE = rb"[ \t\r\n]*"
FIRST = re.compile(rb"%s\[%s(\{%s(\"[^\"\\]{1,200}\")%s:)" % (SPACE, SPACE, SPACE, SPACE))


class BadCut(ValueError):
    """A range is not whole elements: the file is damaged, or was cut in the wrong place."""


@dataclass(frozen=True, slots=True)
class JsonRange:
    """Some whole elements of a file.

    Attributes:
        place: The file.
        start: Its first byte.
        end: The byte behind its last.
        is_array: Whether the elements are those of an array; else one is a line.
        is_last: Whether the array ends here.
    """

    place: Output
    start: int
    end: int
    is_array: bool
    is_last: bool

    def load(self) -> bytes:
        """The bytes.

        Raises:
            DataError: They cannot be read.
        """
        return _read(self.place, self.start, self.end - self.start)


def cut_source(
    config: SourceConfig, root: Path, range_bytes: int = RANGE_BYTES
) -> list[JsonRange] | None:
    """The ranges of all files of a source, in order; None if one of them is to be streamed.

    Raises:
        DataError: See `annotation_places`, or a file that cannot be read.
    """
    found: list[JsonRange] = []
    for place in annotation_places(config, root):
        ranges = cut_file(place, range_bytes)
        if ranges is None:
            return None
        found += ranges
    return found


def cut_file(place: Output, range_bytes: int = RANGE_BYTES) -> list[JsonRange] | None:
    """The ranges of a JSON array of objects or of JSON lines, in order.

    None for what is to be streamed: a compressed, damaged or missing file, an array that does not
    begin with an object. Reading it says what is wrong.

    Args:
        place: The file.
        range_bytes: Bytes of a range, about.
    """
    try:
        size = place.size if isinstance(place, RemotePath) else place.stat().st_size
    except OSError:
        return None
    if not size:
        return None
    head = _read(place, 0, SEARCHED)
    begin = len(BOM) if head.startswith(BOM) else 0
    array = FIRST.match(head, begin)
    is_lines = head[begin:].lstrip(b" \t\r\n").startswith(b"{")
    if compressed(head) or not (array or is_lines) or (is_lines and what_it_is_instead(place)):
        return None
    step = max(range_bytes, size // MOST_RANGES)
    border = re.compile(rb"\n")
    start = 0
    if array:
        name = re.escape(array[2])
        border = re.compile(rb"\}%s,%s(?=\{%s%s%s:)" % (SPACE, SPACE, SPACE, name, SPACE))
        start = array.start(1)
    starts = [start]
    for nominal in range(start + step, size, step):
        if nominal < starts[-1]:
            continue
        match = border.search(_read(place, nominal, SEARCHED))
        if match and nominal + match.end() < size:
            starts.append(nominal + match.end())
    ends = [*starts[1:], size]
    return [
        JsonRange(
            place=place, start=start, end=end, is_array=array is not None, is_last=end == size
        )
        for start, end in zip(starts, ends, strict=True)
    ]


def _read(place: Output, start: int, count: int) -> bytes:
    """Bytes of a file from `start`.

    Raises:
        DataError: They cannot be read.
    """

    def read(file: Any) -> bytes:
        file.seek(start)
        return file.read(count)

    try:
        if isinstance(place, RemotePath):
            return place.read_with(read)
        with place.open("rb") as file:
            return read(file)
    except OSError as error:
        raise file_error(place, error) from None


def read_range(data: bytes, part: JsonRange, bounds: Bounds) -> Iterator[Any]:
    """The elements of a range, as reading the whole file gives them.

    Args:
        data: Its bytes.
        part: Which range it is.
        bounds: The source's.

    Raises:
        BadCut: The bytes are no whole elements.
    """
    try:
        if part.is_array:
            yield from _array_part(data, part.is_last, bounds.record)
        else:
            yield from read_lines(io.BytesIO(data), part.place, bounds)
    except (ValueError, DataError, MemoryError) as error:
        raise BadCut(f"{part.place}: {part.start}: {error}") from None


def _array_part(data: bytes, is_last: bool, most: int) -> Iterator[Any]:
    """Elements with a comma behind each; the array's end behind the last of all.

    Raises:
        ValueError: Something else.
    """
    if (found := _at_once(data, is_last, most)) is not None:
        yield from found
        return
    scanner = Scanner(io.TextIOWrapper(io.BytesIO(data), "utf-8"), most)
    separator = ","
    while separator == "," and (is_last or scanner.peek()):
        yield scanner.value()
        separator = scanner.expect(",]" if is_last else ",")
    if scanner.peek():
        raise json.JSONDecodeError("more text after the end of the array", "", 0)


def _at_once(data: bytes, is_last: bool, most: int) -> list[Any] | None:
    """The elements of a small range, parsed by one call; None where the scanner is to say more."""
    if len(data) > min(most, AT_ONCE) or holds_too_much(data):
        return None
    data = data.rstrip(b" \t\r\n")
    if not is_last and not data.endswith(b","):
        return None
    text = b"[%s" % data if is_last else b"[%s]" % data[:-1]
    try:
        return json.loads(str(text, "utf-8"))  # a list: more behind its end is an error
    except (ValueError, RecursionError):
        return None
