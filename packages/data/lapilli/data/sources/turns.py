"""Helpers shared by the readers: image keys and image markers in texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from lapilli.data.record import ImagePart, Part, Reason, TextPart, Turn, Verdict
from lapilli.data.sources.fields import IMAGE_FIELDS, is_empty

__all__ = ["IMAGE_MARKER", "Turns", "image_keys", "lead", "split_markers"]

IMAGE_MARKER = "<image>"
Turns = tuple[tuple[Turn, ...], tuple[str, ...]]


def image_keys(fields: Mapping[str, Any]) -> tuple[str, ...] | Verdict:
    """The keys under `image`, `images`, `image_path` or `image_paths`: one, a list, or none.

    Where several of them are filled they must name the same files.
    """
    if fields.keys().isdisjoint(IMAGE_FIELDS[1:]) and isinstance(only := fields.get("image"), str):
        return (only,)  # nearly all records
    named: tuple[str, ...] | None = None
    first = ""
    for name in IMAGE_FIELDS:
        value = fields.get(name)
        if value is None or value == []:
            continue
        keys = _keys(name, value)
        if isinstance(keys, Verdict) or named is None:
            if isinstance(keys, Verdict):
                return keys
            named, first = keys, name
        elif not _agree(named, keys):
            return Verdict(Reason.SCHEMA, f"`{first}` and `{name}` name other images; keep one")
    return named or ()


def _keys(name: str, value: Any) -> tuple[str, ...] | Verdict:
    """The keys that one field names."""
    if isinstance(value, str):
        return (value,)
    values = cast("list[Any]", value if isinstance(value, list) else [value])
    keys = tuple(map(_path, values))
    bad = next((given for given, key in zip(values, keys, strict=True) if key is None), None)
    if None in keys:
        found = type(bad).__name__
        detail = f"`{name}` holds a {found}; expected a key or a list of keys"
        return Verdict(Reason.SCHEMA, detail)
    return cast("tuple[str, ...]", keys)


def _path(value: Any) -> str | None:
    """A key, or the path of Hugging Face's `{bytes, path}` where the bytes are empty."""
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        is_object = "bytes" in fields and is_empty(fields["bytes"])
        value = fields.get("path") if is_object else None
    return value if isinstance(value, str) else None


def _agree(some: tuple[str, ...], others: tuple[str, ...]) -> bool:
    """Whether two lists name the same files, one perhaps with the folders above them."""
    return len(some) == len(others) and all(
        f"/{a}".endswith(f"/{b}") or f"/{b}".endswith(f"/{a}")
        for a, b in zip(some, others, strict=True)
    )


def lead(fields: Mapping[str, Any], turns: list[Turn]) -> Verdict | None:
    """Put the text under `system` in front of the turns, unless it is there; or why not."""
    if "system" not in fields or is_empty(system := fields["system"]):
        return None
    if not isinstance(system, str):
        found = type(system).__name__
        return Verdict(Reason.SCHEMA, f"`system` holds a {found}; expected a text")
    if turns and turns[0].role == "system":
        if turns[0].text.strip() != system.strip():
            detail = "`system` and a turn of the system say different things; keep one of them"
            return Verdict(Reason.SCHEMA, detail)
    else:
        turns.insert(0, Turn("system", (TextPart(system),)))
    return None


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
