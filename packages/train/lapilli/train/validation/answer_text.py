"""Decode an answer's ids into text as they arrive, up to the template's end.

An end is a text of one or more tokens, or a special token. A tokenizer may join the first letters
of a text with the answer's last ones, so an end is looked for in the text and not among the ids.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from lapilli.data.text.encode import raw_backend
from lapilli.data.text.questions import Frames

__all__ = ["AnswerReader", "Decoder", "expected_text", "warn_without_end"]

UNFINISHED = "\ufffd"


class Decoder:
    """Ids to text, without special tokens and exactly as written: no space is tidied up."""

    def __init__(self, tokenizer: Any) -> None:
        """For a tokenizer of transformers."""
        added: dict[int, Any] = raw_backend(tokenizer).get_added_tokens_decoder()
        self._tokenizer = tokenizer
        self.special = frozenset(number for number, token in added.items() if token.special)

    def __call__(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        kept = [number for number in ids if number not in self.special]
        return self._tokenizer.decode(kept, clean_up_tokenization_spaces=False)


class AnswerReader:
    """Reads one answer id by id.

    Each step decodes the ids of the last two pieces of text and no more. A letter of several
    tokens waits for its last one.

    Args:
        decode: The tokenizer's.
        frames: What stands around an answer.
        on_text: Called with each new piece of the answer. What may become a part of the end is
            held back until it is known to be none; all pieces together are `answer`.
    """

    def __init__(
        self, decode: Decoder, frames: Frames, on_text: Callable[[str], None] | None = None
    ) -> None:
        self._decode, self._frames, self._on_text = decode, frames, on_text
        self._ids: list[int] = []  # that stand for text
        self._window, self._read = 0, 0  # places in them: of what is decoded again, and known
        self._known = ""  # text of the ids between the two
        self._text = ""
        self._searched = 0
        self._said = 0
        self._has_ended = False

    @property
    def answer(self) -> str:
        """The answer so far, without white space around it."""
        return self._visible()

    def take(self, token_id: int) -> bool:
        """Read the next id; True if the answer ends with it."""
        if token_id == self._frames.end_id:
            self._end(self._text_to_the_last().removesuffix(self._frames.end_text))
            return True
        if token_id in self._decode.special:
            return False
        self._ids.append(token_id)
        found = self._decode(self._ids[self._window :])
        if len(found) <= len(self._known) or found.endswith(UNFINISHED):
            return False
        self._text += found[len(self._known) :]
        self._window, self._read = self._read, len(self._ids)
        self._known = self._decode(self._ids[self._window : self._read])
        if self._ends_in_text():
            return True
        self._say()
        return False

    def finish(self) -> str:
        """The answer, when no more ids come.

        One that was cut off in the middle of its end loses that part.
        """
        if not self._has_ended:
            text = self._text_to_the_last()
            self._end(text[: len(text) - self._held(text)])
        return self.answer

    def _text_to_the_last(self) -> str:
        """The text with a letter that stayed unfinished."""
        return self._text + self._decode(self._ids[self._window :])[len(self._known) :]

    def _ends_in_text(self) -> bool:
        end, start = self._frames.end_text, self._start()
        if self._frames.end_id is not None or not end or start is None:
            return False
        at = self._text.find(end, max(start, self._searched))
        self._searched = max(start, len(self._text) - len(end) + 1)
        if at >= 0:
            self._end(self._text[:at])
        return at >= 0

    def _start(self) -> int | None:
        """Where the answer's own words begin; None if not known yet."""
        frame = self._frames.answer_start
        if self._text.startswith(frame):
            return len(frame)
        return None if frame.startswith(self._text) and not self._has_ended else 0

    def _end(self, text: str) -> None:
        self._text, self._has_ended = text, True
        self._say()

    def _held(self, text: str) -> int:
        """How many of the last letters may be the beginning of the end."""
        end = self._frames.end_text
        sizes = range(min(len(end), len(text)), 0, -1)
        return next((size for size in sizes if text.endswith(end[:size])), 0)

    def _visible(self) -> str:
        start = self._start()
        if start is None:
            return ""
        held = 0 if self._has_ended else self._held(self._text)
        return self._text[start : max(start, len(self._text) - held)].strip()

    def _say(self) -> None:
        if self._on_text is None:
            return
        visible = self._visible()
        if len(visible) > self._said:
            self._on_text(visible[self._said :])
            self._said = len(visible)


def expected_text(ids: Sequence[int], decode: Decoder, frames: Frames) -> str:
    """An expected answer as `AnswerReader` reads a given one: without what a template trains.

    One that was cut short before its end stays as it is.
    """
    kept = list(ids)
    if frames.end_id is not None and frames.end_id in kept:
        last = len(kept) - 1 - kept[::-1].index(frames.end_id)
        text = decode(kept[:last]).removesuffix(frames.end_text)
    else:
        text = decode(kept)
        if frames.end_id is None and frames.end_text:
            before, end, behind = text.rpartition(frames.end_text)
            # the end's last letters may be joined with what the template writes behind it
            if end and (not behind.strip() or frames.next_question.startswith(end + behind)):
                text = before
    return text.removeprefix(frames.answer_start).strip()


def warn_without_end(template: str, frames: Frames) -> None:
    """Say that nothing ends an answer of this template."""
    if not frames.has_end:
        warnings.warn(
            f"template {template}: nothing ends an answer; each has the most tokens allowed",
            stacklevel=2,
        )
