"""LLaVA's JSON and JSONL: `{id, image?, conversations: [{from, value}]}`.

`image` is a key, a list of keys, null or absent. `<image>` in a human turn is the place of the next
image; in an answer or a system turn it is text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import ijson

from lapilli.data.errors import DataError
from lapilli.data.record import ImagePart, Part, Reason, Role, TextPart, Turn, Verdict

__all__ = ["IMAGE_MARKER", "normalise", "read"]

IMAGE_MARKER = "<image>"
ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}


def read(path: Path) -> Iterator[Any]:
    """Stream the elements of a JSON array, or of JSON lines, without holding the file.

    Raises:
        DataError: The file is missing, or no JSON of either kind; says where.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4096).lstrip()
    except OSError as error:
        raise DataError(f"annotations: {path}: {error.strerror}; check --root") from None
    if head.startswith(b"["):
        yield from _read_array(path)
    elif head.startswith(b"{"):
        yield from _read_lines(path)
    else:
        raise DataError(
            f"annotations: {path} starts with {head[:20]!r}; expected a JSON array or JSON lines"
            + ("; this is a web page: download the raw file" if head.startswith(b"<") else "")
        )


def _read_array(path: Path) -> Iterator[Any]:
    count = 0
    try:
        with path.open("rb") as file:
            for element in ijson.items(file, "item", use_float=True):
                count += 1
                yield element
    except (ijson.JSONError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(
            f"annotations: {path} is no valid JSON after {count} records ({reason}); "
            "download or write it again"
        ) from None


def _read_lines(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"annotations: {path} line {number} is no valid JSON ({error}); "
                    "mend or remove the line"
                ) from None


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
        return Verdict(Reason.SCHEMA, f"`image` is {value!r}; expected a key or a list of keys")
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
        return Verdict(Reason.UNKNOWN_ROLE, f"turn {place}: {speaker!r}; known: {', '.join(ROLES)}")
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
