"""Parse and bound a chat completion's request, in OpenAI's form."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn, cast

from lapilli.data.errors import DataError
from lapilli.data.record import ImagePart, Part, TextPart, Turn, excerpt, is_unicode
from lapilli.model.config import Decoding
from lapilli.train.inference.assistant import Question
from pipelines.cli.settings import ServeLimits

__all__ = [
    "MIB",
    "CompletionRequest",
    "InvalidRequest",
    "QuestionForm",
    "UnknownModel",
    "read_request",
]

MIB = 1 << 20
STRUCTURE = (b"{", b"[", b",", b'"')  # each value and each string of JSON begins behind one
MOST_VALUES = 300_000  # 200 turns of text with many commas stay below; made of them: some 40 MB
MOST_STOPS, MOST_TOP = 4, 20  # OpenAI's own bounds
MOST_STOP_LETTERS = 1000
ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant",
}  # fmt: skip
# What changes nothing here, at any value.
WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier"}
# What would change the answer and is not here: the value that means it is not used.
NOT_HERE: dict[str, tuple[object, ...]] = {
    "n": (1,), "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},),
    "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none", "auto"),
    "functions": ([],), "function_call": ("none", "auto"), "parallel_tool_calls": (True, False),
    "modalities": (["text"],), "reasoning_effort": ("none",),
}  # fmt: skip


@dataclass(frozen=True)
class QuestionForm:
    """How a user's text is written down.

    Attributes:
        prefix: Stands before it.
        marker: Marks the place of an image in it, as `Template.image_marker` says; without one,
            images stand where the request has them.
    """

    prefix: str = ""
    marker: str = ""


class InvalidRequest(DataError):
    """A request that is not answered; `param` is the field that is wrong."""

    def __init__(self, line: str, param: str = "", code: str = "") -> None:
        super().__init__(line)
        self.param, self.code = param, code


class UnknownModel(InvalidRequest):
    """A request for a model that is not served."""


@dataclass(frozen=True)
class CompletionRequest:
    """What is asked, and how it is answered.

    Attributes:
        question: Conversation and images.
        decoding: How the answer is written.
        stop: Texts that end it.
        streams: Whether pieces are sent as they are written.
        includes_usage: Whether a stream ends with the numbers of tokens.
        top_logprobs: Likeliest tokens that are told at each place; None for no log probabilities.
    """

    question: Question
    decoding: Decoding
    stop: tuple[str, ...] = ()
    streams: bool = False
    includes_usage: bool = False
    top_logprobs: int | None = None


def read_request(
    body: bytes,
    model: str,
    decoding: Decoding,
    limits: ServeLimits,
    asking: QuestionForm = QuestionForm(),
) -> CompletionRequest:
    """A chat completion's request.

    Args:
        body: JSON.
        model: The name that is served.
        decoding: What holds where the request says nothing.
        limits: What is taken.
        asking: How a user's text is written down.

    Raises:
        UnknownModel: Another model.
        InvalidRequest: Something else, more than is taken, or what is not supported.
    """
    value = _json(body)
    if not isinstance(value, dict):
        raise InvalidRequest(f"the request is {_shown(value)}; expected an object of JSON")
    found = _Fields(cast("dict[str, Any]", value))
    asked = found.text("model", None)
    if asked != model:
        code = "model_not_found"
        raise UnknownModel(f"the model {excerpt(asked, 60)!r} is not here: {model} is", code=code)
    request = CompletionRequest(
        question=_question(found.take("messages", []), limits, asking),
        decoding=_decoding(found, decoding),
        stop=_stop(found.take("stop", None)),
        streams=found.flag("stream"),
        includes_usage=_includes_usage(found.take("stream_options", None)),
        top_logprobs=_top_logprobs(found),
    )
    found.finish()
    return request


class _Fields:
    """A request's fields, each of which is taken once."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._left = {name: value for name, value in values.items() if value is not None}

    def take(self, name: str, default: Any) -> Any:
        return self._left.pop(name, default)

    def text(self, name: str, default: str | None) -> str:
        value = self.take(name, default)
        if not isinstance(value, str) or not is_unicode(value):
            raise InvalidRequest(f"{name} is {_shown(value)}; expected a text", name)
        return value

    def flag(self, name: str) -> bool:
        value = self.take(name, False)
        if not isinstance(value, bool):
            raise InvalidRequest(f"{name} is {_shown(value)}; expected true or false", name)
        return value

    def number(self, name: str, default: float, least: float, most: float) -> float:
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InvalidRequest(f"{name} is {_shown(value)}; expected a number", name)
        if not least <= value <= most:
            said = f"{name} is {_shown(value)}; expected {least:g} to {most:g}"
            raise InvalidRequest(said, name)
        return value

    def whole(self, name: str, default: int, least: int, most: int) -> int:
        value = self.number(name, default, least, most)
        if value != int(value):
            raise InvalidRequest(f"{name} is {value:g}; expected a whole number", name)
        return int(value)

    def finish(self) -> None:
        """Require that nothing is left that would change the answer."""
        for name, value in self._left.items():
            if name in WITHOUT_EFFECT or value in NOT_HERE.get(name, ()):
                continue
            if name in NOT_HERE:
                said = f"{name} is {_shown(value)}, which is not supported; leave it out"
                raise InvalidRequest(said, name, "unsupported_parameter")
            said = f"{excerpt(name, 40)!r} is no field of a chat completion; leave it out"
            raise InvalidRequest(said, excerpt(name, 40), "unknown_parameter")


def _decoding(found: _Fields, default: Decoding) -> Decoding:
    most = default.max_new_tokens
    for name in ("max_tokens", "max_completion_tokens"):  # the second is the newer name
        most = found.whole(name, most, 1, 10**9)
    top_p = found.number("top_p", default.top_p, 0, 1)
    if top_p == 0:
        raise InvalidRequest("top_p is 0; expected more", "top_p")
    return replace(
        default,
        max_new_tokens=most,
        temperature=found.number("temperature", default.temperature, 0, 2),
        top_p=top_p,
        seed=found.whole("seed", default.seed, -(2**63), 2**63 - 1),
    )


def _stop(value: object) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        said = f"stop is {_shown(value)}; expected a text or a list of texts"
        raise InvalidRequest(said, "stop")
    found = cast("list[str]", texts)
    if len(found) > MOST_STOPS or not all(0 < len(text) <= MOST_STOP_LETTERS for text in found):
        said = f"stop: at most {MOST_STOPS} texts of 1 to {MOST_STOP_LETTERS} letters"
        raise InvalidRequest(said, "stop")
    return tuple(found)


def _includes_usage(value: object) -> bool:
    if value is None:
        return False
    fields: dict[str, object] = cast("dict[str, object]", value) if isinstance(value, dict) else {}
    wanted = fields.get("include_usage", False)
    if not isinstance(value, dict) or not isinstance(wanted, bool):
        said = f"stream_options is {_shown(value)}; expected an object with include_usage"
        raise InvalidRequest(said, "stream_options")
    return wanted


def _top_logprobs(found: _Fields) -> int | None:
    wanted, most = found.flag("logprobs"), found.whole("top_logprobs", 0, 0, MOST_TOP)
    if most and not wanted:
        raise InvalidRequest("top_logprobs without logprobs; set logprobs true", "top_logprobs")
    return most if wanted else None


def _question(value: object, limits: ServeLimits, asking: QuestionForm) -> Question:
    """The conversation: turns in order, and the bytes of their images."""
    messages = _list(value, "messages", limits.turns)
    images: list[bytes] = []
    turns = [
        _written(_turn(message, f"messages[{number}]", images, limits), asking)
        for number, message in enumerate(messages)
    ]
    spoken = [turn.role for turn in turns if turn.role != "system"]
    for number, role in enumerate(spoken):
        if role != ("user", "assistant")[number % 2]:
            raise InvalidRequest(
                "messages do not fit; expected a system message at most, at the front, then user "
                "and assistant in turn",
                "messages",
            )
    if any(turn.role == "system" for turn in turns[1:]):
        raise InvalidRequest("messages do not fit; a system message is the first", "messages")
    if len(spoken) % 2 == 0:
        raise InvalidRequest("nothing asked; expected a user's message at the end", "messages")
    return Question(tuple(turns), tuple(images), "your upload")


def _written(turn: Turn, asking: QuestionForm) -> Turn:
    """A user's turn with the prefix, and with its images where its text marks them.

    Raises:
        DataError: It marks more or fewer places than it has images.
    """
    if turn.role != "user":
        return turn
    text = "".join(part.text for part in turn.parts if isinstance(part, TextPart))
    images = [part.index for part in turn.parts if isinstance(part, ImagePart)]
    if images and asking.marker and asking.marker in text:
        nothing = [b""] * len(images)
        said = Question.of(
            asking.prefix + text, *nothing, name="your question", marker=asking.marker
        )
        parts = said.turns[0].parts
        placed = (ImagePart(images[p.index]) if isinstance(p, ImagePart) else p for p in parts)
        return turn._replace(parts=tuple(placed))
    if not asking.prefix:
        return turn
    first = next(
        (n for n, part in enumerate(turn.parts) if isinstance(part, TextPart)), len(turn.parts)
    )
    parts = [*turn.parts]
    before = parts[first : first + 1]
    said = asking.prefix + "".join(p.text for p in before if isinstance(p, TextPart))
    return turn._replace(parts=(*parts[:first], TextPart(said), *parts[first + 1 :]))


def _turn(value: object, what: str, images: list[bytes], limits: ServeLimits) -> Turn:
    found = _object(value, what, {"role", "content", "name", "refusal"})
    role = found.get("role")
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(ROLES)
        raise InvalidRequest(f"{what}.role is {_shown(role)}; expected one of {known}", what)
    content = found.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    parts: list[Part] = []
    for number, part in enumerate(_list(content, f"{what}.content", limits.turns)):
        parts += _part(part, f"{what}.content[{number}]", ROLES[role], images, limits)
    return Turn(ROLES[role], tuple(parts))


def _part(
    value: object, what: str, role: str, images: list[bytes], limits: ServeLimits
) -> list[Part]:
    found = _object(value, what, {"type", "text", "image_url"})
    kind = found.get("type")
    if kind == "text":
        text = found.get("text")
        if not isinstance(text, str) or not is_unicode(text):
            said = f"{what}.text is {_shown(text)}; expected Unicode text"
            raise InvalidRequest(said, what)
        return [TextPart(text)] if text else []
    if kind != "image_url":
        said = f"{what}.type is {_shown(kind)}; expected text or image_url"
        raise InvalidRequest(said, what)
    if role != "user":
        raise InvalidRequest(f"{what}: an image of {role}; expected images with the user", what)
    if len(images) >= limits.images:
        said = f"more than {limits.images} images; at most {limits.images}"
        raise InvalidRequest(said, what)
    images.append(_image(found.get("image_url"), f"{what}.image_url"))
    return [ImagePart(len(images) - 1)]


def _image(value: object, what: str) -> bytes:
    """The bytes of a data URL. Nothing is fetched and no file is opened."""
    found = _object({"url": value} if isinstance(value, str) else value, what, {"url", "detail"})
    url = found.get("url")
    if isinstance(url, str) and url[:5].lower() == "data:":
        head, comma, data = url.partition(",")
        if comma and head[5:11].lower() == "image/" and head.lower().endswith(";base64"):
            try:
                return base64.b64decode(data, validate=True)
            except (ValueError, binascii.Error):
                pass
    raise InvalidRequest(
        f"{what}.url is {_shown(url)}; expected data:image/...;base64,... (nothing is fetched)",
        what, "invalid_image_url",
    )  # fmt: skip


def _json(body: bytes) -> object:
    """A body's JSON; how many values it holds is bounded before any is made."""
    values = sum(body.count(mark) for mark in STRUCTURE)
    if values > MOST_VALUES:
        raise InvalidRequest(
            f"{values} values; at most {MOST_VALUES} are taken, shorten the conversation"
        )
    try:
        return json.loads(body.decode(), parse_constant=_no_number)
    except (ValueError, RecursionError):  # the second where it is nested deeply
        raise InvalidRequest("the request is not JSON") from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(name)


def _object(value: object, what: str, names: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{what} is {_shown(value)}; expected an object", what)
    found = cast("dict[str, Any]", value)
    if unknown := next((name for name in found if name not in names), ""):
        known = ", ".join(sorted(names))
        said = f"{what} has {excerpt(unknown, 40)!r}; expected of {known}"
        raise InvalidRequest(said, what)
    return found


def _list(value: object, what: str, most: int) -> list[object]:
    if not isinstance(value, list):
        raise InvalidRequest(f"{what} is {_shown(value)}; expected a list", what)
    found = cast("list[object]", value)
    if len(found) > most:
        raise InvalidRequest(f"{what}: {len(found)}; at most {most}", what)
    return found


def _shown(value: object) -> str:
    """The beginning of a value; of a large one, its kind."""
    if isinstance(value, str):
        return excerpt(value, 40)
    if isinstance(value, (dict, list)):
        return "a list" if isinstance(value, list) else "an object"
    return excerpt(str(value), 40)
