"""Which of the conversation formats an object is that comes without one."""

from __future__ import annotations

from typing import Any, cast

from lapilli.data.record import Verdict
from lapilli.data.sources import llava, messages
from lapilli.data.sources.turns import Turns

__all__ = ["is_conversation", "normalise"]


def is_conversation(element: Any) -> bool:
    """Whether an object holds messages in one of the known places."""
    return isinstance(element, dict) and any(name in element for name in messages.LISTS)


def normalise(element: Any) -> Turns | Verdict:
    """`from` and `value` are LLaVA's, anything else is read as role and content."""
    fields = cast("dict[str, Any]", element) if isinstance(element, dict) else {}
    conversations = fields.get("conversations")
    first: Any = conversations[0] if isinstance(conversations, list) and conversations else None
    is_llava = isinstance(first, dict) and "from" in first
    return (llava if is_llava else messages).normalise(element)
