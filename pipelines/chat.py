"""Serve a web page to talk with a trained model about images, on loopback by default.

lapilli chat runs/finetune
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lapilli.data.errors import DataError
from lapilli.data.io.printable import one_line
from lapilli.model.errors import ModelError
from lapilli.train.device import choose_device, torch_device, visible_devices
from lapilli.train.inference.assistant import Assistant, open_assistant
from pipelines.chat_page.request import MIB, read_question
from pipelines.chat_page.server import listen, make_server, require_server
from pipelines.chat_page.worker import Busy, ChatWorker
from pipelines.cli.command import first_as, parse, run, say
from pipelines.cli.settings import ChatConfig, ChatLimits

__all__ = ["chat", "main", "make_app"]

Found = TypeVar("Found")
PAGE = Path(__file__).parent / "chat_page" / "chat.html"
LOOPBACK = ["127.0.0.1", "localhost", "[::1]"]
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src blob: data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; frame-ancestors 'none'",
}
CLOSE = {"Connection": "close"}  # what is still being sent is not read
LATER = {"Retry-After": "5"}
OVERRUN = 4  # times as much as is taken is read and passed over before a connection is closed


class _Refused(Exception):
    """A request that is not answered: status, one line, headers."""

    def __init__(self, status: int, line: str, headers: dict[str, str]) -> None:
        super().__init__(line)
        self.status, self.headers = status, headers


class _Left(Exception):
    """The client has disconnected."""


class _Load:
    """Bounded counts of what all requests hold at once."""

    def __init__(self, limits: ChatLimits) -> None:
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
            _Refused: It is too large, too slow, or others hold too much.
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
                        raise _Refused(503, "too much is being sent; ask later", LATER | CLOSE)
                    self._num_bytes += len(part)
                    body += part
        except TimeoutError:
            said = f"not sent within {limits.body_seconds:g} s"
            raise _Refused(408, said, CLOSE) from None
        if total > most:
            said = f"more than {limits.body_mib} MiB; choose smaller images"
            raise _Refused(413, said, CLOSE)

    def drop(self, body: bytearray) -> None:
        """Let go of a request's body."""
        self._num_bytes -= len(body)
        body.clear()


class _Answer:
    """A streamed response; `done` is called when it is sent or the client has gone."""

    def __init__(
        self, first: str, pieces: AsyncGenerator[str], done: Callable[[], Awaitable[None]]
    ) -> None:
        self._pieces, self._done = _after(first, pieces), done

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import StreamingResponse

        response = StreamingResponse(self._pieces, media_type="text/plain", headers=HEADERS)
        try:
            await response(scope, receive, send)
        finally:
            await self._done()


class _Chat:
    """The request handlers: the page, and its questions."""

    def __init__(self, assistant: Assistant, config: ChatConfig) -> None:
        self.worker = ChatWorker(assistant, config.decoding, config.limits)
        self._load, self._limits = _Load(config.limits), config.limits
        marker = assistant.template.image_marker
        self._read = partial(read_question, prefix=config.prefix, marker=marker)
        self._page = PAGE.read_text(encoding="utf-8")

    async def show(self, request: Any) -> Any:
        """The page."""
        from starlette.responses import HTMLResponse

        del request
        return HTMLResponse(self._page, headers=HEADERS)

    async def answer(self, request: Any) -> Any:
        """The answer to a conversation.

        Raises:
            DataError, ModelError: It cannot be answered.
            Busy, _Refused, _Left: It is not answered now, or nobody listens.
        """
        # another site's page may not send this type without asking first
        if request.headers.get("content-type") != "application/json":
            raise _Refused(415, "expected application/json", CLOSE)
        load = self._load
        load.enter()
        body = bytearray()
        pieces = _nothing()

        async def done() -> None:
            await pieces.aclose()
            load.drop(body)
            load.leave()

        try:
            await load.read(request, body)
            question = await asyncio.to_thread(self._read, bytes(body), self._limits)
            pieces = self.worker.ask(question, lambda: load.drop(body))
            first = await _unless_left(request, anext(pieces, ""))
        except BaseException:
            await done()
            raise
        return _Answer(first, pieces, done)


async def _mistake(request: Any, error: Exception) -> Any:
    from starlette.responses import PlainTextResponse

    del request
    refused = _refusal(error)
    return PlainTextResponse(
        one_line(str(refused)), refused.status, headers=HEADERS | refused.headers
    )


def make_app(assistant: Assistant, config: ChatConfig) -> Any:
    """The page at `/` and the answers at `/answer`, as a Starlette application.

    Raises:
        DataError: The process that decodes images does not start.
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect
    from starlette.routing import Route

    chat = _Chat(assistant, config)
    known = (DataError, ModelError, Busy, _Refused, _Left, ClientDisconnect)
    # a name that another site points here is not this page's
    hosts = LOOPBACK if config.host in {"127.0.0.1", "localhost", "::1"} else ["*"]
    app = Starlette(
        routes=[Route("/", chat.show), Route("/answer", chat.answer, methods=["POST"])],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
        exception_handlers=dict.fromkeys(known, _mistake),
    )
    app.state.worker = chat.worker  # to be closed when nothing is served any more
    return app


async def _nothing() -> AsyncGenerator[str]:
    return
    yield


async def _after(first: str, pieces: AsyncGenerator[str]) -> AsyncGenerator[str]:
    yield first
    async for piece in pieces:
        yield piece


async def _unless_left(request: Any, work: Awaitable[Found]) -> Found:
    """The result of `work`, which is cancelled if the client disconnects.

    Raises:
        _Left: Nobody listens.
    """
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise _Left
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _left(request: Any) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refusal(error: Exception) -> _Refused:
    if isinstance(error, _Refused):
        return error
    if isinstance(error, Busy):
        return _Refused(503, str(error), LATER)
    return _Refused(400, " ".join(str(error).split()), {})


def chat(config: ChatConfig) -> None:
    """Serve until Ctrl-C."""
    require_server()
    device = torch_device(choose_device(config.device, visible_devices()))
    assistant = open_assistant(
        Path(config.model), device, config.trust, template=config.template, view=config.view
    )
    with listen(config.host, config.port) as taken:
        app = make_app(assistant, config)
        server = make_server(app, config.limits)
        port = taken.getsockname()[1]
        host = f"[{config.host}]" if ":" in config.host else config.host
        say(f"{config.model} on {device}: http://{host}:{port}/ (Ctrl-C ends it)")
        try:
            with suppress(KeyboardInterrupt):
                server.run(sockets=[taken])
        finally:
            app.state.worker.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    chat(parse(ChatConfig, first_as("model", argv), "Talk with a trained model in a browser."))
    return 0


if __name__ == "__main__":
    run(main)
