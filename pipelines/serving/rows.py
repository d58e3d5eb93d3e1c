"""One answer that is being written: its text, what ends it, and what is told of its tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lapilli.model.continuous import NewToken
from lapilli.train.inference.assistant import Assistant
from pipelines.serving.completion_request import CompletionRequest

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["AnswerPiece", "AnswerRow", "Answered", "TokenLogprob"]


@dataclass(frozen=True)
class TokenLogprob:
    """A token's text and log probability, and those of the likeliest at its place."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class AnswerPiece:
    """New text, and the tokens since the last piece where they are wanted."""

    text: str
    tokens: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Answered:
    """The end of an answer.

    Attributes:
        reason: `stop`, or `length` where the most tokens are written.
        prompt_tokens: Of the question, those of its images included.
        completion_tokens: Of the answer, with the one that ends it.
    """

    reason: str
    prompt_tokens: int
    completion_tokens: int


Told = AnswerPiece | Answered | BaseException


@dataclass
class AnswerRow:
    """A question whose images are prepared, and its answer so far.

    Attributes:
        assistant: Whose answer it is.
        request: What is asked.
        prompt: int64 [n], -200 at an image's place.
        prompt_tokens: Their number with the images' tokens.
        pixels: uint8 [images, size, size, 3].
        tell: Called with each piece, and with the end.
        is_over: Set when nobody listens any more.
    """

    assistant: Assistant
    request: CompletionRequest
    prompt: NDArray[np.int64]
    prompt_tokens: int
    pixels: NDArray[np.uint8]
    tell: Callable[[Told], None]
    is_over: threading.Event
    _held: str = ""
    _num_tokens: int = 0
    _tokens: list[TokenLogprob] = field(default_factory=list["TokenLogprob"])
    _has_stopped: bool = False

    def __post_init__(self) -> None:
        """Begin to read."""
        self._reader = self.assistant.reader(self._read)

    def take(self, token: NewToken) -> bool:
        """Read the next token; True if it ends the answer, which is then told."""
        self._num_tokens += 1
        ends = self._reader.take(token.token_id)
        if token.logprobs_V is not None and not ends:
            self._tokens.append(self._logprob(token.token_id, token.logprobs_V))
        is_full = self._num_tokens >= self.request.decoding.max_new_tokens
        if not ends and not self._has_stopped and is_full:
            self._reader.finish()
        if not (ends or self._has_stopped or is_full):
            self._say(self._held[: len(self._held) - self._may_stop()])
            return self.is_over.is_set()
        if not self._has_stopped:
            self._say(self._held)
        if self._tokens:
            self._say("", flush=True)
        reason = "stop" if ends or self._has_stopped else "length"
        self.tell(Answered(reason, self.prompt_tokens, self._num_tokens))
        return True

    def _read(self, text: str) -> None:
        """New text of the answer: ends it at the first of the texts that stop it."""
        if self._has_stopped:
            return
        self._held += text
        places = [self._held.find(stop) for stop in self.request.stop]
        if found := [place for place in places if place >= 0]:
            self._end_at(min(found))

    def _end_at(self, place: int) -> None:
        self._has_stopped = True
        text, self._held = self._held[:place], ""
        self._say(text)

    def _may_stop(self) -> int:
        """How many of the last letters may begin a text that stops the answer."""
        sizes = (
            size
            for stop in self.request.stop
            for size in range(1, min(len(stop), len(self._held) + 1))
            if self._held.endswith(stop[:size])
        )
        return max(sizes, default=0)

    def _say(self, text: str, *, flush: bool = False) -> None:
        if text or flush:
            self._held = self._held[len(text) :]
            self.tell(AnswerPiece(text, tuple(self._tokens)))
            self._tokens.clear()

    def _logprob(self, token_id: int, logprobs_V: Tensor) -> TokenLogprob:
        def text(number: int) -> str:
            return self.assistant.tokenizer.decode([number], clean_up_tokenization_spaces=False)

        values, ids = logprobs_V.topk(self.request.top_logprobs or 1)
        top = tuple(
            (text(number), value)
            for number, value in zip(ids.tolist(), values.tolist(), strict=True)
        )
        return TokenLogprob(
            text(token_id), float(logprobs_V[token_id]), top if self.request.top_logprobs else ()
        )
