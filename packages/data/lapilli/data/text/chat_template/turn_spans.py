"""Render a conversation with a chat template and locate each turn in the text.

A chat template is a program that turns a conversation into one string. Where it looks at roles and
positions alone (`chat_analysis`), its frames are found once for each order of roles. Otherwise it
is run for every conversation, and what a turn says is found by running it once more with marks
around the texts: that run counts only if it gives the same string when the marks are taken out.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise, product
from typing import Any, TypeAlias

from jinja2.exceptions import SecurityError, TemplateSyntaxError

from lapilli.data.errors import DataError
from lapilli.data.record import excerpt
from lapilli.data.text.chat_template.analysis import looks_at_text

__all__ = ["RenderedTurns", "Said", "TemplateRefusal", "TemplateRunner", "TurnSpans"]

_SPACES = " \t\n\r"
Span: TypeAlias = tuple[int, int]

# Private-use characters: no template strips, cuts or compares them.
_OPEN, _CLOSE = "\ue0a0", "\ue0a1"
_FIRST_MARK, _LAST_MARK = 0xF0000, 0x10FFFD
# `<think>`, `</think>`, `[THINK]`, `</seed:think>`, `<|START_THINKING|>`, `<reasoning>`
_TAG = re.compile(r"[<\[][^<>\[\]\s]{0,24}(?:think|reason)[^<>\[\]\s]{0,24}[>\]]", re.IGNORECASE)
_TAG_BEFORE = re.compile(_TAG.pattern + r"\s*$", re.IGNORECASE)
_BEHIND = re.compile(rf"\s*(?:{_TAG.pattern}\s*)?", re.IGNORECASE)
_TAG_REACH = 80  # characters to look for a tag in, white space included
_PROBES = (("user", "assistant"), ("system", "user", "assistant"))
_DATE = "strftime_now"
_NO_DATE = "it writes today's date, so the same input would give other tokens tomorrow"
_USELESS = "cannot be used: {}; fix it or take another template"
MOST_ORDERS = 8192  # orders of roles whose frames are kept: each number of turns is one
MOST_ENDLESS = 8  # conversations that a template may take too long for
_NO_DATE_MACRO = f"{{% macro {_DATE}(f) %}}{{{{ raise_exception({_NO_DATE!r}) }}}}{{% endmacro %}}"


class TemplateRefusal(Exception):
    """The template does not render a conversation, or its turns cannot be located."""


@dataclass(frozen=True, slots=True)
class Said:
    """What one turn says: `text` has a stand-in for each image, `thinking` is a field beside it."""

    role: str
    text: str
    thinking: str = ""

    def message(self) -> dict[str, str]:
        """The turn as templates take it."""
        message = {"role": self.role, "content": self.text}
        return message | ({"reasoning_content": self.thinking} if self.thinking else {})


@dataclass(frozen=True, slots=True)
class TurnSpans:
    """The span of a turn, and in it the spans that are the record's own text."""

    turn: int
    start: int
    end: int
    said: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class RenderedTurns:
    """What a template makes of a conversation, and its turns' places in ascending order."""

    text: str
    places: tuple[TurnSpans, ...]


class TemplateRunner:
    """Runs a tokenizer's chat template, as its `apply_chat_template` does, in bounded steps."""

    def __init__(self, tokenizer: Any, source: str) -> None:
        """For the Jinja source of a template."""
        self._tokenizer = tokenizer
        self._source = source
        self._is_dated = _DATE in source
        self._looks = looks_at_text(source)
        self._frames = lru_cache(maxsize=MOST_ORDERS)(self._find_frames)
        self._compared: set[tuple[str, ...]] = set()
        from transformers import PreTrainedTokenizerBase

        from lapilli.data.text.chat_template.bounded_jinja import BoundedTemplate

        self._endless = 0
        self._compiled = lru_cache(maxsize=2)(BoundedTemplate)
        own: Any = getattr(type(tokenizer), "apply_chat_template", None)
        self._is_own_way = own is not PreTrainedTokenizerBase.apply_chat_template

    def place(self, said: Sequence[Said]) -> RenderedTurns:
        """Write a conversation.

        Raises:
            TemplateRefusal: The template raises, leaves out, changes or repeats what a turn says.
        """
        framed = self._in_frames(said)
        roles = tuple(one.role for one in said)
        if framed is not None and not self._looks and roles in self._compared and _is_bare(said):
            return framed
        text = self._run([one.message() for one in said])
        if framed is not None and framed.text == text:
            self._compared.add(roles)
            return framed
        return RenderedTurns(text, self._by_marks(said, text))

    def fault(self) -> str:
        """What is wrong with the template for every conversation; "" if nothing is known."""
        try:
            self._run([Said("user", "a").message(), Said("assistant", "b").message()])
        except TemplateRefusal as error:
            if isinstance(error.__cause__, TemplateSyntaxError):
                return f"is not valid Jinja ({error}); fix it or take another template"
            if _is_endless(error.__cause__):
                return _USELESS.format(error)
            if _NO_DATE in str(error):
                return (
                    f"cannot be used: {_NO_DATE}; put a copy with a fixed date into a .yaml file "
                    "as `chat`"
                )
        return ""

    def behind_answers(self, *, system: bool) -> list[str]:
        """The frames behind the answers of two rounds; none if the template refuses them."""
        roles = ("user", "assistant") * 2
        frames = self._frames(("system", *roles) if system else roles)
        return list(frames[-3::2]) if frames else []

    # --- running it -----------------------------------------------------------------------------

    def _run(self, messages: list[dict[str, str]]) -> str:
        if self._is_dated:
            self._apply(messages, _NO_DATE_MACRO + self._source)
        return self._apply(messages, self._source)

    def _apply(self, messages: list[dict[str, str]], source: str) -> str:
        try:
            if self._is_own_way:  # which runs no Jinja, or not as transformers does
                return self._tokenizer.apply_chat_template(
                    messages, chat_template=source, tokenize=False
                )
            return self._compiled(source).render(messages, self._tokenizer.special_tokens_map)
        except Exception as error:  # a template is a program of others: it may raise anything
            reason = excerpt(" ".join(str(error).split()), 300) or type(error).__name__
            if _is_endless(error):
                self._endless += 1
                if self._endless > MOST_ENDLESS:  # each takes seconds, and none gives a record
                    raise DataError(
                        f"template: the chat template {_USELESS.format(reason)}"
                    ) from None
            raise TemplateRefusal(reason) from error

    # --- by frames ------------------------------------------------------------------------------

    def _find_frames(self, roles: tuple[str, ...]) -> tuple[str, ...]:
        """The text before each turn and, as the last one, after all; () if it is not constant."""
        return self._ask(roles, "", "")

    def _ask(self, roles: tuple[str, ...], before: str, behind: str) -> tuple[str, ...]:
        """The template's own text around stand-ins that have white space around them."""
        names = [f"{before}{_OPEN}{place}{_CLOSE}{behind}" for place in range(len(roles))]
        try:
            text = self._run([Said(*pair).message() for pair in zip(roles, names, strict=True)])
        except TemplateRefusal:
            return ()
        pieces = re.split(f"{_OPEN}([0-9]+){_CLOSE}", text)
        whole = pieces[1::2] == [str(place) for place in range(len(roles))]
        return tuple(map(sys.intern, pieces[::2])) if whole else ()  # most frames are alike

    @cached_property
    def _known_strips(self) -> dict[str, tuple[str, str]]:
        """By role the white space that the template strips from the start and end of a text."""
        strips: dict[str, tuple[str, str]] = {}
        for roles in _PROBES:
            frames = self._frames(roles)
            if not frames:
                continue
            starts, ends = [""] * len(roles), [""] * len(roles)
            for space in _SPACES:
                before, behind = self._ask(roles, space, ""), self._ask(roles, "", space)
                for place in range(len(roles)):
                    starts[place] += space if before[place:][:1] == frames[place:][:1] else ""
                    ends[place] += (
                        space if behind[place + 1 :][:1] == frames[place + 1 :][:1] else ""
                    )
            found = zip(roles, zip(starts, ends, strict=True), strict=True)
            strips = dict(found) | strips
        return strips

    def _in_frames(self, said: Sequence[Said]) -> RenderedTurns | None:
        """The conversation in the frames of its order of roles; a guess until it was compared."""
        frames = self._frames(tuple(one.role for one in said))
        if not frames or any(one.thinking for one in said):
            return None
        strips = self._known_strips
        pieces: list[str] = []
        places: list[TurnSpans] = []
        at = 0
        for turn, (frame, one) in enumerate(zip(frames, said, strict=False)):
            text = _strip(one.text, *strips.get(one.role, ("", "")))
            start = at + len(frame)
            at = start + len(text)
            pieces += (frame, text)
            places.append(TurnSpans(turn, start, at, ((start, at),)))
        return RenderedTurns("".join((*pieces, frames[-1])), tuple(places))

    # --- by marks -------------------------------------------------------------------------------

    def _by_marks(self, said: Sequence[Said], text: str) -> tuple[TurnSpans, ...]:
        """The places of all turns, or of the answers alone, by whatever marks change nothing."""
        refusal: TemplateRefusal | None = None
        for everyone, outer_start, outer_end in product((True, False), repeat=3):
            marked = [
                _mark(one, outer_start=outer_start, outer_end=outer_end)
                if everyone or one.role == "assistant"
                else Marked(one, (), (0, 0))
                for one in said
            ]
            try:
                found = self._find_marks(marked, text)
                if found is None:
                    continue
                places = [
                    self._place(turn, one, spans, text)
                    for turn, (one, spans) in enumerate(zip(marked, found, strict=True))
                ]
                return _in_order([place for place in places if place is not None])
            except TemplateRefusal as error:
                refusal = refusal or error
        raise refusal or TemplateRefusal(
            "it cuts or compares what is said, so that its turns cannot be told apart"
        )

    def _find_marks(self, marked: Sequence[Marked], text: str) -> list[list[Span | None]] | None:
        """The span of each piece of each turn in `text`; None if the marks change the text."""
        spare = _spare_characters(one.said for one in marked)
        marks = [[(next(spare), next(spare)) for _ in one.pieces] for one in marked]
        run = self._run([one.message(own) for one, own in zip(marked, marks, strict=True)])
        known = {mark for own in marks for pair in own for mark in pair}
        at: dict[str, list[int]] = {}
        pieces: list[str] = []
        length = 0
        for piece in re.split(f"([{chr(_FIRST_MARK)}-{chr(_LAST_MARK)}])", run):
            if piece in known:
                at.setdefault(piece, []).append(length)
            else:
                pieces.append(piece)
                length += len(piece)
        if "".join(pieces) != text:
            return None
        return [[_span(at.get(a, []), at.get(b, [])) for a, b in own] for own in marks]

    def _place(
        self, turn: int, marked: Marked, spans: Sequence[Span | None], text: str
    ) -> TurnSpans | None:
        """The span of a turn from those of its pieces; None where it has no text."""
        name = f"turn {turn} ({marked.said.role})"
        if not spans:
            if marked.said.text.strip() not in text:
                raise TemplateRefusal(f"it leaves out what {name} says")
            return None
        for piece, span in zip(marked.pieces, spans, strict=True):
            if span is None and piece.is_field and not self._writes_thinking:
                raise TemplateRefusal(f"it leaves out the thinking of {name}")
            if span is None and (not piece.is_thinking or piece is marked.pieces[-1]):
                raise TemplateRefusal(f"it leaves out what {name} says")
            if span is not None and text[slice(*span)] != piece.text:
                raise TemplateRefusal(f"it changes what {name} says")
        there = [pair for pair in zip(marked.pieces, spans, strict=True) if pair[1] is not None]
        fields = [span for piece, span in there if piece.is_field and span]
        content = [(piece, span) for piece, span in there if not piece.is_field and span]
        whole = marked.whole(*content[0], text) if content else None
        said = fields + ([whole] if whole else [span for _, span in content])
        start, end = said[0][0], said[-1][1]
        if content and not whole:
            (first, _), (last, _) = content[0], content[-1]
            start = start if fields else marked.start_with_tags(first, text, start)
            end = marked.end_with_tags(last, text, end)
        if fields or (not whole and content[0][0].is_thinking):
            start = _before_tag(text, start)
        if marked.pieces[-1].is_thinking:  # nothing is answered
            end = _behind_tag(text, end)
        return TurnSpans(turn, start, end, tuple(said))

    @cached_property
    def _writes_thinking(self) -> bool:
        """Whether the template writes `reasoning_content` at all; of an earlier turn it may not."""
        asked = [Said("user", "a").message(), Said("assistant", "b", _OPEN).message()]
        try:
            return _OPEN in self._run(asked)
        except TemplateRefusal:
            return False


@dataclass(frozen=True, slots=True)
class TurnPiece:
    """A stretch of what a turn says: its text, and where in the content it begins."""

    text: str
    start: int
    is_thinking: bool = False
    is_field: bool = False


@dataclass(frozen=True, slots=True)
class Marked:
    """A turn with the pieces to put marks around; `core` is the content without its outer space."""

    said: Said
    pieces: tuple[TurnPiece, ...]
    core: Span

    def message(self, marks: Sequence[tuple[str, str]]) -> dict[str, str]:
        """The turn as templates take it, with its marks."""
        content, thinking = self.said.text, self.said.thinking
        for piece, (before, behind) in reversed([*zip(self.pieces, marks, strict=True)]):
            text, start, end = content, piece.start, piece.start + len(piece.text)
            if piece.is_field:
                text = thinking
            text = f"{text[:start]}{before}{text[start:end]}{behind}{text[end:]}"
            content, thinking = (content, text) if piece.is_field else (text, thinking)
        return Said(self.said.role, content, thinking).message()

    def whole(self, piece: TurnPiece, span: Span, text: str) -> Span | None:
        """The span of all of the content, if it stands unchanged around a piece of it."""
        start = span[0] - (piece.start - self.core[0])
        end = start + self.core[1] - self.core[0]
        is_there = start >= 0 and text[start:end] == self.said.text[slice(*self.core)]
        return (start, end) if is_there else None

    def start_with_tags(self, piece: TurnPiece, text: str, start: int) -> int:
        """The start of a piece, or of the content's own tags where they stand before it."""
        at = piece.start
        for tag in reversed([*_TAG.finditer(self.said.text, 0, at)]):
            between = self.said.text[tag.start() : at]
            is_there = text[:start].endswith(between)
            if self.said.text[tag.end() : at].strip() or not is_there:
                break
            start, at = start - len(between), tag.start()
        return start

    def end_with_tags(self, piece: TurnPiece, text: str, end: int) -> int:
        """The end of a piece, or of the content's own tags where they stand behind it."""
        at = piece.start + len(piece.text)
        for tag in _TAG.finditer(self.said.text, at):
            between = self.said.text[at : tag.end()]
            if self.said.text[at : tag.start()].strip() or not text.startswith(between, end):
                break
            end, at = end + len(between), tag.end()
        return end


def _is_endless(error: BaseException | None) -> bool:
    """Whether a template took more steps, time or memory than it may."""
    return isinstance(error, (SecurityError, RecursionError, MemoryError))


def _mark(said: Said, *, outer_start: bool, outer_end: bool) -> Marked:
    """A turn's pieces: its thinking, and its content between the tags of thinking.

    White space at a piece's start and end is inside its marks if `outer_start` and `outer_end` say
    so: a template that strips it then leaves it, which shows.
    """

    def piece(text: str, left: int, right: int) -> tuple[str, int]:
        start, end = _stripped(text, left, right)
        start, end = left if outer_start else start, right if outer_end else end
        return text[start:end], start

    pieces: list[TurnPiece] = []
    if said.thinking.strip():
        found = piece(said.thinking, 0, len(said.thinking))
        pieces.append(TurnPiece(*found, is_thinking=True, is_field=True))
    content, core_start = piece(said.text, 0, len(said.text))
    tags = [*_TAG.finditer(said.text)] if said.role == "assistant" else []
    edges = [0, *(edge for tag in tags for edge in tag.span()), len(said.text)]
    for number, (left, right) in enumerate(zip(edges[::2], edges[1::2], strict=True)):
        if said.text[left:right].strip():
            is_thinking = number < len(tags) and _closes(tags[number].group())
            pieces.append(TurnPiece(*piece(said.text, left, right), is_thinking))
    if not pieces and content:  # tags alone
        pieces.append(TurnPiece(content, core_start))
    return Marked(said, tuple(pieces), (core_start, core_start + len(content)))


def _closes(tag: str) -> bool:
    return "/" in tag or "end" in tag.lower()


def _stripped(text: str, start: int, end: int) -> Span:
    """The part of a stretch that has no white space around it."""
    stretch = text[start:end]
    left = len(stretch) - len(stretch.lstrip())
    return start + left, start + max(left, len(stretch.rstrip()))


def _span(opened: Sequence[int], closed: Sequence[int]) -> Span | None:
    """From a piece's first mark to its last; None if the piece is not there."""
    if not opened and not closed:
        return None
    if len(opened) != 1 or len(closed) != 1 or opened[0] > closed[0]:
        raise TemplateRefusal("it repeats a text, or writes a part of it")
    return opened[0], closed[0]


def _spare_characters(said: Iterable[Said]) -> Iterator[str]:
    """Private-use characters that no text holds."""
    used = {letter for one in said for letter in (*one.text, *one.thinking) if letter > "\uffff"}
    yield from (chr(code) for code in range(_FIRST_MARK, _LAST_MARK) if chr(code) not in used)
    raise TemplateRefusal("the conversation has too many turns to mark them all")


def _in_order(places: list[TurnSpans]) -> tuple[TurnSpans, ...]:
    places.sort(key=lambda place: place.start)
    if any(one.end > other.start for one, other in pairwise(places)):
        raise TemplateRefusal("it writes one turn inside another")
    return tuple(places)


def _before_tag(text: str, start: int) -> int:
    """Where the tag directly before a position begins, or the position itself."""
    least = max(0, start - _TAG_REACH)
    found = _TAG_BEFORE.search(text[least:start])
    return least + found.start() if found else start


def _behind_tag(text: str, end: int) -> int:
    """Where the tag and the white space end that stand directly behind a place, if any do."""
    found = _BEHIND.match(text[end : end + _TAG_REACH])
    return end + found.end() if found else end


def _is_bare(said: Sequence[Said]) -> bool:
    """Whether no text has white space around it: what becomes of that may depend on its place."""
    return all(one.text and one.text == one.text.strip() for one in said)


def _strip(text: str, start: str, end: str) -> str:
    """A text without the white space that its template strips."""
    # A template that takes off all four takes off what Python calls white space.
    text = text.lstrip(None if start == _SPACES else start) if start else text
    return text.rstrip(None if end == _SPACES else end) if end else text
