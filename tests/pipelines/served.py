"""A chat page that is served by a thread of the test, with the tiny model behind it."""

from __future__ import annotations

import base64
import http.client
import json
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapilli.data.images.view import ImageSpec
from lapilli.data.text.encode import bind_template, load_tokenizer
from lapilli.data.text.templates import get_template
from lapilli.model.config import Decoding
from lapilli.model.vlm import build_model
from lapilli.train.inference.assistant import Assistant
from pipelines.chat import make_app
from pipelines.chat_page.server import listen, make_server
from pipelines.cli.settings import ChatConfig, ChatLimits
from tests.factories import make_tokenizer
from tests.train.small_run import small_run

__all__ = ["DECODING", "Served", "asked", "encoded", "serve"]

DECODING = Decoding(max_new_tokens=12)


@dataclass(frozen=True)
class Served:
    """A page that is being served and the model behind it."""

    port: int
    assistant: Assistant

    def post(self, body: object, **headers: str) -> tuple[int, str]:
        """Status and text of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", "/answer", sent, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        found = response.status, response.read().decode()
        connection.close()
        return found


@contextmanager
def serve(
    folder: Path,
    limits: ChatLimits,
    decoding: Decoding = DECODING,
    kind: type[Assistant] = Assistant,
) -> Generator[Served]:
    """Serve until the block ends."""
    tokenizer = load_tokenizer(make_tokenizer(folder / "tokenizer"))
    assistant = kind(
        build_model(small_run(Path(), Path()).model).eval(),
        tokenizer,
        bind_template(get_template("v1"), tokenizer),
        ImageSpec(32, (122, 116, 104)),
    )
    with listen("127.0.0.1", 0) as taken:
        app = make_app(assistant, ChatConfig("", decoding=decoding, limits=limits))
        server = make_server(app, limits)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
        thread.start()
        deadline = time.monotonic() + 30
        while not server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield Served(taken.getsockname()[1], assistant)
        server.should_exit = True
        thread.join(30)
        app.state.worker.close()


def asked(*texts: str, images: int = 0) -> list[dict[str, Any]]:
    """Turns in the page's form, the images in the first."""
    return [
        {"role": ("user", "assistant")[n % 2], "text": text, "images": 0 if n else images}
        for n, text in enumerate(texts)
    ]


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()
