"""Caption records: an image, a question (or a recipe's prompt) and an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from lapilli.data.config import SourceConfig
from lapilli.data.record import ImagePart, Reason, TextPart, Turn, Verdict, excerpt
from lapilli.data.seeded import draw
from lapilli.data.sources.fields import HARMLESS, NOTHING, Inspection, inspect_fields
from lapilli.data.sources.turns import Turns, split_markers

__all__ = ["caption_turns", "choose", "draw_prompt", "inspect", "left_over", "normalise"]

UNDERSTOOD = frozenset({"id", "image", "question", "answer"})
OTHERS = "others"  # what a file says of an image beside what its format reads


def left_over(fields: Mapping[str, Any], understood: frozenset[str]) -> dict[str, Any]:
    """The fields that a format does not read and that are not harmless, for its elements."""
    found = {n: fields[n] for n in fields if n not in understood and n not in HARMLESS}
    return {OTHERS: found} if found else {}


def inspect(element: Any) -> Inspection:
    """What the fields come to that `normalise` does not read."""
    if not isinstance(element, dict) or "defect" in element:
        return NOTHING
    fields = cast("dict[str, Any]", element)
    if not fields.keys() >= UNDERSTOOD:
        return NOTHING  # no caption, and its verdict shows it whole
    others = fields.get(OTHERS)
    if not isinstance(others, dict):
        return NOTHING
    return inspect_fields(cast("dict[str, Any]", others), frozenset(), lambda: True)


def choose(captions: Sequence[Any], config: SourceConfig, name: str) -> list[Any]:
    """Of an image's captions all, or the one the seed draws: a blank one only if all are."""
    if config.captions == "all" or not captions:
        return list(captions)
    filled = [caption for caption in captions if not isinstance(caption, str) or caption.strip()]
    able = filled or captions
    return [able[draw(config.seed, "caption", config.name, name) % len(able)]]


def draw_prompt(config: SourceConfig, name: str) -> str:
    """The question for the caption of this name: one of the recipe's prompts, or none."""
    if not config.prompts:
        return ""
    return config.prompts[draw(config.seed, "prompt", config.name, name) % len(config.prompts)]


def normalise(element: Any) -> Turns | Verdict:
    """`{id, image, question, answer}` to two turns, or what a reader found wrong with it."""
    fields = cast("dict[str, Any]", element) if isinstance(element, dict) else {}
    if isinstance(defect := fields.get("defect"), str):
        return Verdict(Reason.SCHEMA, excerpt(defect, 400))
    image, question, answer = (fields.get(name) for name in ("image", "question", "answer"))
    if isinstance(image, str) and isinstance(question, str) and isinstance(answer, str):
        return caption_turns(question, answer, 1), (image,)
    detail = f"expected an image with captions, found {_shape(element)}"
    return Verdict(Reason.SCHEMA, excerpt(detail, 400))


def caption_turns(question: str, answer: str, images: int) -> tuple[Turn, ...]:
    """A question and its answer; images the question does not mark stand in front of it."""
    parts = split_markers(question, 0)
    if not any(isinstance(part, ImagePart) for part in parts):
        text = (TextPart("\n" + question),) if question else ()
        parts = (*map(ImagePart, range(images)), *text)
    return (Turn("user", parts), Turn("assistant", (TextPart(answer),)))


def _shape(element: Any) -> str:
    if not isinstance(element, dict):
        return f"a {type(element).__name__}"
    fields = cast("Mapping[str, Any]", element)
    return "an object with " + (", ".join(sorted(map(str, fields))[:8]) or "nothing")
