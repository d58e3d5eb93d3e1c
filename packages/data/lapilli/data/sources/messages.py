"""Records of messages with role and content: OpenAI's format and vlm_training's JSON lines.

The list is under `messages`, `hf_format_conversations` or `conversations`. Content is text or a
list of parts (`text`, `image_url`, `image`). Images are named in the parts, in the message under
`images`, or beside the messages under `image` or `images`. `<image>` in a user's content that is
text is the place of the next image; inside a part it is text, as everywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from lapilli.data.record import ImagePart, Part, Reason, Role, TextPart, Turn, Verdict, excerpt
from lapilli.data.sources.fields import (
    IMAGE_FIELDS,
    NOTHING,
    TURN_EXTRAS,
    Inspection,
    Layout,
    inspect_fields,
    inspect_turns,
    is_empty,
    role_error,
    turn_extras,
    words,
)
from lapilli.data.sources.turns import Turns, image_keys, lead, split_markers

__all__ = ["LISTS", "inspect", "normalise"]

LISTS = ("messages", "hf_format_conversations", "conversations")
ROLES: dict[str, Role] = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
    "developer": "system",
}
UNDERSTOOD = {name: frozenset({"id", "system", name, *IMAGE_FIELDS}) for name in LISTS}
LAYOUT = Layout(
    "role",
    "content",
    frozenset({"role", "content", *IMAGE_FIELDS, *TURN_EXTRAS}),
    frozenset({"type", "text", "image", "image_url", "path", "url", "index"}),
)
TEXTS = ("text", "input_text", "output_text")
IMAGES = ("image_url", "image", "input_image")
ADDRESSES = ("image_url", "image", "path", "url")
# Parts of other kinds that are known, and that no record here can express.
OTHERS = words(
    """
    video video_url input_video audio audio_url input_audio file input_file document tool_use
    tool_call tool_result tool_response function_call function_call_output thinking reasoning
    redacted_thinking refusal box bbox
    """
)


def inspect(element: Any) -> Inspection:
    """What the fields come to that `normalise` does not read."""
    if not isinstance(element, dict):
        return NOTHING
    fields = cast("dict[str, Any]", element)
    name = next((name for name in LISTS if name in fields), LISTS[0])
    turns = fields.get(name)
    found = inspect_fields(fields, UNDERSTOOD[name], lambda: _name_images(turns))
    return found | inspect_turns(name, turns, LAYOUT)


def _name_images(messages: Any) -> bool:
    """Whether some message brings images of its own."""
    for message in cast("list[Any]", messages) if isinstance(messages, list) else ():
        fields = cast("dict[str, Any]", message) if isinstance(message, dict) else {}
        parts = fields.get("content")
        for part in cast("list[Any]", parts) if isinstance(parts, list) else ():
            if isinstance(part, dict) and cast("dict[str, Any]", part).get("type") in IMAGES:
                return True
        if not all(is_empty(fields.get(name)) for name in IMAGE_FIELDS):
            return True
    return False


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
    if refused := lead(fields, turns):
        return refused
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
    speaker = fields.get("role")
    if not isinstance(speaker, str):
        other = "; `format: llava` reads from and value" if "from" in fields else ""
        return Verdict(Reason.SCHEMA, f"`role` must be text{other}")
    role = ROLES.get(speaker)
    if role is None:
        return role_error(speaker, ROLES)
    if len(fields) == 2:
        parts = _content(fields.get("content"), role, found)
        return parts if isinstance(parts, Verdict) else Turn(role, parts)
    keys, extras = image_keys(fields), turn_extras(fields, role)
    if isinstance(keys, Verdict) or isinstance(extras, Verdict):
        return keys if isinstance(keys, Verdict) else cast("Verdict", extras)
    parts = (
        _with_images(fields.get("content"), role, keys, found)
        if keys
        else _content(fields.get("content"), role, found)
    )
    return parts if isinstance(parts, Verdict) else Turn(role, parts, *extras)


def _content(content: Any, role: Role, found: _Images) -> tuple[Part, ...] | Verdict:
    """What a message says, text or parts."""
    if isinstance(content, str):
        if role != "user":
            return (TextPart(content),)
        parts = split_markers(content, found.count)
        found.unnamed += sum(isinstance(part, ImagePart) for part in parts)
        return parts
    if not isinstance(content, list):
        detail = f"`content` is a {type(content).__name__}; expected text or a list of parts"
        return Verdict(Reason.SCHEMA, detail)
    made: list[Part] = []
    for item in cast("list[Any]", content):
        part = _part(item, found)
        if isinstance(part, Verdict):
            return part
        made.append(part)
    return tuple(made)


def _with_images(
    content: Any, role: Role, keys: tuple[str, ...], found: _Images
) -> tuple[Part, ...] | Verdict:
    """What a message says that brings its own images: at its markers, or in front without any."""
    addresses = [_key(key) for key in keys]
    refused = next((key for key in addresses if isinstance(key, Verdict)), None)
    if refused is not None:
        return refused
    before = found.count
    own = _Images([str(index) for index in range(before)])  # so that places go on from there
    parts = _content(content, role, own)
    if isinstance(parts, Verdict):
        return parts
    if role != "user" or len(own.named) > before or own.unnamed not in (0, len(keys)):
        detail = f"{own.count - before} images are placed in the content, {len(keys)} in `images`"
        return Verdict(Reason.IMAGE_MARKER_COUNT, f"{detail} of a message of {role}")
    found.named += cast("list[str]", addresses)
    if own.unnamed:
        return parts
    places = tuple(ImagePart(before + number) for number in range(len(keys)))
    return (*places, *((TextPart("\n"), *parts) if parts else ()))


def _part(item: Any, found: _Images) -> Part | Verdict:
    fields = cast("dict[str, Any]", item) if isinstance(item, dict) else {}
    kind, text = fields.get("type"), fields.get("text")
    if kind in TEXTS and isinstance(text, str):
        if any(not is_empty(fields.get(name)) for name in ADDRESSES):
            return Verdict(Reason.SCHEMA, "a part of text that names an image; write two parts")
        return TextPart(text)
    if kind not in IMAGES:
        shown = excerpt(repr(kind))
        if isinstance(kind, str) and kind in OTHERS:
            return Verdict(Reason.UNSUPPORTED_FIELD, f"a part of `type` {shown}")
        detail = f"a part of type {shown}; expected text with `text`, image_url or image"
        return Verdict(Reason.SCHEMA, detail)
    if not is_empty(text):
        return Verdict(Reason.SCHEMA, "a part of an image that says a text; write two parts")
    address, index = _address(fields), fields.get("index")
    if address is None and kind == "image":
        place = found.count if index is None else index
        if type(place) is not int:
            return Verdict(Reason.SCHEMA, "`index` of an image must be a number")
        found.unnamed += 1
        return ImagePart(place)
    key = _key(address)
    if isinstance(key, str):
        found.named.append(key)
        return ImagePart(found.count - 1)
    return key


def _address(part: Mapping[str, Any]) -> Any:
    """What a part says of its image: a path or an address."""
    for name in ADDRESSES:
        value = part.get(name)
        if isinstance(value, dict):
            fields = cast("dict[str, Any]", value)
            value = fields.get("url", fields.get("path"))
        if value is not None:
            return value
    return None


def _key(address: Any) -> str | Verdict:
    """The image key of an address, or why it has none."""
    if not isinstance(address, str):
        return Verdict(Reason.SCHEMA, "an image without a path; expected image_url with a path")
    if address.startswith("data:"):
        detail = "the image is inside the record (data: URL); write it to a file and name that"
        return Verdict(Reason.SCHEMA, detail)
    if address.startswith(("http://", "https://")):
        detail = f"'{excerpt(address)}' is on the web; download it and name the file"
        return Verdict(Reason.IMAGE_MISSING, detail)
    return address.removeprefix("file://")
