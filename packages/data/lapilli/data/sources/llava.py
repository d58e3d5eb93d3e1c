"""LLaVA's JSON and JSONL: `{id, image?, conversations: [{from, value}]}`.

`image` is a key, a list of keys, null or absent. `<image>` in a human turn is the place of the next
image; in an answer or a system turn it is text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, cast

from lapilli.data.errors import DataError
from lapilli.data.record import ImagePart, Part, Reason, Role, TextPart, Turn, Verdict, excerpt

__all__ = ["IMAGE_MARKER", "normalise", "read"]

IMAGE_MARKER = "<image>"
ENCODING = "utf-8-sig"  # UTF-8, with or without a byte order mark
WINDOW = 1 << 20  # characters read at once
LONGEST = 1 << 28  # characters of one value: a broken first record must not draw in a whole file
SPACE = re.compile(r"[ \t\n\r]*")
ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}


def read(path: Path) -> Iterator[Any]:
    """Stream the elements of a JSON array, or of JSON lines, without holding the file.

    Raises:
        DataError: The file is missing, or no JSON of either kind; says where.
    """
    start = _first_character(path)
    if start == "[":
        yield from _read_array(path)
    elif start == "{":
        yield from _read_lines(path)
    elif not start:
        raise DataError(f"annotations: {path} is empty; download or write it again")
    else:
        web_page = "; this is a web page: download the raw file" if start == "<" else ""
        raise DataError(
            f"annotations: {path} starts with {start!r}; expected a JSON array or JSON lines"
            + (web_page or "; check the file and the recipe's `annotations`")
        )


def _first_character(path: Path) -> str:
    """The first character that is no white space, or "" in a file without one."""
    try:
        with path.open(encoding=ENCODING, errors="replace") as file:
            while text := file.read(4096):
                if stripped := text.lstrip():
                    return stripped[0]
    except OSError as error:
        raise DataError(
            f"annotations: {path}: {error.strerror}; check --root and the recipe's `annotations`"
        ) from None
    return ""


def _read_array(path: Path) -> Iterator[Any]:
    count = 0
    try:
        with path.open(encoding=ENCODING) as file:
            for element in _array_elements(file):
                yield element
                count += 1
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"annotations: {path} is no valid JSON after {count} records ({_reason(error)}); "
            "download or write it again"
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


def _read_lines(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                element = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"annotations: {path} line {number} is no valid JSON ({_reason(error)}); "
                    "expected a JSON array or one record a line; mend or remove the line"
                ) from None
            yield element


def normalise(element: Any) -> tuple[tuple[Turn, ...], tuple[str, ...]] | Verdict:
    """One element to its turns and image keys, or the verdict that it cannot be one."""
    if not isinstance(element, dict):
        return Verdict(Reason.SCHEMA, f"expected an object, found {type(element).__name__}")
    fields = cast("dict[str, Any]", element)
    keys = _image_keys(fields.get("image"))
    if isinstance(keys, Verdict):
        return keys
    conversations = fields.get("conversations")
    if not isinstance(conversations, list):
        return Verdict(Reason.SCHEMA, "expected a list under `conversations`")
    turns: list[Turn] = []
    images = 0
    for place, item in enumerate(cast("list[Any]", conversations)):
        turn = _turn(item, place, images)
        if isinstance(turn, Verdict):
            return turn
        images += sum(isinstance(part, ImagePart) for part in turn.parts)
        turns.append(turn)
    return tuple(turns), keys


def _image_keys(value: Any) -> tuple[str, ...] | Verdict:
    values = cast(
        "list[Any]", value if isinstance(value, list) else [] if value is None else [value]
    )
    if not all(isinstance(key, str) for key in values):
        found = type(next(key for key in values if not isinstance(key, str))).__name__
        return Verdict(Reason.SCHEMA, f"`image` holds a {found}; expected a key or a list of keys")
    return tuple(values)


def _turn(item: Any, place: int, images: int) -> Turn | Verdict:
    """One `{from, value}`; `images` were placed in the turns before it."""
    if not isinstance(item, dict):
        return Verdict(Reason.SCHEMA, f"turn {place}: expected an object with from and value")
    fields = cast("dict[str, Any]", item)
    speaker, value = fields.get("from"), fields.get("value")
    if not isinstance(speaker, str) or not isinstance(value, str):
        return Verdict(Reason.SCHEMA, f"turn {place}: `from` and `value` must be text")
    role = ROLES.get(speaker)
    if role is None:
        known = ", ".join(ROLES)
        return Verdict(Reason.UNKNOWN_ROLE, f"turn {place}: '{excerpt(speaker)}'; known: {known}")
    if role != "user":
        return Turn(role, (TextPart(value),))
    return Turn(role, split_markers(value, images))


def split_markers(text: str, first: int) -> tuple[Part, ...]:
    """Text with `<image>` markers to parts; the images are numbered from `first`."""
    parts: list[Part] = []
    for number, piece in enumerate(text.split(IMAGE_MARKER)):
        if number:
            parts.append(ImagePart(first + number - 1))
        if piece:
            parts.append(TextPart(piece))
    return tuple(parts)
