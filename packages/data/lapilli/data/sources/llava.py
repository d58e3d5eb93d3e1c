"""LLaVA's records: `{id, image?, conversations: [{from, value}]}`.

`image` (or `images`) is a key, a list of keys, null or absent. `<image>` in a human turn is the
place of the next image; in an answer or a system turn it is text.
"""

from __future__ import annotations

from typing import Any, cast

from lapilli.data.record import ImagePart, Reason, Role, TextPart, Turn, Verdict, excerpt
from lapilli.data.sources.turns import Turns, image_keys, split_markers

__all__ = ["normalise"]

ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}


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
        turn = _turn(item, place, images)
        if isinstance(turn, Verdict):
            return turn
        images += sum(isinstance(part, ImagePart) for part in turn.parts)
        turns.append(turn)
    return tuple(turns), keys


def _turn(item: Any, place: int, images: int) -> Turn | Verdict:
    """One `{from, value}`; `images` were placed in the turns before it."""
    if not isinstance(item, dict):
        return Verdict(Reason.SCHEMA, f"turn {place}: expected an object with from and value")
    fields = cast("dict[str, Any]", item)
    speaker, value = fields.get("from"), fields.get("value")
    if not isinstance(speaker, str) or not isinstance(value, str):
        other = "; `format: messages` reads role and content" if "role" in fields else ""
        return Verdict(Reason.SCHEMA, f"turn {place}: `from` and `value` must be text{other}")
    role = ROLES.get(speaker)
    if role is None:
        known = ", ".join(ROLES)
        return Verdict(Reason.UNKNOWN_ROLE, f"turn {place}: '{excerpt(speaker)}'; known: {known}")
    if role != "user":
        return Turn(role, (TextPart(value),))
    return Turn(role, split_markers(value, images))
