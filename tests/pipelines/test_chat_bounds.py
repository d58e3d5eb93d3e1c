"""What one asker costs the others: requests that cost much, connections that send nothing."""

from __future__ import annotations

import http.client
import json
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

from lapilli.model.parts.positions import positions_of
from lapilli.train.inference.assistant import Assistant, Question
from pipelines.cli.settings import ChatLimits
from tests.browser import FLAGS, Chromium, find_chromium
from tests.factories import image_bytes
from tests.pipelines.served import Served, asked, encoded, serve

pytest.importorskip("uvicorn", reason="uvicorn (extra `chat`) is absent")
pytest.importorskip("starlette", reason="starlette (extra `chat`) is absent")
TURN = asked("a")[0]
LIMITS = ChatLimits(decode_seconds=1, body_seconds=30)


def jpeg_of_scans(side: int, count: int) -> bytes:
    """A progressive JPEG of one DC scan and `count` empty AC scans over all its blocks.

    A run of 32,767 blocks without coefficients is 15 bits, so a scan is a few bytes and costs a
    pass over the whole image.
    """
    blocks = (-(-side // 8)) ** 2
    bits = ("0" + "1" * 14) * -(-blocks // 32767)
    bits += "1" * (-len(bits) % 8)
    body = bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))

    def table(kind: int, value: int) -> bytes:
        return b"\xff\xc4" + struct.pack(">HB", 20, kind) + bytes([1, *[0] * 15, value])

    def scan(spectral: Sequence[int], data: bytes) -> bytes:
        return b"\xff\xda" + struct.pack(">HB", 8, 1) + bytes([1, 0, *spectral, 0]) + data

    return (
        b"\xff\xd8\xff\xdb"
        + struct.pack(">HB", 67, 0)
        + bytes([1] * 64)
        + b"\xff\xc2"
        + struct.pack(">HBHHB", 11, 8, side, side, 1)
        + bytes([1, 0x11, 0])
        + table(0, 0)
        + table(0x10, 0xE0)
        + scan([0, 0], b"\0" * -(-blocks // 8))
        + scan([1, 63], body.replace(b"\xff", b"\xff\0")) * count
        + b"\xff\xd9"
    )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("chat"), LIMITS) as found:
        yield found


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"turns": [TURN | {"images": 10**9}], "images": []}, "turns[0].images is 1000000000"),
        ({"turns": [TURN | {"images": 17}], "images": []}, "at most 16"),
        ({"turns": [TURN | {"images": -1}], "images": []}, "turns[0].images is -1"),
        ({"turns": [TURN | {"images": True}], "images": []}, "turns[0].images is True"),
        ({"turns": [TURN | {"images": "1"}], "images": []}, "turns[0].images is 1"),
        ({"turns": [TURN | {"images": 1.0}], "images": [""]}, "turns[0].images is 1.0"),
        ({"turns": [TURN | {"images": None}], "images": []}, "turns[0].images is None"),
        ({"turns": [TURN | {"text": "\ud800"}], "images": []}, r"turns[0].text is \ud800"),
        ({"turns": [TURN | {"text": ["a"]}], "images": []}, "turns[0].text is a list"),
        ({"turns": [TURN | {"text": 7}], "images": []}, "turns[0].text is 7"),
        ({"turns": [TURN | {"role": ["user"]}], "images": []}, "turns[0].role is a list"),
        ({"turns": [TURN | {"role": "system"}], "images": []}, "turns[0].role is system"),
        ({"turns": [TURN | {"more": 1}], "images": []}, "turns[0] is an object"),
        ({"turns": [7], "images": []}, "turns[0] is 7"),
        ({"turns": {}, "images": []}, "turns is an object"),
        ({"turns": [TURN], "images": {}}, "images is an object"),
        ({"turns": [TURN], "images": [], "more": 1}, "the conversation is an object"),
        ({"turns": [TURN] * 201, "images": []}, "201 turns; at most 200"),
        ({"turns": [TURN | {"images": 1}], "images": [7]}, "images[0] is 7"),
        ({"turns": [TURN | {"images": 1}], "images": ["\ud800"]}, "images[0] is"),
        (b'{"turns": [{"role": "user", "text": "a", "images": Infinity}], "images": []}', "JSON"),
        (b'{"turns": [], "images": NaN}', "JSON"),
        (b'{"turns": [], "images": 1e999}', "images is inf"),
        (b'{"turns": [], "images": %s}' % (b"9" * 5000), "JSON"),
        (b"[" * 200_000, "JSON"),
        (b"[" + b"[]," * 200_000 + b"[]]", "values; at most 300000"),
        (b'"\xff"', "JSON"),
        ("{}".encode("utf-16"), "JSON"),
        (b"", "JSON"),
    ],
)
def test_a_value_of_the_wrong_kind_is_one_line(served: Served, body: object, words: str) -> None:
    status, text = served.post(body)
    assert status == 400
    assert words in text
    assert len(text) < 200
    assert text.isprintable()


def test_a_text_beyond_the_positions_is_refused_with_both_numbers(served: Served) -> None:
    known = positions_of(served.assistant.model.language)
    assert known is not None
    assert not known.is_fixed  # `generate` would go on with a warning
    ids = served.assistant.tokenizer("word " * known.limit)["input_ids"]
    assert len(ids) > known.limit
    for words in (known.limit, 600_000):
        status, text = served.post({"turns": asked("word " * words), "images": []})
        assert status == 400
        assert str(known.limit) in text
        assert any(int(number) > known.limit for number in text.split() if number.isdigit())


def test_an_image_that_takes_too_long_is_given_up(served: Served) -> None:
    """While it is decoded others are answered; its process is ended, not waited for."""
    slow = {"turns": asked("a", images=1), "images": [encoded(jpeg_of_scans(4000, 20_000))]}
    found: list[tuple[int, str]] = []
    thread = threading.Thread(target=lambda: found.append(served.post(slow)))
    thread.start()
    photo = {"turns": asked("a", images=1), "images": [encoded(image_bytes("png", 40, 30))]}
    while thread.is_alive():
        assert served.post(photo)[0] == 200
    (answer,) = found
    assert answer[0] == 400
    assert "decoding it takes more than 1 s" in answer[1]


@pytest.fixture
def impatient(tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path, ChatLimits(header_seconds=0.2, body_seconds=0.5)) as found:
        yield found


def test_connections_that_send_nothing_are_closed(impatient: Served) -> None:
    for sent in (b"", b"POST /answer HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: "):
        with socket.create_connection(("127.0.0.1", impatient.port), timeout=30) as link:
            link.sendall(sent)
            with suppress(ConnectionResetError):
                assert link.recv(1) == b""


def test_a_body_that_does_not_come_is_408(impatient: Served) -> None:
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=30) as link:
        link.sendall(
            b"POST /answer HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        answer = b""
        while piece := link.recv(4096):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 408")
    assert impatient.post({"turns": asked("a"), "images": []})[0] == 200


@dataclass(frozen=True)
class Endless(Assistant):
    """Writes until nobody listens any more."""

    ended: ClassVar[threading.Event] = threading.Event()

    def answer(
        self,
        questions: Sequence[Question],
        decoding: object,
        *,
        on_text: Callable[[str], None] | None = None,
        pixels: object = None,
        is_over: Callable[[], bool] = lambda: False,
    ) -> list[str]:
        if on_text and questions[0].turns[0].text == "endless":
            on_text("a")
            while not is_over():
                time.sleep(0)  # lets the server's thread run
            self.ended.set()
        return [""]


EVIL = "</p><img src=x onerror='window.pwned=1'><script>window.pwned=1</script>\x1b[2J"


@dataclass(frozen=True)
class Evil(Assistant):
    """Answers in HTML."""

    def answer(
        self,
        questions: Sequence[Question],
        decoding: object,
        *,
        on_text: Callable[[str], None] | None = None,
        pixels: object = None,
        is_over: Callable[[], bool] = lambda: False,
    ) -> list[str]:
        if on_text:
            on_text(EVIL)
        return [EVIL]


def test_what_is_said_is_text_in_a_browser(chromium: Chromium, tmp_path: Path) -> None:
    """Of the model, of the user, and of an error that repeats a file's name."""
    del chromium  # is skipped where there is none
    from playwright.sync_api import sync_playwright

    with serve(tmp_path, ChatLimits(), kind=Evil) as served, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        tab = browser.new_page()
        tab.goto(f"http://127.0.0.1:{served.port}/")
        tab.fill("#text", EVIL)
        tab.keyboard.press("Enter")
        tab.wait_for_selector("#log > .assistant:not(:empty)")
        tab.wait_for_selector("#send:text-is('Send')")
        said = [tab.text_content(f"#log > .{role}") or "" for role in ("user", "assistant")]
        assert "onerror='window.pwned=1'" in said[0]
        assert said[1] == EVIL
        assert tab.query_selector_all("#log img, #log script") == []
        assert tab.evaluate("window.pwned") is None
        browser.close()


def test_work_stops_when_the_asker_has_left(tmp_path: Path) -> None:
    """Whoever waits then is answered; whoever is one too many is told to come later."""
    with serve(tmp_path, ChatLimits(waiting=2), kind=Endless) as served:
        first = open_request(served, "endless")
        assert first.getresponse().read(1) == b"a"
        others = {link.sock: link for link in (open_request(served, "b") for _ in range(2))}
        (refused,), _, _ = select.select(list(others), [], [], 30)
        answer = others[refused].getresponse()
        assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
        assert "2 questions are waiting" in answer.read().decode()
        for link in (first, *others.values()):  # one is written, one waits
            link.close()
        assert Endless.ended.wait(30)
        while (found := served.post({"turns": asked("c"), "images": []}))[0] == 503:
            pass  # until both are known to have left
        assert found[0] == 200


@pytest.mark.parametrize(
    ("clients", "costly", "requests"),
    [
        pytest.param(8, 3, 1, id="few"),
        pytest.param(40, 10, 8, id="many", marks=[pytest.mark.long, pytest.mark.timeout(1200)]),
    ],
)
def test_costly_requests_do_not_stop_the_others(
    tmp_path: Path, clients: int, costly: int, requests: int
) -> None:
    """All others are answered, each of them, and memory stays within 1 GB of what it was."""
    bodies = {
        "number": json.dumps({"turns": [TURN | {"images": 10**9}], "images": []}),
        "text": json.dumps({"turns": asked("word " * 600_000), "images": []}),
        "scans": json.dumps(
            {"turns": asked("a", images=1), "images": [encoded(jpeg_of_scans(7000, 20_000))]}
        ),
    }
    photo = json.dumps(
        {"turns": asked("a", images=1), "images": [encoded(image_bytes("png", 40, 30))]}
    )
    limits = ChatLimits() if costly > 3 else LIMITS
    with serve(tmp_path, limits) as served:
        before = memory()
        found: dict[str, list[int]] = {"costly": [], "others": []}
        others_are_done = threading.Event()

        def attack(body: str) -> None:
            while not others_are_done.is_set():
                with suppress(TimeoutError):  # behind other images that take long
                    found["costly"].append(served.post(body.encode())[0])

        def ask() -> None:
            for _ in range(requests):
                found["others"].append(served.post(photo.encode())[0])

        attacks = [
            threading.Thread(target=attack, args=[[*bodies.values()][number % 3]])
            for number in range(costly)
        ]
        others = [threading.Thread(target=ask) for _ in range(clients - costly)]
        for thread in (*attacks, *others):
            thread.start()
        most = before
        while any(thread.is_alive() for thread in others):
            most = max(most, memory())
            time.sleep(0.05)
        others_are_done.set()
        for thread in (*attacks, *others):
            thread.join()
        assert found["others"] == [200] * (clients - costly) * requests
        assert {*found["costly"]} <= {400, 503}
        assert most - before < 1_000_000_000


def memory() -> int:
    """Bytes of this process and all below it that no other shares."""
    total = 0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with suppress(psutil.Error):
            total += process.memory_full_info().uss
    return total


def open_request(served: Served, text: str) -> http.client.HTTPConnection:
    link = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    body = json.dumps({"turns": asked(text), "images": []})
    link.request("POST", "/answer", body, {"Content-Type": "application/json"})
    return link
