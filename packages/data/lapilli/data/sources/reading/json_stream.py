"""Stream JSON arrays, JSON lines and JSON objects of any size."""

from __future__ import annotations

import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO, TypeVar

from lapilli.data.config import SourceConfig
from lapilli.data.errors import DataError
from lapilli.data.io.access import is_denied
from lapilli.data.io.file_kinds import EMPTY_FILE
from lapilli.data.io.remote_path import Output
from lapilli.data.record import excerpt
from lapilli.data.sources.reading.bounds import (
    BOUNDS,
    TOO_MANY,
    Bounds,
    Unreadable,
    bounded_lines,
    holds_too_much,
    why_unreadable,
)
from lapilli.data.sources.reading.files import (
    annotation_places,
    file_error,
    open_annotations,
    what_it_is_instead,
)
from lapilli.data.sources.reading.json_scanner import Scanner

__all__ = ["read", "read_items", "read_json", "read_lines"]

Element = TypeVar("Element")

ENCODING = "utf-8-sig"  # UTF-8, with or without a byte order mark
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)  # of a compressed file, or of a disk


def read(config: SourceConfig, root: Path) -> Iterator[Any]:
    """Every element of a source's JSON and JSON-lines files, as parsed JSON.

    Raises:
        DataError: See `read_json`.
    """
    for path in annotation_places(config, root):
        yield from read_json(path, Bounds.of(config))


def read_json(path: Output, bounds: Bounds = BOUNDS) -> Iterator[Any]:
    """Stream the elements of a JSON array, or of JSON lines, without holding the file.

    An element that is too large, too deep or has a number of too many digits is `Unreadable`.

    Raises:
        DataError: The file is missing, or no JSON of either kind; says where.
    """
    start = _first_character(path, bounds)
    if start == "[":
        yield from _stream(path, _array_elements, bounds)
    elif start == "{":
        if instead := what_it_is_instead(path):
            raise DataError(f"annotations: {path}: {instead}")
        yield from _read_lines(path, bounds)
    else:
        raise _unexpected(path, start, "a JSON array or JSON lines")


def read_items(path: Output, bounds: Bounds = BOUNDS) -> Iterator[tuple[str, Any]]:
    """Stream the items of a JSON object; a key that is there twice comes twice.

    A value may be `Unreadable`, as an element of `read_json` is.

    Raises:
        DataError: The file is missing or no JSON object; says where.
    """
    start = _first_character(path, bounds)
    if start != "{":
        raise _unexpected(path, start, "a JSON object")
    yield from _stream(path, _object_items, bounds)


def _first_character(path: Output, bounds: Bounds) -> str:
    """The first character that is no white space; "" in a file without one near its beginning."""
    looked = 0
    try:
        with _open_text(path, bounds, errors="replace") as file:
            while looked <= bounds.record and (text := file.read(1 << 16)):
                looked += len(text)
                if stripped := text.lstrip():
                    return stripped[0]
    except DAMAGED as error:
        if is_denied(error):
            raise file_error(path, error) from None
        return ""  # what it is instead says so
    return ""


def _open_text(path: Output, bounds: Bounds, errors: str = "strict") -> TextIO:
    return io.TextIOWrapper(open_annotations(path, bounds.unpacked), ENCODING, errors)


def _unexpected(path: Output, start: str, expected: str) -> DataError:
    instead = what_it_is_instead(path)
    if not start and (not instead or instead == EMPTY_FILE):
        return DataError(f"annotations: {path} is empty; download or write it again")
    remedy = instead or "check the file and the recipe's `annotations`"
    begin = (
        f" starts with {start!r};" if start and start.isprintable() and start != "\ufffd" else ":"
    )
    return DataError(f"annotations: {path}{begin} expected {expected}; {remedy}")


def _stream(
    path: Output, elements: Callable[[TextIO, int], Iterator[Element]], bounds: Bounds
) -> Iterator[Element]:
    """What `elements` finds in the file; an error says after how many."""
    count = 0
    try:
        with _open_text(path, bounds) as file:
            for element in elements(file, bounds.record):
                yield element
                count += 1
    except (*DAMAGED, ValueError, MemoryError) as error:
        if is_denied(error):
            raise file_error(path, error) from None
        raise DataError(
            f"annotations: {path} is no valid JSON after {count} records ({_reason(error)}); "
            + (what_it_is_instead(path) or "download or write it again")
        ) from None


def _reason(error: Exception) -> str:
    """What is wrong; not the place, which is one in the window or the line."""
    return excerpt(error.msg if isinstance(error, json.JSONDecodeError) else str(error))


def _array_elements(file: TextIO, most: int) -> Iterator[Any]:
    """The elements of a JSON array, one at a time, as `json` itself would read them.

    Not ijson: yajl puts "?" in the place of a lone surrogate, so a text would change unseen, and
    100 KB of "[" take all memory.

    Raises:
        ValueError: No valid JSON, or none in UTF-8.
    """
    scanner = Scanner(file, most)
    scanner.expect("[")
    if scanner.peek() == "]":
        scanner.expect("]")
    else:
        separator = ","
        while separator == ",":
            yield scanner.value()
            separator = scanner.expect(",]")
    if scanner.peek():
        raise ValueError("more text after the end of the array")


def _object_items(file: TextIO, most: int) -> Iterator[tuple[str, Any]]:
    """The items of a JSON object, one at a time; see `_array_elements`."""
    scanner = Scanner(file, most)
    scanner.expect("{")
    if scanner.peek() == "}":
        scanner.expect("}")
    else:
        separator = ","
        while separator == ",":
            if scanner.peek() != '"':
                raise ValueError("a name that is no text")
            name = scanner.value()
            if not isinstance(name, str):
                raise ValueError("a name that is too long")
            scanner.expect(":")
            yield name, scanner.value()
            separator = scanner.expect(",}")
    if scanner.peek():
        raise ValueError("more text after the end of the object")


def _read_lines(path: Output, bounds: Bounds) -> Iterator[Any]:
    with open_annotations(path, bounds.unpacked) as file:
        yield from read_lines(file, path, bounds)


def read_lines(file: BinaryIO, path: Output, bounds: Bounds) -> Iterator[Any]:
    """The elements of JSON lines, or `Unreadable`; empty lines are passed over.

    Args:
        file: Their bytes.
        path: The file, for an error.
        bounds: The source's.

    Raises:
        DataError: A line is no JSON, or cannot be read.
    """
    number = 0
    try:
        for number, line in enumerate(bounded_lines(file, bounds.record), start=1):
            if isinstance(line, Unreadable):
                yield line
            elif line.strip():
                yield _parsed_line(path, number, line)
    except (*DAMAGED, MemoryError) as error:
        if is_denied(error):
            raise file_error(path, error) from None
        raise DataError(
            f"annotations: {path} cannot be read behind line {number} ({_reason(error)}); "
            "download or write it again"
        ) from None


def _parsed_line(path: Output, number: int, line: bytes) -> Any:
    if holds_too_much(line):
        return Unreadable(TOO_MANY, _begin(line))
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        if (why := why_unreadable(error)) is not None:
            return Unreadable(why, _begin(line))
        raise DataError(
            f"annotations: {path} line {number} is no valid JSON ({_reason(error)}); "
            "expected a JSON array or one record a line; fix or remove the line"
        ) from None


def _begin(line: bytes) -> str:
    return line[:200].decode("utf-8", "replace")
