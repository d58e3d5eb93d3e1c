"""`lapilli chat`: the page in a real browser, and what the server refuses of others."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lapilli.data.record import ImagePart, TextPart, Turn
from lapilli.train.errors import TrainError
from lapilli.train.inference.assistant import Question
from pipelines.cli.settings import ServeLimits
from pipelines.serving.server import listen
from tests.browser import DESK, FLAGS, PHONE, SCHEMES, Chromium, find_chromium
from tests.factories import bad_image, image_bytes
from tests.pipelines.served import DECODING, Served, body, serve

pytest.importorskip("uvicorn", reason="uvicorn (extra `chat`) is absent")
pytest.importorskip("starlette", reason="starlette (extra `chat`) is absent")
IDLE = "#send:text-is('Send')"
LIMITS = ServeLimits(body_mib=1, decode_seconds=2)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("chat"), LIMITS) as found:
        yield found


def test_answers_are_the_models_over_several_turns(served: Served) -> None:
    photo = image_bytes("png", 40, 30, seed=1)
    status, text = served.post(body("What is it?", "A cat.", "Which colour?", images=[photo]))
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


def test_uploads_are_bounded(served: Served) -> None:
    bomb = bad_image("bomb")  # small as a file, huge once decoded
    status, text = served.post(body("a", images=[bomb]))
    assert status == 400
    assert "image_too_large" in text
    status, text = served.post(b"x" * ((1 << 20) + 1))
    assert (status, text) == (413, "more than 1 MiB; choose smaller images")


def test_other_sites_are_refused(served: Served) -> None:
    assert served.post(body("a"), Host="evil.example")[0] == 400
    assert served.post(body("a"), Origin="https://evil.example")[0] == 403
    assert served.post(body("a"), Origin="null")[0] == 403
    assert served.post(body("a"), Origin=f"http://127.0.0.1:{served.port}")[0] == 200
    assert served.post(body("a"), **{"Content-Type": "text/plain"})[0] == 415


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
