"""A model that is served by a thread of the test: the tiny one."""

from __future__ import annotations

import base64
import http.client
import json
from collections.abc import Generator, Sequence
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
from pipelines.cli.settings import ServeConfig, ServeLimits
from pipelines.serving.background import in_background
from tests.factories import make_tokenizer
from tests.train.small_run import small_run

__all__ = ["DECODING", "NAME", "Served", "asked", "body", "encoded", "serve"]

DECODING = Decoding(max_new_tokens=12)
NAME = "tiny"
PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class Served:
    """A model that is being served."""

    port: int
    assistant: Assistant

    def post(self, body: object, **headers: str) -> tuple[int, str]:
        """Status and text of an answer; of an error, its line."""
        status, found = self.request("POST", PATH, body, **headers)
        if status != 200:
            value: Any = json.loads(found) if found.startswith("{") else None
            return status, value["error"]["message"] if value else found
        return status, json.loads(found)["choices"][0]["message"]["content"]

    def request(
        self, method: str, path: str, body: object = None, **headers: str
    ) -> tuple[int, str]:
        """Status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, sent, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        found = response.status, response.read().decode()
        connection.close()
        return found


@contextmanager
def serve(
    folder: Path,
    limits: ServeLimits,
    decoding: Decoding = DECODING,
    kind: type[Assistant] = Assistant,
    batch: int = 8,
) -> Generator[Served]:
    """Serve until the block ends."""
    tokenizer = load_tokenizer(make_tokenizer(folder / "tokenizer"))
    assistant = kind(
        build_model(small_run(Path(), Path()).model).eval(),
        tokenizer,
        bind_template(get_template("v1"), tokenizer),
        ImageSpec(32, (122, 116, 104)),
    )
    config = ServeConfig(model="", port=0, name=NAME, decoding=decoding, limits=limits, batch=batch)
    with in_background(assistant, config) as port:
        yield Served(port, assistant)


def asked(*texts: str, images: Sequence[bytes] = ()) -> list[dict[str, Any]]:
    """Messages in OpenAI's form, the images in the first."""
    messages: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)
    ]
    if images:
        shown = [{"type": "image_url", "image_url": {"url": encoded(data)}} for data in images]
        messages[0]["content"] = [*shown, {"type": "text", "text": texts[0]}]
    return messages


def body(*texts: str, images: Sequence[bytes] = (), **more: Any) -> dict[str, Any]:
    """A whole request."""
    return {"model": NAME, "messages": asked(*texts, images=images), **more}


def encoded(data: bytes) -> str:
    """A data URL."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
