"""Detect the conversation format of an object that does not name one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeGuard, cast

from lapilli.data.record import Role, Verdict
from lapilli.data.sources import captions, llava, messages, texts
from lapilli.data.sources.fields import Inspection
from lapilli.data.sources.turns import Turns

__all__ = ["LISTS", "inspect", "is_conversation", "normalise", "with_roles"]

Inspect: TypeAlias = Callable[[Any], Inspection]
Normalise: TypeAlias = Callable[[Any], Turns | Verdict]

LISTS = (*messages.LISTS, texts.PAIRS)
# How a turn spells who speaks.
SPELT: dict[str, dict[Role, str]] = {
    "from": {"user": "human", "assistant": "gpt", "system": "system"},
    "role": {"user": "user", "assistant": "assistant", "system": "system"},
}


def is_conversation(element: Any) -> TypeGuard[dict[str, Any]]:
    """Whether an object holds a conversation in one of the known places."""
    return isinstance(element, dict) and any(name in element for name in LISTS)


def inspect(element: Any) -> Inspection:
    """What the fields come to that `normalise` does not read."""
    return _form(element)[0](element)


def normalise(element: Any) -> Turns | Verdict:
    """`from` and `value` are LLaVA's, `texts` are pairs, anything else is role and content."""
    return _form(element)[1](element)


def _form(element: Any) -> tuple[Inspect, Normalise]:
    fields = cast("dict[str, Any]", element) if isinstance(element, dict) else {}
    if "answer" in fields and not any(name in fields for name in LISTS):
        return captions.inspect, captions.normalise
    if texts.PAIRS in fields and not any(name in fields for name in messages.LISTS):
        return texts.inspect, texts.normalise
    conversations = fields.get("conversations")
    first: Any = conversations[0] if isinstance(conversations, list) and conversations else None
    if isinstance(first, dict) and "from" in first:
        return llava.inspect, llava.normalise
    return messages.inspect, messages.normalise


def with_roles(element: Any, roles: dict[str, Role]) -> Any:
    """An element whose turns name their speakers as the format does, where `roles` names others."""
    if not roles or not isinstance(element, dict):
        return element
    fields = dict(cast("dict[str, Any]", element))
    for name in messages.LISTS:
        if isinstance(fields.get(name), list):
            fields[name] = [_with_role(turn, roles) for turn in fields[name]]
    if isinstance(fields.get("json"), dict):  # of a WebDataset sample
        fields["json"] = with_roles(fields["json"], roles)
    return fields


def _with_role(turn: Any, roles: dict[str, Role]) -> Any:
    if not isinstance(turn, dict):
        return turn
    fields = cast("dict[str, Any]", turn)
    for name, spelt in SPELT.items():
        speaker = fields.get(name)
        if isinstance(speaker, str) and speaker in roles:
            return {**fields, name: spelt[roles[speaker]]}
    return fields
