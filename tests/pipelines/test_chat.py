"""`python -m pipelines.chat`: the page in a real browser, and what it refuses."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import pipelines.chat
from lapilli.data.images import ImageSpec
from lapilli.data.record import ImagePart, TextPart, Turn
from lapilli.data.templates import get_template
from lapilli.data.tokenize import bind_template, load_tokenizer
from lapilli.model.generate import Decoding
from lapilli.model.vlm import build_model
from lapilli.train.ask import Assistant, Question
from lapilli.train.errors import TrainError
from pipelines.chat import ChatConfig, listen, make_app
from tests.browser import DESK, FLAGS, PHONE, SCHEMES, Chromium, find_chromium
from tests.factories import bad_image, image_bytes, make_tokenizer
from tests.train.small_run import small_run

uvicorn = pytest.importorskip("uvicorn", reason="uvicorn (extra `chat`) is absent")
pytest.importorskip("starlette", reason="starlette (extra `chat`) is absent")
IDLE = "#send:text-is('Send')"
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


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    tokenizer = load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("chat") / "tokenizer"))
    assistant = Assistant(
        build_model(small_run(Path(), Path()).model).eval(),
        tokenizer,
        bind_template(get_template("v1"), tokenizer),
        ImageSpec(32, (122, 116, 104)),
    )
    with listen("127.0.0.1", 0) as taken:
        app = make_app(assistant, ChatConfig("", decoding=DECODING))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
        thread.start()
        deadline = time.monotonic() + 30
        while not server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield Served(taken.getsockname()[1], assistant)
        server.should_exit = True
        thread.join(30)


def asked(*texts: str, images: int = 0) -> list[dict[str, Any]]:
    """Turns in the page's form, the images in the first."""
    return [
        {"role": ("user", "assistant")[n % 2], "text": text, "images": 0 if n else images}
        for n, text in enumerate(texts)
    ]


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_answers_are_the_models_over_several_turns(served: Served) -> None:
    photo = image_bytes("png", 40, 30, seed=1)
    turns = asked("What is it?", "A cat.", "Which colour?", images=1)
    status, text = served.post({"turns": turns, "images": [encoded(photo)]})
    question = Question(
        (
            Turn("user", (ImagePart(0), TextPart("What is it?"))),
            Turn("assistant", (TextPart("A cat."),)),
            Turn("user", (TextPart("Which colour?"),)),
        ),
        (photo,),
    )
    assert status == 200
    assert text.strip() == served.assistant.answer([question], DECODING)[0] != ""


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"no json", 400, "not a conversation"),
        ([], 400, "not a conversation"),
        ({"turns": asked("a"), "images": ["?"]}, 400, "not a conversation"),
        ({"turns": [], "images": []}, 400, "nothing asked"),
        ({"turns": asked("a", "b"), "images": []}, 400, "nothing asked"),
        ({"turns": asked("a", images=2), "images": [""]}, 400, "do not fit"),
        ({"turns": asked("a")[:1] * 3, "images": []}, 400, "do not fit"),
        ({"turns": asked("a", images=17), "images": [""] * 17}, 400, "at most 16"),
        ({"turns": asked("a", images=1), "images": [encoded(b"x")]}, 400, "image_undecodable"),
    ],
)
def test_what_cannot_be_answered_is_one_line(
    served: Served, body: object, status: int, words: str
) -> None:
    found = served.post(body)
    assert found[0] == status
    assert words in found[1]
    assert "\n" not in found[1]


def test_uploads_are_bounded(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = encoded(bad_image("bomb"))  # small as a file, huge once decoded
    status, text = served.post({"turns": asked("a", images=1), "images": [bomb]})
    assert status == 400
    assert "image_too_large" in text
    monkeypatch.setattr(pipelines.chat, "MOST_BYTES", 1 << 20)
    status, text = served.post(b"x" * ((1 << 20) + 1))
    assert (status, text) == (413, "more than 1 MiB; choose smaller images")


def test_other_sites_are_refused(served: Served) -> None:
    body = {"turns": asked("a"), "images": []}
    assert served.post(body, Host="evil.example")[0] == 400
    assert served.post(body, **{"Content-Type": "text/plain"})[0] == 415


def test_a_taken_port_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(TrainError, match=f"cannot listen on 127.0.0.1:{port}"):
            listen("127.0.0.1", port)


def test_the_page_in_a_browser(chromium: Chromium, served: Served, tmp_path: Path) -> None:
    """Asked by keyboard, on a phone in the dark and on a desk in light."""
    del chromium  # is skipped where there is none
    from playwright.sync_api import sync_playwright

    photo = tmp_path / "photo.png"
    photo.write_bytes(image_bytes("png", 57, 40, seed=2))
    (tmp_path / "broken.png").write_bytes(b"no image")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        for scheme, (width, height) in zip(SCHEMES, (DESK, PHONE), strict=True):
            context = browser.new_context(
                viewport={"width": width, "height": height}, color_scheme=scheme
            )
            tab = context.new_page()
            wrong: list[str] = []
            tab.on("pageerror", lambda error, wrong=wrong: wrong.append(str(error)))
            tab.goto(f"http://127.0.0.1:{served.port}/")
            _converse(tab, served, photo)
            assert wrong == []
            tab.screenshot(path=tmp_path / f"chat-{scheme}.png")
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            context.close()
        browser.close()


def _converse(tab: Any, served: Served, photo: Path) -> None:
    tab.set_input_files("#file", photo.with_name("broken.png"))
    tab.keyboard.type("What is it?")  # the question has the focus at once
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#error:not([hidden])")
    assert "image_undecodable" in tab.inner_text("#error")
    assert tab.query_selector_all("#log > p") == []
    assert tab.input_value("#text") == "What is it?"  # to be sent again

    tab.set_input_files("#file", photo)
    tab.focus("#text")
    tab.keyboard.press("Enter")
    tab.wait_for_selector(IDLE)
    first = tab.text_content("#log > .assistant")
    question = Question.of("What is it?", photo.read_bytes())
    assert first.strip() == served.assistant.answer([question], DECODING)[0]
    assert tab.is_hidden("#error")
    assert tab.evaluate("document.querySelector('#log img').naturalWidth") == 57

    tab.keyboard.type("And now?")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#log > .assistant >> nth=1")
    tab.wait_for_selector(IDLE)
    second = tab.locator("#log > .assistant").nth(1).text_content()
    turns = (
        *question.turns,
        Turn("assistant", (TextPart(first),)),
    )
    turns = (*turns, Turn("user", (TextPart("And now?"),)))
    again = Question(turns, question.images)
    assert second.strip() == served.assistant.answer([again], DECODING)[0]

    tab.click("#new")
    assert tab.query_selector_all("#log > p") == []
    tab.keyboard.type("Without a picture?")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#log > .assistant")
    tab.wait_for_selector(IDLE)
