"""Bounded counts of what all requests hold at once, and the errors of a request's transport."""

from __future__ import annotations

import asyncio
from typing import Any

from pipelines.cli.settings import ServeLimits
from pipelines.serving.completion_request import MIB
from pipelines.serving.worker import Busy

__all__ = ["CLOSE", "LATER", "Load", "Refused"]

CLOSE = {"Connection": "close"}  # what is still being sent is not read
LATER = {"Retry-After": "5"}
OVERRUN = 4  # times as much as is taken is read and passed over before a connection is closed


class Refused(Exception):
    """A request that is not answered: status, one line, headers."""

    def __init__(self, status: int, line: str, headers: dict[str, str]) -> None:
        super().__init__(line)
        self.status, self.headers = status, headers


class Load:
    """Bounded counts of what all requests hold at once."""

    def __init__(self, limits: ServeLimits) -> None:
        self._limits = limits
        self._num_questions = self._num_bytes = 0

    def enter(self) -> None:
        """Count a question that is read, waits or is answered.

        Raises:
            Busy: There are too many.
        """
        if self._num_questions >= self._limits.waiting:
            raise Busy(f"{self._num_questions} questions are waiting; ask again later")
        self._num_questions += 1

    def leave(self) -> None:
        """A question is answered or given up."""
        self._num_questions -= 1

    async def read(self, request: Any, body: bytearray) -> None:
        """Append a request's body to `body`; `drop` lets go of it.

        Raises:
            Refused: It is too large, too slow, or others hold too much.
        """
        limits = self._limits
        most = limits.body_mib * MIB
        total = 0
        try:
            async with asyncio.timeout(limits.body_seconds):
                async for part in request.stream():
                    total += len(part)
                    if total > most:  # the rest is passed over, or the sender would not listen
                        self.drop(body)
                        if total > OVERRUN * most:
                            break
                        continue
                    if self._num_bytes + len(part) > limits.buffered_mib * MIB:
                        raise Refused(503, "too much is being sent; ask later", LATER | CLOSE)
                    self._num_bytes += len(part)
                    body += part
        except TimeoutError:
            said = f"not sent within {limits.body_seconds:g} s"
            raise Refused(408, said, CLOSE) from None
        if total > most:
            said = f"more than {limits.body_mib} MiB; choose smaller images"
            raise Refused(413, said, CLOSE)

    def drop(self, body: bytearray) -> None:
        """Let go of a request's body."""
        self._num_bytes -= len(body)
        body.clear()
