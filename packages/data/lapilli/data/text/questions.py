"""Build prompts from a template, and split a dataset row into questions and answers.

A template renders placeholders; the text between them is frame. So a template of
frames and a tokenizer's own chat template are told apart nowhere here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lapilli.data.errors import DataError
from lapilli.data.record import Record, Role, TextPart, Turn
from lapilli.data.sources.turns import IMAGE_MARKER
from lapilli.data.text.encode import bind_template, encode_batch, segments_of
from lapilli.data.text.rendering import SpecialToken, TextSegment, frame_pieces
from lapilli.data.text.templates import Template
from lapilli.data.text.token_text import transcript
from lapilli.data.text.tokenizer import AnyTokenizer, Backend, backend_for

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ChoiceTokens", "Frames", "RowQuestion", "choice_tokens", "find_frames", "row_questions"]

# Private-use characters that no template strips, cuts or compares; chat.py uses two others.
_SYSTEM, _QUESTION, _ANSWER = "\ue0b0", "\ue0b1", "\ue0b2"
_IMAGE = "\ue0b3"


@dataclass(frozen=True)
class Frames:
    """What a template writes around the turns' texts, special tokens as their content.

    Attributes:
        openings: The text before the first question: without a system turn; and before and
            behind a record's own system text, where the template takes one.
        before_answer: From a question's end to where the model goes on.
        answer_start: Trained, before the answer.
        end: Trained, behind the answer.
        end_text: The part of `end` before its first special token, or all of it.
        end_id: The first special token behind the answer, which no text can produce; None where
            the end is a text alone.
        next_question: From an answer's end, that included, to the next question; empty where a
            template does not take a second one.
        image: Before and behind each image.
        drops_question: A question's words are not written down.
    """

    openings: tuple[tuple[str, ...], ...]
    before_answer: str
    answer_start: str
    end: str
    end_text: str
    end_id: int | None
    next_question: str
    image: tuple[str, str]
    drops_question: bool

    @property
    def has_end(self) -> bool:
        """Whether anything ends an answer."""
        return bool(self.end)


@dataclass(frozen=True)
class RowQuestion:
    """A question of a row.

    Attributes:
        prompt: int64 [n], the ids up to where the answer begins, -200 for each image; before a
            later question those of the questions and answers before it.
        question: The user's own words; images in front or behind are left out, others are
            `<image>`. Empty for a template that drops them.
        answer: The ids of the expected answer with the trained tokens around it.
    """

    prompt: NDArray[np.int64]
    question: str
    answer: list[int]


@dataclass(frozen=True)
class _Written:
    """A record as one string, with which of its characters are trained or special tokens."""

    text: str
    trained: list[bool]
    special: dict[int, int]  # place of a special token's first character -> its id

    def edge(self, start: int, step: int) -> int:
        """The end of the trained stretch around `start`, forwards (1) or backwards (-1)."""
        place = start
        while 0 <= place + step < len(self.text) and self.trained[place + step]:
            place += step
        return place


def find_frames(template: Template, tokenizer: AnyTokenizer) -> Frames:
    """The frames of a template in a tokenizer's spelling.

    Raises:
        DataError: The template cannot be written with this tokenizer.
    """
    template = replace(bind_template(template, tokenizer), trains="answers")

    def write(*turns: tuple[Role, str]) -> _Written:
        return _write(template, tokenizer, [Turn(r, (TextPart(t),)) for r, t in turns])

    one = write(("user", _QUESTION), ("assistant", _ANSWER))
    at = one.text.index(_ANSWER)
    start, end = one.edge(at, -1), one.edge(at, 1) + 1
    question = one.text.find(_QUESTION)
    first = min((place for place in one.special if at < place < end), default=end)
    openings: list[tuple[str, ...]] = [(one.text[: max(question, 0)],)]
    next_question = ""
    try:
        own = write(("system", _SYSTEM), ("user", _QUESTION), ("assistant", _ANSWER)).text
        if _SYSTEM in own and _QUESTION in own:
            before, _, behind = own.partition(_SYSTEM)
            openings.append((before, behind[: behind.index(_QUESTION)]))
        said: list[tuple[Role, str]] = [("user", _QUESTION), ("assistant", _ANSWER)]
        two = write(*said, *said).text
        behind = two[two.index(_ANSWER) + 1 :]
        next_question = behind[: behind.index(_QUESTION)] if _QUESTION in behind else ""
    except DataError:
        pass  # a chat template may refuse a system turn or a second question
    return Frames(
        openings=tuple(openings),
        before_answer=one.text[question + 1 : start] if question >= 0 else "",
        answer_start=one.text[start:at],
        end=one.text[at + 1 : end],
        end_text=one.text[at + 1 : first],
        end_id=one.special.get(first),
        next_question=next_question,
        image=(_spelt(template.image_start), _spelt(template.image_end)),
        drops_question=question < 0,
    )


def _write(template: Template, tokenizer: AnyTokenizer, turns: list[Turn]) -> _Written:
    backend = backend_for(tokenizer)
    is_prefixed = _is_prefixed(backend)
    text, trained, special = "", list[bool](), dict[int, int]()
    for segment in segments_of(
        Record(record_id="", sample_id="", source="", turns=tuple(turns)), tokenizer, template
    ):
        if isinstance(segment, TextSegment):
            flags = [False] * len(segment.text)
            for start, end in segment.trained:
                flags[start:end] = [True] * (end - start)
            first = int(is_prefixed and segment.text.startswith(" "))
            text, trained = text + segment.text[first:], trained + flags[first:]
        elif isinstance(segment, SpecialToken):
            for token_id in backend.special_ids(segment.name):
                special[len(text)] = token_id
                content = backend.first.id_to_token(token_id) or ""
                text, trained = text + content, trained + [segment.trained] * len(content)
    return _Written(text, trained, special)


def _spelt(frame: str) -> str:
    return "".join(content for _, content in frame_pieces(frame))


def row_questions(
    input_ids: Sequence[int] | NDArray[np.int32],
    label_spans: NDArray[np.int32],
    tokenizer: AnyTokenizer,
    template: Template,
    frames: Frames,
) -> list[RowQuestion]:
    """Take a row apart: its questions whose answers are trained, in their order.

    Args:
        input_ids: The row's ids [n], -200 at an image's place.
        label_spans: Start and end of the trained ids, [m, 2].
        tokenizer: What the row was made with.
        template: What the row was written by.
        frames: `find_frames` of both.

    Returns:
        One at least.

    Raises:
        DataError: The template trains whole conversations, and what it writes before an answer is
            not in the row.
    """
    ids = [int(i) for i in input_ids]
    if template.trains != "answers":
        return _whole_questions(ids, tokenizer, template, frames)
    found: list[RowQuestion] = []
    before = 0  # ids up to the end of the answer before
    for start, end in label_spans.tolist():
        text = _joined(_texts(ids[:end], tokenizer))
        at = len(_joined(_texts(ids[:start], tokenizer)))
        # a header's last letters may lie in the answer's first token
        header = text.rfind(frames.before_answer, 0, at + len(frames.before_answer))
        asked = text[: at if header < 0 else header]
        said = len(_joined(_texts(ids[:before], tokenizer)))
        question = _later_question(asked[said:], frames) if before else _question(asked, frames)
        found.append(RowQuestion(np.array(ids[:start], np.int64), question, ids[start:end]))
        before = end
    return found


def _whole_questions(
    ids: list[int], tokenizer: AnyTokenizer, template: Template, frames: Frames
) -> list[RowQuestion]:
    """The questions of a row that is trained whole, found by what is written around them."""
    pieces = _texts(ids, tokenizer)
    text = _joined(pieces)
    found: list[RowQuestion] = []
    asked = _question_start(text, frames)
    while True:
        header = text.find(frames.before_answer, asked) if frames.before_answer else -1
        if header < 0:
            break
        start = header + len(frames.before_answer)
        next_one = text.find(frames.next_question, start) if frames.next_question else -1
        end = len(text) if next_one < 0 else next_one + len(frames.end)
        question = (
            _later_question(text[asked:header], frames)
            if found
            else _question(text[:header], frames)
        )
        prompt, answer = _split(pieces, start, end)
        found.append(RowQuestion(np.array(prompt, np.int64), question, answer))
        if next_one < 0:
            break
        asked = end
    if not found:
        raise DataError(
            f"template {template.name}: trains whole conversations, and {frames.before_answer!r} "
            "before an answer is not found in a row; ask with a template that trains answers"
        )
    return found


def _split(
    pieces: list[tuple[str, tuple[int, ...]]], start: int, end: int
) -> tuple[list[int], list[int]]:
    """The ids before an answer and its own; its text is from `start` to `end`."""
    prompt: list[int] = []
    answer: list[int] = []
    place = 0
    for piece, own in pieces:
        # as in training, a token with a character of the answer is the answer's
        if place + len(piece) <= start:
            prompt += own
        elif place < end:
            answer += own
        place += len(piece)
    return prompt, answer


@dataclass(frozen=True)
class ChoiceTokens:
    """What stands where an answer begins, for a few choices.

    Attributes:
        prefix: Ids between a prompt and the choice, the same for all.
        ids: The one id of each choice.
    """

    prefix: tuple[int, ...]
    ids: dict[str, int]


def choice_tokens(
    choices: Sequence[str], tokenizer: AnyTokenizer, template: Template
) -> ChoiceTokens:
    """The token of each choice, as the template's answers have it.

    Raises:
        DataError: A choice that is not one token, or two that are the same.
    """
    found = {choice: _choice_token(choice, tokenizer, template) for choice in choices}
    by_id: dict[int, str] = {}
    for choice, (_, token_id) in found.items():
        if token_id in by_id:
            raise DataError(
                f"choices: {by_id[token_id]!r} and {choice!r} begin with the same token, "
                f"{token_id}; expected choices that the tokenizer tells apart"
            )
        by_id[token_id] = choice
    prefixes = {prefix for prefix, _ in found.values()}
    if len(prefixes) > 1:
        raise DataError(
            f"choices: {', '.join(choices)}: other tokens stand before each; expected choices that "
            "begin an answer in the same way"
        )
    return ChoiceTokens(prefixes.pop(), {choice: one for choice, (_, one) in found.items()})


def _choice_token(
    choice: str, tokenizer: AnyTokenizer, template: Template
) -> tuple[tuple[int, ...], int]:
    """The ids between prompt and choice, and the choice's own."""
    template = replace(bind_template(template, tokenizer), trains="answers")
    turns = (Turn("user", (TextPart(_QUESTION),)), Turn("assistant", (TextPart(choice),)))
    record = Record(record_id="", sample_id="", source="", turns=turns)
    row = encode_batch([record], tokenizer, template, warn=False)[0]
    start, end = row.label_spans[-2:]
    pieces = _texts(row.input_ids[:end], tokenizer)
    at = _joined(pieces).find(choice, len(_joined(_texts(row.input_ids[:start], tokenizer))))
    own: list[int] = []
    prefix: list[int] = []
    place, known = 0, 0  # letters and ids so far
    for text, ids in pieces:
        if place < at + len(choice) and place + len(text) > at:
            own += ids
        elif place < at:
            prefix += ids[max(0, start - known) :]
        place, known = place + len(text), known + len(ids)
    if at < 0 or len(own) != 1:
        raise DataError(
            f"choices: {choice!r} is {len(own)} tokens of this tokenizer; expected choices of one "
            "token each, such as Yes and No"
        )
    return tuple(prefix), own[0]


def _texts(ids: Sequence[int], tokenizer: AnyTokenizer) -> list[tuple[str, tuple[int, ...]]]:
    """Ids as text, special tokens as their content; put together it is what was tokenised."""
    is_prefixed = _is_prefixed(backend_for(tokenizer))
    found: list[tuple[str, tuple[int, ...]]] = []
    is_first = True
    for one in transcript(ids, np.zeros((0, 2), np.int32), tokenizer, image_text=_IMAGE):
        is_text = one.kind == "text"
        has_prefix = is_prefixed and is_text and is_first
        found.append((one.text.removeprefix(" ") if has_prefix else one.text, one.ids))
        is_first = not is_text
    return found


def _is_prefixed(backend: Backend) -> bool:
    """Whether the tokenizer puts a space before a text that has none (GPT-2's add_prefix_space).

    Where there is one, nothing tells the two apart any more, so it counts on neither side.
    """
    bare, spaced = (backend.first.encode(t, add_special_tokens=False).ids for t in ("a", " a"))
    return bare == spaced


def _question_start(text: str, frames: Frames) -> int:
    """Where the first question's words begin."""
    for opening in frames.openings:
        if text.startswith(opening[0]):
            if len(opening) == 1:
                return len(opening[0])
            found = text.find(opening[1], len(opening[0])) if opening[1] else -1
            if found >= 0:
                return found + len(opening[1])
    return 0


def _question(asked: str, frames: Frames) -> str:
    """The user's words in the text before an answer's header."""
    if frames.drops_question:
        return ""
    return _words(asked[_question_start(asked, frames) :], frames)


def _later_question(text: str, frames: Frames) -> str:
    """The user's words between an answer's end and the next answer's header."""
    if frames.drops_question:
        return ""
    header = frames.next_question.removeprefix(frames.end)
    # its first letters may lie in the answer's last token
    known = next((header[n:] for n in range(len(header)) if text.startswith(header[n:])), "")
    return _words(text[len(known) :], frames)


def _words(text: str, frames: Frames) -> str:
    text = text.replace(f"{frames.image[0]}{_IMAGE}{frames.image[1]}", _IMAGE)
    return text.strip(f"{_IMAGE} \t\r\n").replace(_IMAGE, IMAGE_MARKER)


def _joined(pieces: list[tuple[str, tuple[int, ...]]]) -> str:
    return "".join(text for text, _ in pieces)
