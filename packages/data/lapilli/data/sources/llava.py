"""LLaVA's records: `{id, image?, system?, conversations: [{from, value}]}`.

`image` (or `images`, `image_path`, `image_paths`) is a key, a list of keys, null or absent.
`<image>` in a human turn is the place of the next image; in an answer or a system turn it is text.
"""

from __future__ import annotations

from typing import Any, cast

from lapilli.data.record import ImagePart, Reason, Role, TextPart, Turn, Verdict
from lapilli.data.sources.fields import (
    IMAGE_FIELDS,
    NOTHING,
    TURN_EXTRAS,
    Inspection,
    Layout,
    inspect_fields,
    inspect_turns,
    role_error,
    turn_extras,
)
from lapilli.data.sources.turns import IMAGE_MARKER, Turns, image_keys, lead, split_markers

__all__ = ["inspect", "normalise"]

_NEW = tuple.__new__
ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}
UNDERSTOOD = frozenset({"id", "conversations", "system", *IMAGE_FIELDS})
LAYOUT = Layout("from", "value", frozenset({"from", "value", *TURN_EXTRAS}))


def inspect(element: Any) -> Inspection:
    """What the fields come to that `normalise` does not read."""
    if not isinstance(element, dict):
        return NOTHING
    fields = cast("dict[str, Any]", element)
    turns = inspect_turns("conversations", fields.get("conversations"), LAYOUT)
    return inspect_fields(fields, UNDERSTOOD) | turns


def normalise(element: Any) -> Turns | Verdict:
    """One element to its turns and image keys, or the verdict that it cannot be one."""
    if not isinstance(element, dict):
        return Verdict(Reason.SCHEMA, f"expected an object, found {type(element).__name__}")
    fields = cast("dict[str, Any]", element)
    keys = image_keys(fields)
    if isinstance(keys, Verdict):
        return keys
    conversations = fields.get("conversations")
    if not isinstance(conversations, list):
        return Verdict(Reason.SCHEMA, "expected a list under `conversations`")
    turns: list[Turn] = []
    images = 0
    for place, item in enumerate(cast("list[Any]", conversations)):
        turn = _plain_turn(item)
        if turn is None:
            turn = _turn(item, images)
            if isinstance(turn, Verdict):
                return Verdict(turn.reason, f"turn {place}: {turn.detail}")
            images += sum(isinstance(part, ImagePart) for part in turn.parts)
        turns.append(turn)
    return lead(fields, turns) or (tuple(turns), keys)


def _plain_turn(item: Any) -> Turn | None:
    """A turn of two fields without a marker, as nearly all are; None for another."""
    if item.__class__ is not dict or len(item) != 2:
        return None
    speaker, value = item.get("from"), item.get("value")
    if speaker.__class__ is not str or value.__class__ is not str or not value:
        return None
    role = ROLES.get(speaker)
    if role is None or (role == "user" and IMAGE_MARKER in value):
        return None
    # As Turn(role, (TextPart(value),)), in half the time: 5 million turns in 665K records.
    return _NEW(Turn, (role, (_NEW(TextPart, (value,)),), True, ""))


def _turn(item: Any, images: int) -> Turn | Verdict:
    """One `{from, value}`; `images` were placed in the turns before it."""
    if not isinstance(item, dict):
        return Verdict(Reason.SCHEMA, "expected an object with from and value")
    fields = cast("dict[str, Any]", item)
    speaker, value = fields.get("from"), fields.get("value")
    if not isinstance(speaker, str) or not isinstance(value, str):
        other = "; `format: messages` reads role and content" if "role" in fields else ""
        return Verdict(Reason.SCHEMA, f"`from` and `value` must be text{other}")
    role = ROLES.get(speaker)
    if role is None:
        return role_error(speaker, ROLES)
    parts = split_markers(value, images) if role == "user" else (TextPart(value),)
    if len(fields) == 2:
        return Turn(role, parts)
    extras = turn_extras(fields, role)
    return extras if isinstance(extras, Verdict) else Turn(role, parts, *extras)
