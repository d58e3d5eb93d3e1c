"""Parse and bound the chat page's requests."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any, Literal, NoReturn, cast

from lapilli.data.errors import DataError
from lapilli.data.record import ImagePart, TextPart, Turn, excerpt, is_unicode
from lapilli.train.inference.assistant import Question
from pipelines.cli.settings import ChatLimits

__all__ = ["read_question"]

MIB = 1 << 20
STRUCTURE = (b"{", b"[", b",", b'"')  # each value and each string of JSON begins behind one
MOST_VALUES = 300_000  # 200 turns of text with many commas stay below; made of them: some 40 MB
ROLES: dict[str, Literal["user", "assistant"]] = {"user": "user", "assistant": "assistant"}


def read_question(
    body: bytes, limits: ChatLimits, *, prefix: str = "", marker: str = ""
) -> Question:
    """The conversation a page sends: `{"turns": [{"role", "text", "images"}], "images": [base64]}`.

    `images` of a turn is how many of the images stand before its text, or where it marks them.

    Args:
        body: What the page sends.
        limits: What is taken.
        prefix: Text before each question.
        marker: What marks an image's place beside `<image>`, as `Template.image_marker` says.

    Raises:
        DataError: Something else, or more than is taken.
    """
    found = _object(_json(body), "the conversation", ("turns", "images"))
    coded = _list(found["images"], "images", limits.images)
    turns = [
        _turn(value, f"turns[{number}]", limits)
        for number, value in enumerate(_list(found["turns"], "turns", limits.turns))
    ]
    if len(turns) % 2 == 0:
        raise DataError("nothing asked; expected a user's turn at the end")
    for number, (role, _, shown) in enumerate(turns):
        if role != ("user", "assistant")[number % 2] or (shown and role == "assistant"):
            raise DataError(
                f"turns[{number}] does not fit; expected user and assistant in turn, and images "
                "with the user"
            )
    total = sum(shown for _, _, shown in turns)
    if total != len(coded):
        raise DataError(
            f"turns and images do not fit: places for {total} images, {len(coded)} sent"
        )
    images = tuple(_image(value, f"images[{number}]") for number, value in enumerate(coded))
    return Question(_with_places(turns, prefix, marker), images, "your upload")


def _with_places(
    turns: list[tuple[Literal["user", "assistant"], str, int]], prefix: str, marker: str
) -> tuple[Turn, ...]:
    made: list[Turn] = []
    place = 0
    for role, text, shown in turns:
        said = prefix + text if role == "user" else text
        turn = Turn(role, (TextPart(said),) if said else ())
        if shown:
            (turn,) = Question.of(said, *[b""] * shown, name="your question", marker=marker).turns
        made.append(
            turn._replace(
                parts=tuple(
                    ImagePart(place + part.index) if isinstance(part, ImagePart) else part
                    for part in turn.parts
                )
            )
        )
        place += shown
    return tuple(made)


def _json(body: bytes) -> object:
    """A body's JSON; how many values it holds is bounded before any is made."""
    values = sum(body.count(mark) for mark in STRUCTURE)
    if values > MOST_VALUES:
        raise DataError(
            f"{values} values; at most {MOST_VALUES} are taken, shorten the conversation"
        )
    try:
        return json.loads(body.decode(), parse_constant=_no_number)
    except (ValueError, RecursionError):  # the second where it is nested deeply
        raise DataError("not a conversation; expected JSON with turns and images") from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(name)


def _object(value: object, what: str, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict) or {*cast("dict[str, Any]", value)} != {*names}:
        raise DataError(
            f"not a conversation: {what} is {_shown(value)}; expected an object with "
            f"{', '.join(names)}"
        )
    return cast("dict[str, Any]", value)


def _list(value: object, what: str, most: int) -> list[object]:
    if not isinstance(value, list):
        raise DataError(f"not a conversation: {what} is {_shown(value)}; expected a list")
    found = cast("list[object]", value)
    if len(found) > most:
        raise DataError(f"{len(found)} {what}; at most {most}, start a new conversation")
    return found


def _turn(
    value: object, what: str, limits: ChatLimits
) -> tuple[Literal["user", "assistant"], str, int]:
    found = _object(value, what, ("role", "text", "images"))
    role, text, shown = found["role"], found["text"], found["images"]
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{what}.role is {_shown(role)}; expected user or assistant")
    if not isinstance(text, str) or not is_unicode(text):
        raise DataError(f"{what}.text is {_shown(text)}; expected Unicode text")
    if isinstance(shown, bool) or not isinstance(shown, int) or not 0 <= shown <= limits.images:
        raise DataError(
            f"{what}.images is {_shown(shown)}; expected a whole number, at most {limits.images}"
        )
    return ROLES[role], text, shown


def _image(value: object, what: str) -> bytes:
    if isinstance(value, str):
        try:
            return base64.b64decode(value, validate=True)
        except (ValueError, binascii.Error):
            pass
    raise DataError(f"not a conversation: {what} is {_shown(value)}; expected base64")


def _shown(value: object) -> str:
    """The beginning of a value; of a large one, its kind."""
    if isinstance(value, str):
        return excerpt(value, 40)
    if isinstance(value, (dict, list)):
        return "a list" if isinstance(value, list) else "an object"
    return excerpt(str(value), 40)
