"""`lapilli serve`: OpenAI's chat completions over a socket, beside the model's own answers."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lapilli.data.errors import DataError
from lapilli.data.record import TextPart, Turn
from lapilli.model.config import Decoding
from lapilli.model.generate import next_logits
from lapilli.train.inference.assistant import Question
from pipelines.cli.settings import ServeConfig, ServeLimits
from tests.factories import image_bytes
from tests.pipelines.served import DECODING, NAME, Served, body, serve

pytest.importorskip("uvicorn", reason="uvicorn (extra `chat`) is absent")
pytest.importorskip("starlette", reason="starlette (extra `chat`) is absent")
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("serve"), ServeLimits()) as found:
        yield found


def ask(served: Served, request: object) -> dict[str, Any]:
    status, found = served.request("POST", PATH, request)
    assert status == 200, found
    return json.loads(found)


def events(served: Served, request: object) -> list[Any]:
    """The objects of a stream."""
    status, found = served.request("POST", PATH, request)
    assert status == 200, found
    lines = [line.removeprefix("data: ") for line in found.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def own(served: Served, text: str, *photos: bytes, **more: Any) -> str:
    """The model's own answer."""
    decoding = replace(DECODING, **more)
    return served.assistant.answer([Question.of(text, *photos)], decoding)[0]


def test_an_answer_has_the_form_of_the_schema(served: Served) -> None:
    """The fields that OpenAI's description requires of a chat completion."""
    photo = image_bytes("png", 40, 30, seed=1)
    found = ask(served, body("What is it?", images=[photo]))
    assert found.keys() >= {"id", "object", "created", "model", "choices", "usage"}
    assert (found["object"], found["model"]) == ("chat.completion", NAME)
    (choice,) = found["choices"]
    assert choice.keys() == {"index", "message", "logprobs", "finish_reason"}
    said = own(served, "What is it?", photo)
    assert choice["message"] == {"role": "assistant", "content": said, "refusal": None}
    prompt = served.assistant.prompt(Question.of("What is it?", photo).turns)
    slots = served.assistant.model.vision.num_tokens
    assert found["usage"]["prompt_tokens"] == len(prompt) - 1 + slots
    assert found["usage"]["completion_tokens"] == 12
    assert choice["finish_reason"] == "length"


def test_a_stream_is_the_same_answer_in_pieces(served: Served) -> None:
    request = body("Count.", stream=True, stream_options={"include_usage": True})
    found = events(served, request)
    assert {one["object"] for one in found} == {"chat.completion.chunk"}
    assert len({one["id"] for one in found}) == 1
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert found[-1]["choices"] == []
    whole = ask(served, body("Count."))
    assert found[-1]["usage"] == whole["usage"]
    pieces = [one["choices"][0]["delta"].get("content", "") for one in found[:-1]]
    assert "".join(pieces) == whole["choices"][0]["message"]["content"] == own(served, "Count.")
    reasons = [one["choices"][0]["finish_reason"] for one in found[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]


def test_a_request_decides_length_and_chance(served: Served) -> None:
    assert ask(served, body("a", max_tokens=3))["usage"]["completion_tokens"] == 3
    assert ask(served, body("a", max_completion_tokens=2))["usage"]["completion_tokens"] == 2
    for seed in (1, 2):
        said = ask(served, body("a", temperature=1.5, top_p=0.9, seed=seed))
        expected = own(served, "a", temperature=1.5, top_p=0.9, seed=seed)
        assert said["choices"][0]["message"]["content"] == expected


def test_a_stop_text_ends_the_answer_and_is_not_said(served: Served) -> None:
    whole = own(served, "Why?")
    for start, size in ((0, 1), (len(whole) // 2, 3), (len(whole) - 1, 1)):
        stop = whole[start : start + size]
        for streams in (False, True):
            request = body("Why?", stop=[stop, "never said"], stream=streams)
            if streams:
                found = events(served, request)
                said = "".join(one["choices"][0]["delta"].get("content", "") for one in found)
                reason = found[-1]["choices"][0]["finish_reason"]
            else:
                (choice,) = ask(served, request)["choices"]
                said, reason = choice["message"]["content"], choice["finish_reason"]
            assert said == whole[: whole.index(stop)]
            assert reason == "stop"


def test_log_probabilities_are_the_models(served: Served) -> None:
    found = ask(served, body("a", max_tokens=2, logprobs=True, top_logprobs=3))
    tokens = found["choices"][0]["logprobs"]["content"]
    prompt = served.assistant.prompt(Question.of("a").turns)
    empty = np.zeros((0, 32, 32, 3), np.uint8)
    logits = next_logits(served.assistant.model, [prompt], [empty])[0]
    expected = logits.log_softmax(-1)
    assert tokens[0]["logprob"] == pytest.approx(float(expected.max()), abs=1e-5)
    top = [one["logprob"] for one in tokens[0]["top_logprobs"]]
    assert top == pytest.approx(expected.topk(3).values.tolist(), abs=1e-5)
    best = served.assistant.tokenizer.decode([int(expected.argmax())])
    assert (tokens[0]["token"], bytes(tokens[0]["bytes"]).decode()) == (best, best)
    assert len(tokens) == 2
    streamed = events(served, body("a", max_tokens=2, logprobs=True, stream=True))
    parts = [one["choices"][0]["logprobs"] for one in streamed]
    assert sum(len(part["content"]) for part in parts if part) == 2
    assert ask(served, body("a"))["choices"][0]["logprobs"] is None


def test_a_system_message_stands_in_front(served: Served) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Who?"}]},
    ]
    said = ask(served, {"model": NAME, "messages": messages})["choices"][0]["message"]["content"]
    turns = (Turn("system", (TextPart("Be brief."),)), Turn("user", (TextPart("Who?"),)))
    assert said == served.assistant.answer([Question(turns)], DECODING)[0]


def test_models_are_listed(served: Served) -> None:
    status, found = served.request("GET", "/v1/models")
    (card,) = json.loads(found)["data"]
    assert (status, card["id"], card["object"]) == (200, NAME, "model")
    assert json.loads(served.request("GET", f"/v1/models/{NAME}")[1]) == card


@pytest.mark.parametrize(
    ("method", "path", "sent", "status", "param", "code"),
    [
        ("POST", PATH, body("a") | {"model": "gpt-4"}, 404, None, "model_not_found"),
        ("GET", "/v1/models/other", None, 404, "model", "model_not_found"),
        ("POST", PATH, body("a") | {"model": None}, 400, "model", None),
        ("POST", PATH, body("a", n=2), 400, "n", "unsupported_parameter"),
        ("POST", PATH, body("a", tools=[{}]), 400, "tools", "unsupported_parameter"),
        ("POST", PATH, body("a", max_token=2), 400, "max_token", "unknown_parameter"),
        ("POST", PATH, body("a", top_logprobs=2), 400, "top_logprobs", None),
        ("POST", PATH, body("a", top_logprobs=21, logprobs=True), 400, "top_logprobs", None),
        ("POST", PATH, body("a", top_p=0), 400, "top_p", None),
        ("POST", PATH, body("a", temperature=2.1), 400, "temperature", None),
        ("POST", PATH, body("a", stream="yes"), 400, "stream", None),
        ("POST", PATH, body("a", max_tokens=10**6), 400, "messages", "context_length_exceeded"),
        ("GET", "/v1/engines", None, 404, None, None),
        ("GET", PATH, None, 405, None, None),
    ],
)
def test_errors_have_openais_form(
    served: Served, method: str, path: str, sent: object, status: int, param: str, code: str
) -> None:
    found, text = served.request(method, path, sent)
    error = json.loads(text)["error"]
    assert found == status
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert error["message"]
    assert "\n" not in error["message"]


def test_fields_without_effect_are_taken(served: Served) -> None:
    more: dict[str, Any] = {
        "user": "me",
        "n": 1,
        "presence_penalty": 0,
        "response_format": {"type": "text"},
    }
    assert ask(served, body("a", **more, logit_bias=None))["choices"]


def test_answers_side_by_side_are_those_one_at_a_time(served: Served) -> None:
    photo = image_bytes("png", 30, 40, seed=4)
    texts = [f"{'word ' * (3 * n)}number {n}?" for n in range(12)]
    photos = [[photo] if n % 3 == 0 else [] for n in range(12)]
    requests = [body(texts[n], images=photos[n], max_tokens=4 + n) for n in range(12)]
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda one: ask(served, one), requests))
    for number, (text, shown, answer) in enumerate(zip(texts, photos, found, strict=True)):
        expected = own(served, text, *shown, max_new_tokens=4 + number)
        assert answer["choices"][0]["message"]["content"] == expected
        assert answer["usage"]["completion_tokens"] == 4 + number


def test_nothing_is_lost_when_clients_leave(tmp_path: Path) -> None:
    """Half of the clients disconnect in the middle; all others get their whole answer."""
    with serve(tmp_path, ServeLimits(), Decoding(max_new_tokens=60), batch=4) as served:
        expected = own(served, "stay", max_new_tokens=60)
        wrong: list[str] = []

        def stay() -> None:
            for _ in range(3):
                said = ask(served, body("stay"))["choices"][0]["message"]["content"]
                if said != expected:
                    wrong.append(said)

        def leave() -> None:
            for _ in range(3):
                link = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
                headers = {"Content-Type": "application/json"}
                link.request("POST", PATH, json.dumps(body("leave", stream=True)), headers)
                link.getresponse().read(200)
                link.close()

        threads = [threading.Thread(target=one) for one in (stay, leave) * 6]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        deadline = time.monotonic() + 30
        while served.post(body("last"))[0] != 200:
            assert time.monotonic() < deadline


def test_a_batch_of_none_is_one_line() -> None:
    with pytest.raises(DataError, match="batch: 0; expected at least 1"):
        ServeConfig("run", batch=0)
