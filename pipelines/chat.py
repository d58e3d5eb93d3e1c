"""A small web page to talk with a trained model about images, on this machine alone by default.

python -m pipelines.chat runs/finetune
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import queue
import socket
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from lapilli.data.errors import DataError
from lapilli.data.record import ImagePart, TextPart, Turn
from lapilli.model.errors import ModelError
from lapilli.model.generate import Decoding
from lapilli.train.ask import Assistant, Question, open_assistant
from lapilli.train.device import DeviceChoice, choose_device, torch_device, visible_devices
from lapilli.train.errors import TrainError
from pipelines.command import first_as, parse, run, say

PAGE = Path(__file__).with_name("chat.html")
MOST_BYTES = 64 << 20  # of a conversation with its images as base64
MOST_IMAGES = 16
MOST_TURNS = 200
MOST_PIXELS = 100_000_000  # of an uploaded image
LOOPBACK = ["127.0.0.1", "localhost", "[::1]"]
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src blob: data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; frame-ancestors 'none'",
}


@dataclass(frozen=True)
class ChatConfig:
    """Who is talked with, and where.

    Attributes:
        model: Folder of a run, or of an export with `--to hf`.
        host: Address to listen on; another than this machine's own lets the network in.
        port: 0 takes a free one.
        device: `auto` takes a GPU when there is one, else an HPU, else the CPU.
        decoding: How answers are written.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8080
    device: DeviceChoice = "auto"
    decoding: Decoding = field(default_factory=Decoding)


def read_question(body: bytes) -> Question:
    """The conversation a page sends: `{"turns": [{"role", "text", "images"}], "images": [base64]}`.

    `images` of a turn is how many of the images stand before its text.

    Raises:
        DataError: Something else, or more than is taken.
    """
    try:
        fields: Any = json.loads(body)
        texts = [base64.b64decode(one, validate=True) for one in fields["images"]]
        turns: list[Turn] = []
        place = 0
        for turn in fields["turns"]:
            shown = tuple(ImagePart(place + n) for n in range(int(turn["images"])))
            place += len(shown)
            words = (TextPart(str(turn["text"])),) if turn["text"] else ()
            turns.append(Turn(_ROLES[turn["role"]], (*shown, *words)))
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error):
        raise DataError("not a conversation; expected JSON with turns and images") from None
    roles = [turn.role for turn in turns]
    if place != len(texts) or roles != [("user", "assistant")[n % 2] for n in range(len(roles))]:
        raise DataError("turns and images do not fit; expected user and assistant in turn")
    if not len(turns) % 2:
        raise DataError("nothing asked; expected a user's turn at the end")
    if place > MOST_IMAGES or len(turns) > MOST_TURNS:
        raise DataError(
            f"{place} images in {len(turns)} turns; at most {MOST_IMAGES} in {MOST_TURNS}, start a "
            "new conversation"
        )
    return Question(tuple(turns), tuple(texts), "your upload")


_ROLES: dict[str, Literal["user", "assistant"]] = {"user": "user", "assistant": "assistant"}


class Gone(Exception):
    """Who asked does not listen any more."""


class Talk:
    """Answers one after the other, each written in a thread and read piece by piece."""

    def __init__(self, assistant: Assistant, decoding: Decoding) -> None:
        spec = replace(assistant.spec, max_pixels=min(assistant.spec.max_pixels, MOST_PIXELS))
        self._assistant = replace(assistant, spec=spec)
        self._decoding = decoding
        self._one_at_a_time = threading.Lock()

    async def answer(self, question: Question) -> AsyncIterator[str]:
        """Pieces of the answer as they are written.

        Raises:
            DataError, ModelError: What is wrong with what was asked, before the first piece.
        """
        pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        gone = threading.Event()

        def on_text(piece: str) -> None:
            if gone.is_set():
                raise Gone
            pieces.put(piece)

        def work() -> None:
            try:
                with self._one_at_a_time:
                    on_text("")
                    self._assistant.answer([question], self._decoding, on_text=on_text)
                pieces.put(None)
            except BaseException as error:
                pieces.put(error)

        threading.Thread(target=work, name="answer", daemon=True).start()
        try:
            while (piece := await asyncio.to_thread(pieces.get)) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                if piece:
                    yield piece
        finally:
            gone.set()


def make_app(assistant: Assistant, config: ChatConfig) -> Any:
    """The page at `/` and the answers at `/answer`, as a Starlette application."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
    from starlette.routing import Route

    talk = Talk(assistant, config.decoding)
    page = PAGE.read_text(encoding="utf-8")

    async def show(request: Request) -> Response:
        del request
        return HTMLResponse(page, headers=HEADERS)

    async def answer(request: Request) -> Response:
        # another site's page may not send this type without asking first
        if request.headers.get("content-type") != "application/json":
            return PlainTextResponse("expected application/json", 415)
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MOST_BYTES:
                said = f"more than {MOST_BYTES >> 20} MiB; choose smaller images"
                return PlainTextResponse(said, 413, headers={"Connection": "close"})
        pieces = talk.answer(read_question(bytes(body)))
        first = await anext(pieces, "")
        return StreamingResponse(_after(first, pieces), media_type="text/plain", headers=HEADERS)

    async def mistake(request: Request, error: Exception) -> Response:
        del request
        return PlainTextResponse(" ".join(str(error).split()), 400)

    # a name that another site points here is not this page's
    hosts = LOOPBACK if config.host in {"127.0.0.1", "localhost", "::1"} else ["*"]
    return Starlette(
        routes=[Route("/", show), Route("/answer", answer, methods=["POST"])],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
        exception_handlers={DataError: mistake, ModelError: mistake},
    )


async def _after(first: str, pieces: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    try:
        async for piece in pieces:
            yield piece
    finally:
        await cast("Any", pieces).aclose()


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections.

    Raises:
        TrainError: The address is not this machine's, or the port is taken.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise TrainError(
            f"port: cannot listen on {host}:{port} ({error}); choose another --port or --host"
        ) from None


def chat(config: ChatConfig) -> None:
    """Serve until Ctrl-C."""
    try:
        import uvicorn
    except ImportError:
        raise TrainError("chat needs starlette and uvicorn; pip install 'lapilli[chat]'") from None
    device = torch_device(choose_device(config.device, visible_devices()))
    assistant = open_assistant(Path(config.model), device)
    with listen(config.host, config.port) as taken:
        port = taken.getsockname()[1]
        host = f"[{config.host}]" if ":" in config.host else config.host
        say(f"{config.model} on {device}: http://{host}:{port}/ (Ctrl-C ends it)")
        server = uvicorn.Server(
            uvicorn.Config(make_app(assistant, config), log_level="warning", access_log=False)
        )
        with suppress(KeyboardInterrupt):
            server.run(sockets=[taken])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    chat(parse(ChatConfig, first_as("model", argv), "Talk with a trained model in a browser."))
    return 0


if __name__ == "__main__":
    run(main)
