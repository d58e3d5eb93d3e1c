"""The ten commands of `docs/own_data.md`, one after the other in an empty folder, by the shell."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.docs.pages import blocks, matches, section
from tests.own_photos import Photo, draw_photo, own_photos, write_photos

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]  # two minutes on two quiet cores

PAGE = "own_data.md"
COUNT = 240
RIGHT = 0.9  # of the answers; 1 in 6 colours and 1 in 2 sides are right without looking: 0.33


def steps() -> list[tuple[str, list[str]]]:
    """The page's commands, each with the lines that it says are printed."""
    found: list[tuple[str, list[str]]] = []
    for block in blocks(section(PAGE, "Ten commands")):
        if block.language == "sh":
            (line,) = block.text.splitlines()
            found.append((line, []))
        else:
            found[-1][1].extend(block.text.splitlines())
    return found


def environment() -> dict[str, str]:
    """A user's, in which `lapilli` is the command of this environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "COLUMNS": "200"}


def shell(command: str, folder: Path) -> str:
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment(), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_the_ten_commands(tmp_path: Path) -> None:
    photos = own_photos(COUNT)
    write_photos(tmp_path / "photos", photos)
    *commands, (chat, chat_lines) = steps()
    assert len(commands) == 9
    for command, lines in commands:
        said = shell(command, tmp_path)
        for line in lines:
            assert matches(line, said), f"{command}: {line!r} is not in\n{said}"
        if " generate " in command:
            assert said.strip() == photos[7].colour  # the photo and question that the page names
    check_answers(tmp_path / "answers.jsonl", photos)
    check_stops(commands, tmp_path)
    check_chat(chat, chat_lines, tmp_path)


def check_answers(file: Path, photos: list[Photo]) -> None:
    """The answers about photos held out against what was drawn."""
    truth = {(p.name, question): answer for p in photos for question, answer in p.questions()}
    answers = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(answers) == 2 * COUNT * 0.05
    right = [
        truth[re.split(r"[/#]", one["sample_id"])[1], one["question"]] == one["given"]
        for one in answers
    ]
    assert sum(right) / len(right) >= RIGHT


def check_stops(commands: list[tuple[str, list[str]]], folder: Path) -> None:
    """The same commands again do nothing twice; the page says what they print."""
    (train,) = [command for command, _ in commands if " train " in command]
    (said,) = re.findall(r"`(\.\.\. already finished .+?)`", section(PAGE, "When it stops"))
    assert matches(said, shell(train, folder))


def check_chat(command: str, lines: list[str], folder: Path) -> None:
    """The page is served, answers about a photo it has never seen, and ends at Ctrl-C."""
    log = folder / "chat.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            f"exec {command} --port 0", shell=True, cwd=folder, env=environment(), stdout=output,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)/", log.read_text())):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        assert all(matches(line, log.read_text()) for line in lines)
        port = int(found[1])
        assert "<title>" in asked(port, "GET", "/", None)
        model = json.loads(asked(port, "GET", "/v1/models", None))["data"][0]["id"]
        new = [
            Photo(f"new{n}.jpg", *kind)
            for n, kind in enumerate((("red", "left"), ("blue", "right")))
        ]
        for number, photo in enumerate(new):
            path = folder / photo.name
            draw_photo(photo, 10_000 + number).save(path)
            image = base64.b64encode(path.read_bytes()).decode()
            for question, answer in photo.questions():
                url = {"url": f"data:image/jpeg;base64,{image}"}
                shown = {"type": "image_url", "image_url": url}
                content = [shown, {"type": "text", "text": question}]
                messages = [{"role": "user", "content": content}]
                body = json.dumps({"model": model, "messages": messages})
                said = json.loads(asked(port, "POST", "/v1/chat/completions", body))
                assert said["choices"][0]["message"]["content"] == answer
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0, log.read_text()
    finally:
        if server.poll() is None:
            server.kill()


def asked(port: int, method: str, path: str, body: str | None) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    assert response.status == 200, text
    return text
