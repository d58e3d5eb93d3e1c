"""A tokenizer's own chat template: its frames, found once for each order of roles.

A chat template is a program that turns a conversation into one string. It is asked to write
stand-ins in the place of what is said; whatever stands between them is frame. So what a record
says is never searched in a string, text stays text, and Jinja runs once for each order of roles.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lapilli.data.errors import DataError
from lapilli.data.record import Part, Record, TextPart, Turn
from lapilli.data.render import Eaten, Page, Segment, split_turns

__all__ = ["ChatWriter"]

# Private-use characters: no template strips, cuts or compares them.
_OPEN, _CLOSE = "\ue0a0", "\ue0a1"
_SPACES = " \t\n\r"


@dataclass(frozen=True)
class ChatFrames:
    """How a chat template frames one order of roles.

    Attributes:
        frames: What stands before each thing said and, as the last one, behind all of them.
        stripped: For each thing said the white space the template takes off its start and its end.
    """

    frames: tuple[str, ...]
    stripped: tuple[tuple[str, str], ...]


class ChatWriter:
    """Writes records down by a chat template.

    An answer is trained with what the template puts behind it up to the first special token, the
    end marker. Where it puts none, with what stands behind every answer, the last as the others.
    """

    def __init__(self, tokenizer: Any, source: str, eaten: Eaten, *, train_all: bool) -> None:
        """For one tokenizer and the Jinja source of a template."""
        if not hasattr(tokenizer, "apply_chat_template"):
            raise DataError(
                "template: a chat template needs a transformers tokenizer; load it with "
                "load_tokenizer, or take another template"
            )
        if "strftime_now" in source:
            raise DataError(
                "template: the chat template writes today's date, so the same input would give "
                "other tokens tomorrow; put a copy with a fixed date into a .yaml file as `chat`"
            )
        self._tokenizer = tokenizer
        self._source = source
        self._eaten = eaten
        self._train_all = train_all
        names = sorted(_special_names(tokenizer), key=len, reverse=True)
        self._specials = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")
        self._frames = lru_cache(maxsize=1024)(self._find_frames)
        self._end_of_answer = lru_cache(maxsize=1024)(self._find_end)

    def render(self, record: Record) -> list[Segment]:
        """Write the record down, as `render.render` does by frames.

        Raises:
            DataError: The template refuses this order of roles, or leaves out what was said.
        """
        system, turns = split_turns(record)
        said = list(turns)
        if system is not None:
            said.insert(0, Turn("system", (TextPart(system),)))
        roles = tuple(turn.role for turn in said)
        found = self._frames(roles)
        page = Page(train_all=self._train_all, eaten=self._eaten)
        end = ""
        for place, turn in enumerate(said):
            self._write(page, found.frames[place].removeprefix(end))
            is_answer = turn.role == "assistant"
            trained = is_answer if turn.trains else None
            page.parts(_strip(turn.parts, *found.stripped[place]), trained=trained)
            end = self._end_of_answer(found.frames[place + 1], roles) if is_answer else ""
            self._write(page, end, trained=trained)
        self._write(page, found.frames[-1].removeprefix(end))
        return page.finish()

    @property
    def answer_end(self) -> str:
        """What is trained behind an answer, as a template's frame."""
        roles = ("user", "assistant")
        end = self._end_of_answer(self._frames(roles).frames[-1], roles)
        return self._specials.sub(r"{\1}", end)

    def _write(self, page: Page, frame: str, *, trained: bool | None = False) -> None:
        # Splitting on one group alternates: text, special, text, ..., text.
        for number, piece in enumerate(self._specials.split(frame)):
            if number % 2:
                page.special(piece, trained=trained)
            else:
                page.write(piece, trained=trained)

    def _find_end(self, frame: str, roles: tuple[str, ...]) -> str:
        """The trained beginning of the frame that follows an answer."""
        system = roles[:1] if roles[:1] == ("system",) else ()
        following = self._frames((*system, *("user", "assistant") * 2)).frames[-3::2]
        pieces = [self._specials.split(text) for text in (frame, *following)]
        end = ""
        for number, column in enumerate(zip(*pieces, strict=False)):
            same = _common_start(column)
            if number % 2:
                return end + column[0] if len(set(column)) == 1 else end
            end += same
            if any(piece != same for piece in column):
                break
        return end

    def _find_frames(self, roles: tuple[str, ...]) -> ChatFrames:
        """Let the template write stand-ins, bare and with white space before or behind them."""
        frames = self._ask(roles, "", "")
        starts, ends = [""] * len(roles), [""] * len(roles)
        for space in _SPACES:
            before, behind = self._ask(roles, space, ""), self._ask(roles, "", space)
            for place in range(len(roles)):
                if before[place] == frames[place]:
                    starts[place] += space
                if behind[place + 1] == frames[place + 1]:
                    ends[place] += space
        return ChatFrames(tuple(frames), tuple(zip(starts, ends, strict=True)))

    def _ask(self, roles: tuple[str, ...], before: str, behind: str) -> list[str]:
        """The template's own text around stand-ins that have white space around them."""
        names = [f"{_OPEN}{place}{_CLOSE}" for place in range(len(roles))]
        messages = [
            {"role": role, "content": f"{before}{name}{behind}"}
            for role, name in zip(roles, names, strict=True)
        ]
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, chat_template=self._source, tokenize=False
            )
        except Exception as error:  # a template is a program of others: it may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"template: the tokenizer's chat template refuses the turns {', '.join(roles)} "
                f"({reason}); take another template"
            ) from error
        pieces = re.split(f"{_OPEN}([0-9]+){_CLOSE}", text)
        if pieces[1::2] != [str(place) for place in range(len(roles))]:
            raise DataError(
                f"template: the tokenizer's chat template does not write each of the turns "
                f"{', '.join(roles)} once, in order; take another template"
            )
        return pieces[::2]


def _special_names(tokenizer: Any) -> set[str]:
    """The special tokens that a frame may hold."""
    added: dict[int, Any] = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {token.content for token in added.values() if token.special}


def _strip(parts: tuple[Part, ...], start: str, end: str) -> tuple[Part, ...]:
    """A turn without the white space its template takes off; an image is no white space."""
    kept = list(parts)
    while kept and start and isinstance(kept[0], TextPart):
        # A template that takes off all four takes off what Python calls white space.
        text = kept[0].text.lstrip(None if start == _SPACES else start)
        kept[:1] = [TextPart(text)] if text else []
        if text:
            break
    while kept and end and isinstance(kept[-1], TextPart):
        text = kept[-1].text.rstrip(None if end == _SPACES else end)
        kept[-1:] = [TextPart(text)] if text else []
        if text:
            break
    return tuple(kept)


def _common_start(texts: tuple[str, ...]) -> str:
    """What all of the texts begin with."""
    length = 0
    for letters in zip(*texts, strict=False):
        if len(set(letters)) > 1:
            break
        length += 1
    return texts[0][:length]
