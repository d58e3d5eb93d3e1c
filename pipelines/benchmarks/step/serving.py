"""Requests a second of the server, several at once and one at a time, through a socket.

Random weights, a byte tokenizer, one image and a short question a request. Clients that leave in the
middle are part of it: what the others get is compared with the answers one at a time.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from lapilli.data.images.view import ImageSpec
from lapilli.data.text.encode import bind_template
from lapilli.data.text.templates import get_template
from lapilli.model import LanguageConfig, ModelConfig, VisionConfig, build_model
from lapilli.model.config import Decoding
from lapilli.train.inference.assistant import Assistant
from pipelines.benchmarks.harness import by_turns, provenance, publish
from pipelines.benchmarks.step.shapes import decoder, tower
from pipelines.cli.command import UsageError, parse
from pipelines.cli.settings import ServeConfig, ServeLimits
from pipelines.serving.app import make_app
from pipelines.serving.server import listen, make_server

__all__ = ["ServingConfig", "main"]


@dataclass(frozen=True)
class ServingConfig:
    """The load.

    Attributes:
        clients: Requests at once.
        requests: Of each client.
        tokens: Of each answer.
        hidden_size: Of the language model, with four heads.
        layers: Of the language model.
        batch: Answers at once, beside one at a time.
        rounds: Rounds that count.
        save: Add rows to `results/serve.csv`.
    """

    clients: int = 16
    requests: int = 2
    tokens: int = 32
    hidden_size: int = 256
    layers: int = 4
    batch: int = 8
    rounds: int = 3
    save: bool = True


def main(argv: Sequence[str]) -> int:
    """Let all clients ask both servers by turns, tell, and add a row for each."""
    config = parse(ServingConfig, argv, "Requests a second of `lapilli serve`.")
    torch.set_num_threads(1)
    assistant = _assistant(config)
    with _served(assistant, config, 1) as alone, _served(assistant, config, config.batch) as many:
        expected = _answer(alone, config, 0)
        sides = {
            "one at a time": lambda: _load(alone, config, expected),
            f"{config.batch} at once": lambda: _load(many, config, expected),
            f"{config.batch} at once, others leave": lambda: _with_leavers(many, config, expected),
        }
        taken = by_turns(sides, config.rounds)
    count = config.clients * config.requests
    rows: list[dict[str, Any]] = []
    base = taken["one at a time"].median
    for side, spread in taken.items():
        rate = spread.rate(count)
        rows.append(
            {
                "side": side,
                "clients": config.clients,
                "requests": count,
                "tokens": config.tokens,
                "hidden_size": config.hidden_size,
                "layers": config.layers,
                "requests_per_second": f"{rate.median:.2f}",
                "low": f"{rate.low:.2f}",
                "high": f"{rate.high:.2f}",
                "of_one_at_a_time": f"{base / spread.median:.2f}",
                "lost_or_other": 0,  # else `_load` has stopped
            }
        )
    head = provenance(("torch", "transformers", "starlette", "uvicorn"), "serve", argv)
    shown = {"side": "side", "requests/s": "requests_per_second", "ratio": "of_one_at_a_time"}
    publish("serve", head, rows, shown, title="answers through HTTP", save=config.save)
    return 0


def _assistant(config: ServingConfig) -> Assistant:
    """A model of random weights with a tokenizer of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(["<s>", "</s>", *alphabet])}
    backend = Tokenizer(BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    vision = tower(64, layers=2, heads=4, image=64, patch=16, inner=128)
    language = decoder(
        config.hidden_size, config.layers, heads=4, vocabulary=len(vocabulary), positions=1024
    )
    config_of_model = ModelConfig(
        vision=VisionConfig(tower="clip", settings=vision),
        language=LanguageConfig(model_type="llama", settings=language),
    )
    return Assistant(
        model=build_model(config_of_model).eval(),
        tokenizer=tokenizer,
        template=bind_template(get_template("v1"), tokenizer),
        spec=ImageSpec(size=64, fill=(122, 116, 104)),
        name="random",
    )


@contextmanager
def _served(assistant: Assistant, config: ServingConfig, batch: int) -> Generator[int]:
    """A server in a thread; its port."""
    decoding = Decoding(max_new_tokens=config.tokens)
    settings = ServeConfig(model="", batch=batch, decoding=decoding, limits=ServeLimits())
    with listen("127.0.0.1", 0) as taken:
        app = make_app(assistant, settings)
        server = make_server(app, settings.limits)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield taken.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()
            app.state.worker.close()


def _request(port: int, number: int, *, streams: bool = False) -> http.client.HTTPResponse:
    pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": f"What is number {number}?"},
    ]
    body = {"model": "random", "messages": [{"role": "user", "content": content}]}
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    sent = json.dumps({**body, "stream": streams})
    link.request("POST", "/v1/chat/completions", sent, {"Content-Type": "application/json"})
    return link.getresponse()


def _answer(port: int, config: ServingConfig, number: int) -> str:
    with _request(port, number) as response:
        found = json.load(response)
    if found["usage"]["completion_tokens"] != config.tokens:
        raise UsageError(f"an answer of {found['usage']} tokens; expected {config.tokens}")
    return found["choices"][0]["message"]["content"]


def _load(port: int, config: ServingConfig, expected: str) -> float:
    """Seconds until all clients have all their answers; the first question's is compared.

    Raises:
        UsageError: An answer is another than one at a time.
    """

    def ask(client: int) -> None:
        for number in range(config.requests):
            asked = (client * config.requests + number) % 4
            if (said := _answer(port, config, asked)) != expected and asked == 0:
                raise UsageError(f"answered {said!r}; one at a time {expected!r}")

    began = time.perf_counter()
    with ThreadPoolExecutor(config.clients) as pool:
        list(pool.map(ask, range(config.clients)))
    return time.perf_counter() - began


def _with_leavers(port: int, config: ServingConfig, expected: str) -> float:
    """The same while as many clients disconnect in the middle of their answers."""
    is_over = threading.Event()

    def leave(number: int) -> None:
        while not is_over.is_set():
            response = _request(port, number, streams=True)
            response.read(300)
            response.close()

    threads = [threading.Thread(target=leave, args=[n]) for n in range(config.clients // 4)]
    for thread in threads:
        thread.start()
    try:
        return _load(port, config, expected)
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
