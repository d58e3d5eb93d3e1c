"""Records of messages with role and content: OpenAI's, and vlm_training's JSON lines.

The list is under `messages`, `hf_format_conversations` or `conversations`. Content is text or a
list of parts (`text`, `image_url`, `image`). Images are named in the parts, or beside the messages
under `image` or `images`. `<image>` in a user's content that is text is the place of the next
image; inside a part it is text, as everywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from lapilli.data.record import ImagePart, Part, Reason, Role, TextPart, Turn, Verdict, excerpt
from lapilli.data.sources.turns import Turns, image_keys, split_markers

__all__ = ["LISTS", "normalise"]

LISTS = ("messages", "hf_format_conversations", "conversations")
ROLES: dict[str, Role] = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
    "developer": "system",
}


def normalise(element: Any) -> Turns | Verdict:
    """One element to its turns and image keys, or the verdict that it cannot be one."""
    if not isinstance(element, dict):
        return Verdict(Reason.SCHEMA, f"expected an object, found {type(element).__name__}")
    fields = cast("dict[str, Any]", element)
    listed = image_keys(fields)
    if isinstance(listed, Verdict):
        return listed
    messages = next((fields[name] for name in LISTS if name in fields), None)
    if not isinstance(messages, list):
        return Verdict(Reason.SCHEMA, "expected a list under `messages`")
    found = _Images()
    turns: list[Turn] = []
    for place, message in enumerate(cast("list[Any]", messages)):
        turn = _turn(message, found)
        if isinstance(turn, Verdict):
            return Verdict(turn.reason, f"turn {place}: {turn.detail}")
        turns.append(turn)
    if not found.named:
        return tuple(turns), listed
    if found.unnamed or (listed and list(listed) != found.named):
        detail = "images are named in the parts and beside the messages; expected one of the two"
        return Verdict(Reason.SCHEMA, detail)
    return tuple(turns), tuple(found.named)


@dataclass
class _Images:
    """The images met so far: the keys that parts name, and places without a name."""

    named: list[str] = field(default_factory=list[str])
    unnamed: int = 0

    @property
    def count(self) -> int:
        return len(self.named) + self.unnamed


def _turn(message: Any, found: _Images) -> Turn | Verdict:
    if not isinstance(message, dict):
        return Verdict(Reason.SCHEMA, "expected an object with role and content")
    fields = cast("dict[str, Any]", message)
    speaker, content = fields.get("role"), fields.get("content")
    if not isinstance(speaker, str):
        other = "; `format: llava` reads from and value" if "from" in fields else ""
        return Verdict(Reason.SCHEMA, f"`role` must be text{other}")
    role = ROLES.get(speaker)
    if role is None:
        return Verdict(Reason.UNKNOWN_ROLE, f"'{excerpt(speaker)}'; known: {', '.join(ROLES)}")
    if isinstance(content, str):
        if role != "user":
            return Turn(role, (TextPart(content),))
        parts = split_markers(content, found.count)
        found.unnamed += sum(isinstance(part, ImagePart) for part in parts)
        return Turn(role, parts)
    if not isinstance(content, list):
        detail = f"`content` is a {type(content).__name__}; expected text or a list of parts"
        return Verdict(Reason.SCHEMA, detail)
    made: list[Part] = []
    for item in cast("list[Any]", content):
        part = _part(item, found)
        if isinstance(part, Verdict):
            return part
        made.append(part)
    return Turn(role, tuple(made))


def _part(item: Any, found: _Images) -> Part | Verdict:
    fields = cast("dict[str, Any]", item) if isinstance(item, dict) else {}
    kind = fields.get("type")
    if kind == "text" and isinstance(fields.get("text"), str):
        return TextPart(fields["text"])
    if kind not in ("image_url", "image"):
        return Verdict(
            Reason.SCHEMA,
            f"a part of type {excerpt(repr(kind))}; expected text with `text`, image_url or image",
        )
    index = found.count
    address = _address(fields)
    if address is None and kind == "image":
        found.unnamed += 1
        return ImagePart(index)
    key = _key(address)
    if isinstance(key, str):
        found.named.append(key)
        return ImagePart(index)
    return key


def _address(part: Mapping[str, Any]) -> Any:
    """What a part says of its image: a path or an address."""
    for name in ("image_url", "image", "path", "url"):
        if (value := part.get(name)) is not None:
            return cast("dict[str, Any]", value).get("url") if isinstance(value, dict) else value
    return None


def _key(address: Any) -> str | Verdict:
    """The image key an address is, or why it is none."""
    if not isinstance(address, str):
        return Verdict(Reason.SCHEMA, "an image without a path; expected image_url with a path")
    if address.startswith("data:"):
        detail = "the image is inside the record (data: URL); write it to a file and name that"
        return Verdict(Reason.SCHEMA, detail)
    if address.startswith(("http://", "https://")):
        detail = f"'{excerpt(address)}' is on the web; download it and name the file"
        return Verdict(Reason.IMAGE_MISSING, detail)
    return address.removeprefix("file://")
