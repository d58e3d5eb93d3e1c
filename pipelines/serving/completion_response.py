"""Answers, pieces of answers and errors in the form of OpenAI's chat completions."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.serving.rows import Answered, AnswerPiece, TokenLogprob

__all__ = ["DONE", "Completion", "error_body", "event", "model_card"]

DONE = b"data: [DONE]\n\n"


def event(value: object) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def error_body(line: str, kind: str, param: str = "", code: str = "") -> dict[str, Any]:
    """An error."""
    return {"error": {"message": line, "type": kind, "param": param or None, "code": code or None}}


def model_card(name: str, created: int) -> dict[str, Any]:
    """A model in `/v1/models`."""
    return {"id": name, "object": "model", "created": created, "owned_by": "lapilli"}


@dataclass(frozen=True)
class Completion:
    """One answer's id and model, with which every object of it begins."""

    model: str
    has_logprobs: bool = False
    number: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, pieces: Sequence[AnswerPiece], end: Answered) -> dict[str, Any]:
        """The answer as one object."""
        tokens = [token for piece in pieces for token in piece.tokens]
        text = "".join(piece.text for piece in pieces)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(tokens),
            "finish_reason": end.reason,
        }
        return {**self._head("chat.completion"), "choices": [choice], "usage": _usage(end)}

    def first(self) -> dict[str, Any]:
        """A stream's first object."""
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, piece: AnswerPiece) -> dict[str, Any]:
        """A piece of a stream."""
        return self._chunk({"content": piece.text}, piece.tokens)

    def last(self, end: Answered) -> dict[str, Any]:
        """The end of a stream."""
        return self._chunk({}, reason=end.reason)

    def usage(self, end: Answered) -> dict[str, Any]:
        """The numbers of tokens, behind a stream."""
        head = self._head("chat.completion.chunk")
        return {**head, "choices": [], "usage": _usage(end)}

    def _chunk(
        self, delta: dict[str, str], tokens: Sequence[TokenLogprob] = (), reason: str | None = None
    ) -> dict[str, Any]:
        logprobs = self._logprobs(tokens) if tokens else None
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.number, "object": kind, "created": self.created, "model": self.model,
            "system_fingerprint": None,
        }  # fmt: skip

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self.has_logprobs:
            return None
        content = [
            {**_token(one.text, one.logprob), "top_logprobs": [_token(*top) for top in one.top]}
            for one in tokens
        ]
        return {"content": content, "refusal": None}


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _usage(end: Answered) -> dict[str, int]:
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.completion_tokens,
        "total_tokens": end.prompt_tokens + end.completion_tokens,
    }
