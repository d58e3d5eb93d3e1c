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

import psutil
import pytest

from lapilli.model.config import Decoding
from lapilli.model.parts.positions import positions_of
from lapilli.train.inference.assistant import Assistant
from lapilli.train.validation.answer_text import AnswerReader
from pipelines.cli.settings import ServeLimits
from tests.browser import FLAGS, Chromium, find_chromium
from tests.factories import image_bytes
from tests.pipelines.served import NAME, Served, body, serve

pytest.importorskip("uvicorn", reason="uvicorn (extra `chat`) is absent")
pytest.importorskip("starlette", reason="starlette (extra `chat`) is absent")
LIMITS = ServeLimits(decode_seconds=1, body_seconds=30)


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


def of(content: object, **more: object) -> dict[str, object]:
    """A request of one message."""
    return {"model": NAME, "messages": [{"role": "user", "content": content, **more}]}


def url(value: object) -> dict[str, object]:
    return of([{"type": "image_url", "image_url": {"url": value}}])


JPEG = "data:image/jpeg;base64,"
MANY = [{"type": "image_url", "image_url": {"url": JPEG}}] * 17


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (of(MANY), "at most 16"),
        (of("\ud800"), r"text is \ud800"),
        (of(["a"]), "content[0] is a; expected an object"),
        (of(7), "messages[0].content is 7"),
        (of([{"type": "text", "text": ["a"]}]), "text is a list"),
        (of([{"type": "input_audio"}]), "type is input_audio; expected text or image_url"),
        (of("a", role=["user"]), "messages[0].role is a list"),
        (of("a", role="tool"), "messages[0].role is tool"),
        (of("a", more=1), "messages[0] has 'more'"),
        (url("http://127.0.0.1/x.png"), "nothing is fetched"),
        (url("file:///etc/passwd"), "nothing is fetched"),
        (url("/etc/passwd"), "nothing is fetched"),
        (url(JPEG + "?"), "expected data:image"),
        (url(JPEG + "\ud800"), "expected data:image"),
        (url("data:text/html;base64,aaaa"), "expected data:image"),
        (url(7), "image_url.url is 7"),
        (url(JPEG + "eA=="), "image_undecodable"),
        ({"model": NAME, "messages": [7]}, "messages[0] is 7"),
        ({"model": NAME, "messages": {}}, "messages is an object"),
        ({"model": NAME, "messages": [], "more": 1}, "nothing asked"),
        (body("a", "b"), "nothing asked"),
        ({"model": NAME, "messages": body("a")["messages"] * 3}, "messages do not fit"),
        ({"model": NAME, "messages": body("a")["messages"] * 201}, "201; at most 200"),
        (
            json.dumps(body("a", temperature=0)).encode().replace(b": 0}", b": 1e999}"),
            "temperature is inf",
        ),
        (body("a", seed=True), "seed is True; expected a number"),
        (body("a", seed=0.5), "seed is 0.5; expected a whole number"),
        (body("a", max_tokens=10**12), "expected 1 to 1e+09"),
        (body("a", stop=["x"] * 5), "at most 4 texts"),
        (body("a", stop=[7]), "stop is a list"),
        (b'{"model": "tiny", "messages": Infinity}', "not JSON"),
        (b'{"model": "tiny", "seed": %s}' % (b"9" * 5000), "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b"[" + b"[]," * 200_000 + b"[]]", "values; at most 300000"),
        (b'"\xff"', "not JSON"),
        ("{}".encode("utf-16"), "not JSON"),
        (b"", "not JSON"),
        ([], "the request is a list"),
    ],
)
def test_a_value_of_the_wrong_kind_is_one_line(served: Served, sent: object, words: str) -> None:
    status, text = served.post(sent)
    assert status == 400
    assert words in text
    assert len(text) < 250
    assert text.isprintable()


def test_a_text_beyond_the_positions_is_refused_with_both_numbers(served: Served) -> None:
    known = positions_of(served.assistant.model.language)
    assert known is not None
    assert not known.is_fixed  # `generate` would go on with a warning
    ids = served.assistant.tokenizer("word " * known.limit)["input_ids"]
    assert len(ids) > known.limit
    for words in (known.limit, 600_000):
        status, text = served.post(body("word " * words))
        assert status == 400
        assert str(known.limit) in text
        assert any(int(number) > known.limit for number in text.split() if number.isdigit())


def test_an_image_that_takes_too_long_is_given_up(served: Served) -> None:
    """While it is decoded others are answered; its process is ended, not waited for."""
    slow = body("a", images=[jpeg_of_scans(4000, 20_000)])
    found: list[tuple[int, str]] = []
    thread = threading.Thread(target=lambda: found.append(served.post(slow)))
    thread.start()
    photo = body("a", images=[image_bytes("png", 40, 30)])
    while thread.is_alive():
        assert served.post(photo)[0] == 200
    (answer,) = found
    assert answer[0] == 400
    assert "decoding it takes more than 1 s" in answer[1]


@pytest.fixture
def impatient(tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path, ServeLimits(header_seconds=0.2, body_seconds=0.5)) as found:
        yield found


def test_connections_that_send_nothing_are_closed(impatient: Served) -> None:
    for sent in (b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: "):
        with socket.create_connection(("127.0.0.1", impatient.port), timeout=30) as link:
            link.sendall(sent)
            with suppress(ConnectionResetError):
                assert link.recv(1) == b""


def test_a_body_that_does_not_come_is_408(impatient: Served) -> None:
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=30) as link:
        link.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        answer = b""
        while piece := link.recv(4096):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 408")
    assert impatient.post(body("a"))[0] == 200


class Slow(AnswerReader):
    """Takes its time at each token, and never ends."""

    def take(self, token_id: int) -> bool:
        time.sleep(0.1)
        super().take(token_id)
        return False


@dataclass(frozen=True)
class Endless(Assistant):
    """Writes until nobody listens any more."""

    def reader(self, on_text: Callable[[str], None] | None = None) -> AnswerReader:
        plain = super().reader(on_text)
        plain.__class__ = Slow
        return plain


EVIL = "</p><img src=x onerror='window.pwned=1'><script>window.pwned=1</script>\x1b[2J"


class EvilReader(AnswerReader):
    """Reads the same whatever the ids."""

    told: Callable[[str], None]

    def take(self, token_id: int) -> bool:
        self.told(EVIL)
        return True


@dataclass(frozen=True)
class Evil(Assistant):
    """Answers in HTML."""

    def reader(self, on_text: Callable[[str], None] | None = None) -> AnswerReader:
        plain = super().reader(on_text)
        plain.__class__ = EvilReader
        assert isinstance(plain, EvilReader)
        assert on_text is not None
        plain.told = on_text
        return plain


def test_what_is_said_is_text_in_a_browser(chromium: Chromium, tmp_path: Path) -> None:
    """Of the model, of the user, and of an error that repeats a file's name."""
    del chromium  # is skipped where there is none
    from playwright.sync_api import sync_playwright

    with serve(tmp_path, ServeLimits(), kind=Evil) as served, sync_playwright() as playwright:
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
    decoding = Decoding(max_new_tokens=400)  # 40 seconds, if nobody left
    with serve(tmp_path, ServeLimits(waiting=2), decoding, kind=Endless, batch=1) as served:
        first = open_request(served, "endless")
        assert first.getresponse().read(5) == b"data:"
        others = {link.sock: link for link in (open_request(served, "b") for _ in range(2))}
        (refused,), _, _ = select.select(list(others), [], [], 30)
        answer = others[refused].getresponse()
        assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
        assert "2 questions are waiting" in answer.read().decode()
        for link in (first, *others.values()):  # one is written, one waits
            link.close()
        began = time.monotonic()
        while (found := served.post(body("c", max_tokens=2)))[0] == 503:
            pass  # until both are known to have left
        assert found[0] == 200
        assert time.monotonic() - began < 10


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
        "number": json.dumps(url(JPEG) | {"n": 10**9}),
        "text": json.dumps(body("word " * 600_000)),
        "scans": json.dumps(body("a", images=[jpeg_of_scans(7000, 20_000)])),
    }
    photo = json.dumps(body("a", images=[image_bytes("png", 40, 30)]))
    limits = ServeLimits() if costly > 3 else LIMITS
    with serve(tmp_path, limits) as served:
        before = memory()
        found: dict[str, list[int]] = {"costly": [], "others": []}
        others_are_done = threading.Event()

        def attack(sent: str) -> None:
            while not others_are_done.is_set():
                with suppress(TimeoutError):  # behind other images that take long
                    found["costly"].append(served.post(sent.encode())[0])

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
    sent = json.dumps(body(text, stream=True))
    link.request("POST", "/v1/chat/completions", sent, {"Content-Type": "application/json"})
    return link
