"""Question and answer pairs under `texts`: the Cauldron, FineVision and Docmatix.

`{images, texts: [{user, assistant, source?}]}`. `<image>` in a question is the place of the next
image; where no question has one, all images stand in front of the first question.
"""

from __future__ import annotations

from typing import Any, cast

from lapilli.data.record import ImagePart, Part, Reason, TextPart, Turn, Verdict
from lapilli.data.sources.fields import (
    IMAGE_FIELDS,
    NOTHING,
    Inspection,
    Layout,
    inspect_fields,
    inspect_turns,
)
from lapilli.data.sources.turns import Turns, image_keys, lead, split_markers

__all__ = ["PAIRS", "inspect", "normalise"]

PAIRS = "texts"
UNDERSTOOD = frozenset({"id", "system", PAIRS, *IMAGE_FIELDS})
LAYOUT = Layout("", "user", frozenset({"user", "assistant"}))


def inspect(element: Any) -> Inspection:
    """What the fields come to that `normalise` does not read."""
    if not isinstance(element, dict):
        return NOTHING
    fields = cast("dict[str, Any]", element)
    return inspect_fields(fields, UNDERSTOOD) | inspect_turns(PAIRS, fields.get(PAIRS), LAYOUT)


def normalise(element: Any) -> Turns | Verdict:
    """One element to its turns and image keys, or the verdict that it cannot be one."""
    if not isinstance(element, dict):
        return Verdict(Reason.SCHEMA, f"expected an object, found {type(element).__name__}")
    fields = cast("dict[str, Any]", element)
    keys = image_keys(fields)
    if isinstance(keys, Verdict):
        return keys
    pairs = fields.get(PAIRS)
    if not isinstance(pairs, list):
        return Verdict(Reason.SCHEMA, f"expected a list under `{PAIRS}`")
    turns: list[Turn] = []
    images = 0
    for place, pair in enumerate(cast("list[Any]", pairs)):
        said = cast("dict[str, Any]", pair) if isinstance(pair, dict) else {}
        question, answer = said.get("user"), said.get("assistant")
        if not isinstance(question, str) or not isinstance(answer, str):
            detail = f"pair {place}: expected `user` and `assistant`, both text"
            return Verdict(Reason.SCHEMA, detail)
        parts = split_markers(question, images)
        images += sum(isinstance(part, ImagePart) for part in parts)
        turns += (Turn("user", parts), Turn("assistant", (TextPart(answer),)))
    if keys and turns and not images:
        first: tuple[Part, ...] = tuple(map(ImagePart, range(len(keys))))
        text = (TextPart("\n" + turns[0].text),) if turns[0].text else ()
        turns[0] = Turn("user", (*first, *text))
    return lead(fields, turns) or (tuple(turns), keys)
