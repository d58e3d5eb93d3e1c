"""Render records with a tokenizer's own chat template and mark the trained text.

`chat_places` runs the template and finds the turns in its text. The text outside of them is the
template's own: a special token spelt there is one, while text of a record stays text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from lapilli.data.errors import DataError
from lapilli.data.record import ImagePart, Part, Record, TextPart, Turn
from lapilli.data.text.chat_template.turn_spans import (
    RenderedTurns,
    Said,
    TemplateRefusal,
    TemplateRunner,
    TurnSpans,
)
from lapilli.data.text.plain_tokenizer import PlainTokenizer
from lapilli.data.text.rendering import Eaten, Segment, SegmentWriter, split_turns

__all__ = ["ChatWriter"]

_STAND_INS = range(0xE0A2, 0xF8FF)  # private use; one that no text contains marks an image


class ChatWriter:
    """Writes records down by a chat template.

    An answer is trained with what the template puts behind it up to the first special token, the
    end marker. Where it puts none, with the text after every answer, the last as the others.
    """

    def __init__(self, tokenizer: Any, source: str, eaten: Eaten, *, train_all: bool) -> None:
        """For one tokenizer and the Jinja source of a template.

        Raises:
            DataError: The tokenizer has no chat templates, or this one can write no conversation.
        """
        if not hasattr(tokenizer, "apply_chat_template"):
            raise DataError(
                "template: a chat template needs a transformers tokenizer; load it with "
                "load_tokenizer, or take another template"
            )
        if isinstance(tokenizer, PlainTokenizer):
            tokenizer.apply_chat_template()
        self._runner = TemplateRunner(tokenizer, source)
        if fault := self._runner.fault():
            raise DataError(f"template: the chat template {fault}")
        self._eaten = eaten
        self._train_all = train_all
        names = sorted(_special_names(tokenizer), key=len, reverse=True)
        self._specials = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")
        self._end_of_answer = lru_cache(maxsize=1024)(self._find_end)

    def refusal(self, record: Record) -> str:
        """Why the template cannot write the record; "" if it can."""
        try:
            self._write(record)
        except TemplateRefusal as error:
            return str(error)
        return ""

    def render(self, record: Record) -> list[Segment]:
        """Write the record down, as `render.render` does by frames.

        Raises:
            DataError: The template refuses the record, or the turns' texts cannot be found again in
                what it writes.
        """
        try:
            return self._write(record)
        except TemplateRefusal as error:
            raise DataError(
                f"template: the tokenizer's chat template refuses record {record.sample_id} "
                f"({error}); take another template, or leave the record out"
            ) from error

    @property
    def answer_end(self) -> str:
        """What is trained behind an answer, as a template's frame; "" if nothing is known of it."""
        frames = self._runner.behind_answers(system=False)
        end = self._end_of_answer(frames[-1], system=False) if frames else ""
        return self._specials.sub(r"{\1}", end)

    def _write(self, record: Record) -> list[Segment]:
        system, turns = split_turns(record)
        said_by = [Turn("system", (TextPart(system),))] if system is not None else []
        said_by += turns
        image = _stand_in(said_by)
        said = [_said(turn, image) for turn in said_by]
        placed = self._runner.place(said)
        pictures = [part for turn in said_by for part in turn.parts if isinstance(part, ImagePart)]
        if placed.text.count(image) != len(pictures):
            raise TemplateRefusal("it repeats or leaves out the place of an image")
        found = {place.turn for place in placed.places}
        if any(self._specials.search(one.text) for n, one in enumerate(said) if n not in found):
            raise TemplateRefusal("a text spells a special token, and its place cannot be told")
        page = SegmentWriter(train_all=self._train_all, eaten=self._eaten)
        pen = _Pen(page, self._specials, image, iter(pictures))
        self._write_places(pen, placed, said_by)
        return page.finish()

    def _write_places(self, pen: _Pen, placed: RenderedTurns, turns: Sequence[Turn]) -> None:
        text, at = placed.text, 0
        has_system = turns[0].role == "system"
        following_starts = [place.start for place in placed.places[1:]] + [len(text)]
        for place, following in zip(placed.places, following_starts, strict=False):
            turn = turns[place.turn]
            is_answer = turn.role == "assistant"
            trained = is_answer if turn.trains else None
            pen.frame(text[at : place.start])
            _write_turn(pen, text, place, trained=trained)
            at = place.end
            if is_answer:
                end = self._end_of_answer(text[at:following], system=has_system)
                pen.frame(end, trained=trained)
                at += len(end)
        pen.frame(text[at:])

    def _find_end(self, frame: str, *, system: bool) -> str:
        """The trained beginning of the frame that follows an answer.

        White space of the answer may stand before it that was not told from the frame.
        """
        others = self._runner.behind_answers(system=system)
        end = self._common_end((frame, *others))
        if not end and others and frame != frame.lstrip():
            end = self._common_end((frame.lstrip(), *others))
            end = frame[: len(frame) - len(frame.lstrip())] + end if end else ""
        return end

    def _common_end(self, frames: tuple[str, ...]) -> str:
        """What all frames begin with, up to the first special token and with it."""
        end = ""
        for number, column in enumerate(zip(*map(self._specials.split, frames), strict=False)):
            same = _common_start(column)
            if number % 2:
                return end + column[0] if len(set(column)) == 1 else end
            end += same
            if any(piece != same for piece in column):
                break
        return end


class _Pen:
    """Writes stretches of a template's text on a page."""

    def __init__(
        self,
        page: SegmentWriter,
        specials: re.Pattern[str],
        image: str,
        pictures: Iterator[ImagePart],
    ) -> None:
        self._page = page
        self._specials = specials
        self._image = image
        self._pictures = pictures

    def frame(self, text: str, *, trained: bool | None = False) -> None:
        """The template's own text: special tokens in it count as such."""
        # Splitting on one group alternates: text, special, text, ..., text.
        for number, piece in enumerate(self._specials.split(text)):
            if number % 2:
                self._page.special(piece, trained=trained)
            else:
                self.said(piece, trained=trained)

    def said(self, text: str, *, trained: bool | None) -> None:
        """Text of a record, with its images."""
        for number, piece in enumerate(text.split(self._image)):
            image: list[Part] = [next(self._pictures)] if number else []
            self._page.parts([*image, TextPart(piece)], trained=trained)


def _write_turn(pen: _Pen, text: str, place: TurnSpans, *, trained: bool | None) -> None:
    """A turn: the record's own text, and what the template puts between two stretches of it."""
    at = place.start
    for start, end in place.said:
        pen.frame(text[at:start], trained=trained)
        pen.said(text[start:end], trained=trained)
        at = end
    pen.frame(text[at : place.end], trained=trained)


def _stand_in(turns: Sequence[Turn]) -> str:
    """A character that marks an image and is in none of the texts."""
    text = "".join(turn.text + turn.thinking for turn in turns)
    spare = next((char for char in map(chr, _STAND_INS) if char not in text), None)
    if spare is None:
        raise TemplateRefusal("its texts use every private character, none is left for an image")
    return spare


def _said(turn: Turn, image: str) -> Said:
    texts = [part.text if isinstance(part, TextPart) else image for part in turn.parts]
    return Said(turn.role, "".join(texts), turn.thinking)


def _special_names(tokenizer: Any) -> set[str]:
    """The special tokens that a frame may hold."""
    added: dict[int, Any] = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {token.content for token in added.values() if token.special}


def _common_start(texts: tuple[str, ...]) -> str:
    """What all of the texts begin with."""
    length = 0
    for letters in zip(*texts, strict=False):
        if len(set(letters)) > 1:
            break
        length += 1
    return texts[0][:length]
