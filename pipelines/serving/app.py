"""The application: OpenAI's chat completions and models, and the chat page on top of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from lapilli.data.errors import DataError
from lapilli.data.io.printable import one_line
from lapilli.model.errors import ModelError
from lapilli.train.inference.assistant import Assistant
from pipelines.cli.settings import ServeConfig
from pipelines.serving.completion_request import (
    CompletionRequest,
    InvalidRequest,
    QuestionForm,
    UnknownModel,
    read_request,
)
from pipelines.serving.completion_response import DONE, Completion, error_body, event, model_card
from pipelines.serving.load import CLOSE, LATER, Load, Refused
from pipelines.serving.rows import Answered, AnswerPiece
from pipelines.serving.worker import Busy, ServeWorker

__all__ = ["make_app"]

Found = TypeVar("Found")
PAGE = Path(__file__).parent / "chat.html"
LOOPBACK = ["127.0.0.1", "localhost", "[::1]"]
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src blob: data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; frame-ancestors 'none'",
}


class _Left(Exception):
    """The client has disconnected."""


class _Stream:
    """A streamed response; `done` is called when it is sent or the client has gone."""

    def __init__(self, events: AsyncGenerator[bytes], done: Callable[[], Awaitable[None]]) -> None:
        self._events, self._done = events, done

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import StreamingResponse

        response = StreamingResponse(self._events, media_type="text/event-stream", headers=HEADERS)
        try:
            await response(scope, receive, send)
        finally:
            await self._done()


class _Server:
    """The request handlers."""

    def __init__(self, assistant: Assistant, config: ServeConfig) -> None:
        self.worker = ServeWorker(assistant, config.limits, config.batch)
        self._name = config.name or assistant.name or "model"
        self._created = int(time.time())
        self._load, self._config = Load(config.limits), config
        self._asking = QuestionForm(config.prefix, assistant.template.image_marker)
        self._page = PAGE.read_text(encoding="utf-8")

    async def show(self, request: Any) -> Any:
        """The chat page."""
        from starlette.responses import HTMLResponse

        del request
        return HTMLResponse(self._page, headers=HEADERS)

    async def models(self, request: Any) -> Any:
        """The one model, in a list."""
        del request
        return _json({"object": "list", "data": [model_card(self._name, self._created)]})

    async def model(self, request: Any) -> Any:
        """The model by its name.

        Raises:
            UnknownModel: Another one.
        """
        if request.path_params["name"] != self._name:
            raise UnknownModel(f"no such model; {self._name} is served", "model", "model_not_found")
        return _json(model_card(self._name, self._created))

    async def complete(self, request: Any) -> Any:
        """The answer to a conversation.

        Raises:
            DataError, ModelError: It cannot be answered.
            Busy, Refused, _Left: It is not answered now, or nobody listens.
        """
        # another site's page may not send this type without asking first
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(415, "expected application/json", CLOSE)
        load = self._load
        load.enter()
        body = bytearray()
        told = _nothing()

        async def done() -> None:
            await told.aclose()
            load.drop(body)
            load.leave()

        try:
            await load.read(request, body)
            asked = await asyncio.to_thread(
                read_request, bytes(body), self._name, self._config.decoding, self._config.limits,
                self._asking,
            )  # fmt: skip
            told = self.worker.ask(asked, lambda: load.drop(body))
            completion = Completion(self._name, asked.top_logprobs is not None)
            if asked.streams:
                first = await _unless_left(request, anext(told))
                return _Stream(_events(completion, asked, first, told), done)
            answer = await _unless_left(request, _collect(told))
        except BaseException:
            await done()
            raise
        await done()
        return _json(completion.whole(*answer))


def make_app(assistant: Assistant, config: ServeConfig) -> Any:
    """The chat page at `/`, completions and models at `/v1`, as a Starlette application.

    Raises:
        DataError: The process that decodes images does not start.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect
    from starlette.routing import Route

    server = _Server(assistant, config)
    known = (
        DataError, ModelError, Busy, Refused, _Left, ClientDisconnect, HTTPException, Exception
    )  # fmt: skip
    # a name that another site points here is not this page's
    hosts = LOOPBACK if config.host in {"127.0.0.1", "localhost", "::1"} else ["*"]
    app = Starlette(
        routes=[
            Route("/", server.show),
            Route("/v1/models", server.models),
            Route("/v1/models/{name:path}", server.model),
            Route("/v1/chat/completions", server.complete, methods=["POST"]),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=hosts), Middleware(_SameOrigin)
        ],
        exception_handlers=dict.fromkeys(known, _mistake),
    )  # fmt: skip
    app.state.worker = server.worker  # to be closed when nothing is served any more
    return app


class _SameOrigin:
    """Refuses requests of another site's page; programs send no origin."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope.get("headers", ()))
        origin, host = headers.get(b"origin", b""), headers.get(b"host", b"")
        if origin and origin.partition(b"://")[2] != host:
            line = "a page of another site; open this server's own page"
            body = error_body(line, "invalid_request_error", code="other_origin")
            await _json(body, 403, CLOSE)(scope, receive, send)
            return
        await self._app(scope, receive, send)


async def _events(
    completion: Completion,
    asked: CompletionRequest,
    first: AnswerPiece | Answered,
    told: AsyncGenerator[AnswerPiece | Answered],
) -> AsyncGenerator[bytes]:
    yield event(completion.first())
    try:
        async for piece in _after(first, told):
            if isinstance(piece, AnswerPiece):
                yield event(completion.piece(piece))
                continue
            yield event(completion.last(piece))
            if asked.includes_usage:
                yield event(completion.usage(piece))
    except Exception as error:  # what is sent already cannot become another status
        yield event(_refusal(error)[1])
    yield DONE


async def _collect(
    told: AsyncGenerator[AnswerPiece | Answered],
) -> tuple[list[AnswerPiece], Answered]:
    pieces: list[AnswerPiece] = []
    async for piece in told:
        if isinstance(piece, Answered):
            return pieces, piece
        pieces.append(piece)
    raise ModelError("the answer has no end")


async def _nothing() -> AsyncGenerator[AnswerPiece | Answered]:
    return
    yield


async def _after(first: Found, others: AsyncGenerator[Found]) -> AsyncGenerator[Found]:
    yield first
    async for other in others:
        yield other


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


def _json(body: object, status: int = 200, headers: dict[str, str] | None = None) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse(body, status, headers=HEADERS | (headers or {}))


async def _mistake(request: Any, error: Exception) -> Any:
    del request
    status, body, headers = _refusal(error)
    return _json(body, status, headers)


def _refusal(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers of an error."""
    from starlette.exceptions import HTTPException

    line = one_line(str(error))
    if isinstance(error, HTTPException):
        body = error_body(f"no such address: {error.detail}", "invalid_request_error")
        return error.status_code, body, {}
    if isinstance(error, Refused):
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
        return error.status, error_body(line, kind), error.headers
    if isinstance(error, Busy):
        return 503, error_body(line, "server_error", code="overloaded"), LATER
    if isinstance(error, InvalidRequest):
        status = 404 if isinstance(error, UnknownModel) else 400
        body = error_body(line, "invalid_request_error", error.param, error.code)
        return status, body, {}
    if isinstance(error, (DataError, ModelError)):
        code = "context_length_exceeded" if "positions" in line else ""
        return 400, error_body(line, "invalid_request_error", "messages", code), {}
    return 500, error_body("the answer failed on the server", "server_error"), {}
