"""What the readers share: image keys beside a conversation, and markers in its text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from lapilli.data.record import ImagePart, Part, Reason, TextPart, Turn, Verdict

__all__ = ["IMAGE_MARKER", "Turns", "image_keys", "split_markers"]

IMAGE_MARKER = "<image>"
Turns = tuple[tuple[Turn, ...], tuple[str, ...]]


def image_keys(fields: Mapping[str, Any]) -> tuple[str, ...] | Verdict:
    """The keys under `image`, or else `images`: one, a list, or none."""
    value = fields.get("image")
    if value is None:
        value = fields.get("images")
    values = cast(
        "list[Any]", value if isinstance(value, list) else [] if value is None else [value]
    )
    if not all(isinstance(key, str) for key in values):
        found = type(next(key for key in values if not isinstance(key, str))).__name__
        return Verdict(Reason.SCHEMA, f"`image` holds a {found}; expected a key or a list of keys")
    return tuple(values)


def split_markers(text: str, first: int) -> tuple[Part, ...]:
    """Text with `<image>` markers to parts; the images are numbered from `first`."""
    if IMAGE_MARKER not in text:
        return (TextPart(text),) if text else ()
    parts: list[Part] = []
    for number, piece in enumerate(text.split(IMAGE_MARKER)):
        if number:
            parts.append(ImagePart(first + number - 1))
        if piece:
            parts.append(TextPart(piece))
    return tuple(parts)
