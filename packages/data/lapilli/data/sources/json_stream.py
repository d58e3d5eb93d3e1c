"""JSON arrays, JSON lines and JSON objects of any size, element by element."""

from __future__ import annotations

import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO, TypeVar

from lapilli.data.access import is_denied
from lapilli.data.config import SourceConfig
from lapilli.data.errors import DataError
from lapilli.data.output import Output
from lapilli.data.record import excerpt
from lapilli.data.sources.files import (
    annotation_places,
    file_error,
    open_annotations,
    what_it_is_instead,
)

__all__ = ["read", "read_items", "read_json"]

Element = TypeVar("Element")

ENCODING = "utf-8-sig"  # UTF-8, with or without a byte order mark
WINDOW = 1 << 20  # characters read at once
LONGEST = 1 << 28  # characters of one value: a broken first record must not draw in a whole file
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)  # of a compressed file, or of a disk
SPACE = re.compile(r"[ \t\n\r]*")


def read(config: SourceConfig, root: Path) -> Iterator[Any]:
    """Every element of a source's JSON and JSON-lines files, as parsed JSON.

    Raises:
        DataError: See `read_json`.
    """
    for path in annotation_places(config, root):
        yield from read_json(path)


def read_json(path: Output) -> Iterator[Any]:
    """Stream the elements of a JSON array, or of JSON lines, without holding the file.

    Raises:
        DataError: The file is missing, or no JSON of either kind; says where.
    """
    start = _first_character(path)
    if start == "[":
        yield from _stream(path, _array_elements)
    elif start == "{":
        if instead := what_it_is_instead(path):
            raise DataError(f"annotations: {path}: {instead}")
        yield from _read_lines(path)
    else:
        raise _unexpected(path, start, "a JSON array or JSON lines")


def read_items(path: Output) -> Iterator[tuple[str, Any]]:
    """Stream the items of a JSON object; a key that is there twice comes twice.

    Raises:
        DataError: The file is missing or no JSON object; says where.
    """
    start = _first_character(path)
    if start != "{":
        raise _unexpected(path, start, "a JSON object")
    yield from _stream(path, _object_items)


def _first_character(path: Output) -> str:
    """The first character that is no white space, or "" in a file without one."""
    try:
        with _open_text(path, errors="replace") as file:
            while text := file.read(4096):
                if stripped := text.lstrip():
                    return stripped[0]
    except DAMAGED as error:
        if is_denied(error):
            raise file_error(path, error) from None
        return ""  # what it is instead says so
    return ""


def _open_text(path: Output, errors: str = "strict") -> TextIO:
    return io.TextIOWrapper(open_annotations(path), ENCODING, errors)


def _unexpected(path: Output, start: str, expected: str) -> DataError:
    if not start:
        return DataError(f"annotations: {path} is empty; download or write it again")
    remedy = what_it_is_instead(path) or "check the file and the recipe's `annotations`"
    begin = f" starts with {start!r};" if start.isprintable() and start != "\ufffd" else ":"
    return DataError(f"annotations: {path}{begin} expected {expected}; {remedy}")


def _stream(path: Output, elements: Callable[[TextIO], Iterator[Element]]) -> Iterator[Element]:
    """What `elements` finds in the file; an error says after how many."""
    count = 0
    try:
        with _open_text(path) as file:
            for element in elements(file):
                yield element
                count += 1
    except (*DAMAGED, ValueError, RecursionError) as error:
        if is_denied(error):
            raise file_error(path, error) from None
        raise DataError(
            f"annotations: {path} is no valid JSON after {count} records ({_reason(error)}); "
            + (what_it_is_instead(path) or "download or write it again")
        ) from None


def _reason(error: Exception) -> str:
    """What is wrong; not the place, which is one in the window or the line."""
    return excerpt(error.msg if isinstance(error, json.JSONDecodeError) else str(error))


def _array_elements(file: TextIO) -> Iterator[Any]:
    """The elements of a JSON array, one at a time, as `json` itself would read them.

    Not ijson: yajl puts "?" in the place of a lone surrogate, so a text would change unseen, and
    100 KB of "[" take all memory.

    Raises:
        ValueError: No valid JSON, or none in UTF-8.
        RecursionError: Nested too deeply.
    """
    scanner = _Scanner(file)
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


def _object_items(file: TextIO) -> Iterator[tuple[str, Any]]:
    """The items of a JSON object, one at a time; see `_array_elements`."""
    scanner = _Scanner(file)
    scanner.expect("{")
    if scanner.peek() == "}":
        scanner.expect("}")
    else:
        separator = ","
        while separator == ",":
            if scanner.peek() != '"':
                raise ValueError("a name that is no text")
            name = scanner.value()
            scanner.expect(":")
            yield name, scanner.value()
            separator = scanner.expect(",}")
    if scanner.peek():
        raise ValueError("more text after the end of the object")


class _Scanner:
    """Reads JSON values from a file through a window that grows to the largest of them."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text = ""
        self._at = 0
        self._decoder = json.JSONDecoder()

    def _grow(self) -> bool:
        """Drop what has been read and read on; twice as much for a value that did not fit."""
        more = self._file.read(max(WINDOW, len(self._text) - self._at))
        if not more:
            return False
        self._text = self._text[self._at :] + more
        self._at = 0
        return True

    def peek(self) -> str:
        """The next character that is no white space, or "" at the end of the file."""
        while True:
            self._at = _skip_space(self._text, self._at)
            if self._at < len(self._text) or not self._grow():
                return self._text[self._at : self._at + 1]

    def expect(self, characters: str) -> str:
        """Step over the next character, which must be one of `characters`."""
        found = self.peek()
        if not found or found not in characters:
            wanted = " or ".join(characters)
            raise ValueError(f"expected {wanted}, found {found or 'the end of the file'}")
        self._at += 1
        return found

    def value(self) -> Any:
        """The next value. One near the window's end may go on behind it: `1` of `1e+9`."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError:
                if len(self._text) - self._at > LONGEST or not self._grow():
                    raise
                continue
            if len(self._text) - end > 2 or not self._grow():
                self._at = end
                return value


def _skip_space(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    return found.end() if found else at


def _read_lines(path: Output) -> Iterator[Any]:
    number = 0
    try:
        with open_annotations(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parsed_line(path, number, line)
    except DAMAGED as error:
        if is_denied(error):
            raise file_error(path, error) from None
        raise DataError(
            f"annotations: {path} cannot be read behind line {number} ({_reason(error)}); "
            "download or write it again"
        ) from None


def _parsed_line(path: Output, number: int, line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"annotations: {path} line {number} is no valid JSON ({_reason(error)}); "
            "expected a JSON array or one record a line; mend or remove the line"
        ) from None
