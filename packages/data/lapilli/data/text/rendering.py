"""Render a record with a template: text, special tokens, image slots, trained parts.

No tokenizer is needed, so the trained characters are known from the conversation's structure alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from lapilli.data.errors import DataError
from lapilli.data.record import ImagePart, Part, Record, TextPart, Turn
from lapilli.data.text.templates import Template

__all__ = [
    "Eaten",
    "ImageSlot",
    "Segment",
    "SegmentWriter",
    "SpecialToken",
    "TextSegment",
    "frame_pieces",
    "mark_images",
    "render",
    "split_turns",
]


@dataclass(frozen=True, slots=True)
class TextSegment:
    """Text to be tokenised in one piece; `trained` are its trained character ranges, in order."""

    text: str
    trained: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """One id that no text can produce: "bos", "bos!", "eos" or a token's content."""

    name: str
    trained: bool = False


@dataclass(frozen=True, slots=True)
class ImageSlot:
    """The place of image number `index` of the record."""

    index: int


Segment: TypeAlias = TextSegment | SpecialToken | ImageSlot

Eaten: TypeAlias = Mapping[str, tuple[bool, bool]]
"""By special token: whether it swallows the white space before it, and that behind it."""

# What Unicode and Rust call white space; Python counts four separators more.
_WHITE_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)


def render(record: Record, template: Template, eaten: Eaten | None = None) -> list[Segment]:
    """Render a record: text, special tokens and image slots in order.

    A leading system turn replaces the template's system text (LLaVA knows no system turn, this is
    our choice). An answer before the first question is left out, as LLaVA does: nothing asks for
    it. Neighbouring text is one segment, so the text is tokenised as it would be as a whole.

    Args:
        record: A well-formed record.
        template: The template; one with a `chat` is written by
            `chat_template.rendering.ChatWriter` instead.
        eaten: The special tokens that swallow white space, as their tokenizer has it.

    Raises:
        DataError: For a system turn that is not the first turn.
    """
    own_system, turns = split_turns(record)
    system = template.system if own_system is None else own_system
    page = SegmentWriter(train_all=template.trains == "all", eaten=eaten or {})
    page.frame(template.opening)
    if not template.system_in_user:
        _write_system(page, system, template)
    for place, turn in enumerate(turns):
        if turn.role == "user":
            page.frame(template.before_user)
            if template.system_in_user and place == 0:
                _write_system(page, system, template)
            images = (template.image_start, template.image_end)
            page.parts(_user_parts(turn, template), images, trained=False if turn.trains else None)
            page.frame(template.after_user)
        else:
            trained = True if turn.trains else None
            page.frame(template.before_answer)
            page.frame(template.answer_start, trained=trained)
            page.parts(turn.parts, trained=trained)
            page.frame(template.answer_end, trained=trained)
            page.frame(template.after_answer)
    return page.finish()


def split_turns(record: Record) -> tuple[str | None, tuple[Turn, ...]]:
    """The system turn's text, if there is one, and the turns a template writes.

    Raises:
        DataError: For a system turn that is not the first turn.
    """
    system, turns = None, record.turns
    if turns and turns[0].role == "system":
        system, turns = turns[0].text, turns[1:]
    if turns and turns[0].role == "assistant":
        turns = turns[1:]
    if any(turn.role == "system" for turn in turns):
        raise DataError(
            f"record {record.sample_id}: a system turn may only stand first; move or remove it"
        )
    return system, turns


def mark_images(record: Record, template: Template) -> Record:
    """The record with each occurrence of the template's own `image_marker` as an image.

    Only in a record whose users' turns mark no image otherwise: markers of both kinds have no
    order among them that all would agree on.
    """
    if not template.image_marker:
        return record
    parts = [part for turn in record.turns for part in turn.parts]
    if any(isinstance(part, ImagePart) for part in parts):
        return record
    turns: list[Turn] = []
    images = 0
    for turn in record.turns:
        marked: list[Part] = []
        for number, text in enumerate(turn.text.split(template.image_marker)):
            if number:
                marked.append(ImagePart(images + number - 1))
            if text:
                marked.append(TextPart(text))
        is_user = turn.role == "user"
        turns.append(turn._replace(parts=tuple(marked)) if is_user else turn)
        images += sum(isinstance(part, ImagePart) for part in turns[-1].parts)
    return Record(
        record_id=record.record_id,
        sample_id=record.sample_id,
        source=record.source,
        turns=tuple(turns),
        images=record.images,
    )


def _write_system(page: SegmentWriter, system: str, template: Template) -> None:
    if system:
        page.frame(template.before_system)
        page.write(system)
        page.frame(template.after_system)


def _user_parts(turn: Turn, template: Template) -> tuple[Part, ...]:
    """What a template keeps of a user's turn, in its order."""
    images = [part for part in turn.parts if isinstance(part, ImagePart)]
    if template.drops_user_text:
        return tuple(images)
    if not (template.images_first and images):
        return turn.parts
    text = turn.text.strip()
    moved: list[Part] = []
    for image in images:
        moved += (image, TextPart("\n"))
    # The turn as a whole is stripped, so a turn of images alone ends on its last image.
    return (*moved, TextPart(text)) if text else tuple(moved[:-1])


class SegmentWriter:
    """Collects segments, joining neighbouring text and its trained ranges.

    A segment's `trained` is None where even a template that trains everything trains nothing.
    """

    def __init__(self, *, train_all: bool = False, eaten: Eaten) -> None:
        """An empty page; with `train_all` all but the images is trained."""
        self._train_all = train_all
        self._eaten = eaten
        self._eats_space = False
        self._segments: list[Segment] = []
        self._texts: list[str] = []
        self._length = 0
        self._trained: list[tuple[int, int]] = []

    def write(self, text: str, *, trained: bool | None = False) -> None:
        """Add plain text."""
        if self._eats_space:
            text = text.lstrip(_WHITE_SPACE)
        if not text:
            return
        self._eats_space = False
        start, self._length = self._length, self._length + len(text)
        self._texts.append(text)
        if not self._is_trained(trained):
            return
        if self._trained and self._trained[-1][1] == start:
            start = self._trained.pop()[0]
        self._trained.append((start, self._length))

    def frame(self, frame: str, *, trained: bool | None = False) -> None:
        """Add a template's string: text and special tokens."""
        for is_special, content in frame_pieces(frame) if frame else ():
            if is_special:
                self.special(content, trained=trained)
            else:
                self.write(content, trained=trained)

    def special(self, name: str, *, trained: bool | None = False) -> None:
        """Add a special token, which may swallow white space around it."""
        before, behind = self._eaten.get(name, (False, False))
        if before:
            self._strip_end()
        self._close_text()
        self._segments.append(SpecialToken(name, self._is_trained(trained)))
        self._eats_space = behind

    def parts(
        self,
        parts: Iterable[Part],
        around: tuple[str, str] = ("", ""),
        *,
        trained: bool | None = False,
    ) -> None:
        """Add what a turn says, each image between the two frames `around` it."""
        for part in parts:
            if isinstance(part, TextPart):
                self.write(part.text, trained=trained)
            else:
                self.frame(around[0])
                self._close_text()
                self._eats_space = False
                self._segments.append(ImageSlot(part.index))
                self.frame(around[1])

    def _is_trained(self, trained: bool | None) -> bool:
        return trained is not None and (trained or self._train_all)

    def finish(self) -> list[Segment]:
        """All segments; the page takes no more."""
        self._close_text()
        return self._segments

    def _strip_end(self) -> None:
        text = "".join(self._texts).rstrip(_WHITE_SPACE)
        self._texts, self._length = [text] if text else [], len(text)
        self._trained = [(a, min(b, len(text))) for a, b in self._trained if a < len(text)]

    def _close_text(self) -> None:
        if self._texts:
            self._segments.append(TextSegment("".join(self._texts), tuple(self._trained)))
            self._texts, self._length, self._trained = [], 0, []


@lru_cache(maxsize=256)
def frame_pieces(frame: str) -> tuple[tuple[bool, str], ...]:
    """`"a{eos}b"` as `((False, "a"), (True, "eos"), (False, "b"))`."""
    return tuple(_frame_pieces(frame))


def _frame_pieces(frame: str) -> Iterator[tuple[bool, str]]:
    # Splitting on one group alternates: text, name, text, name, ..., text.
    for number, content in enumerate(re.split(r"\{([^{}]+)\}", frame)):
        if content:
            yield number % 2 == 1, content
