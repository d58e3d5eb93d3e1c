"""OpenAI's own client reads what the server writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lapilli.train.inference.assistant import Question
from pipelines.cli.settings import ServeLimits
from tests.factories import image_bytes
from tests.foreign.environments import SCRIPTS, run_in
from tests.pipelines.served import DECODING, serve

pytestmark = pytest.mark.readers


def test_the_client_reads_answers_streams_and_errors(tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(image_bytes("png", 40, 30, seed=1))
    with serve(tmp_path, ServeLimits()) as served:
        address = f"http://127.0.0.1:{served.port}"
        found = json.loads(run_in("openai", SCRIPTS / "openai_ask.py", address, photo))
        question = Question.of("What is it?", photo.read_bytes())
        said = served.assistant.answer([question], DECODING)[0]
    assert found["whole"] == found["stream"] == said
    assert (found["reason"], found["tokens"]) == ("length", 12)
    one, two = found["usage"]
    assert one["completion_tokens"] == two["completion_tokens"] == 12
    assert one["prompt_tokens"] == two["prompt_tokens"]
    assert found["errors"] == {
        "model": ["NotFoundError", "model_not_found"],
        "length": ["BadRequestError", "context_length_exceeded"],
        "fetched": ["BadRequestError", "invalid_image_url"],
    }
