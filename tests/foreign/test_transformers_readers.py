"""Exports of trained models read by several versions of transformers: ids, logits, greedy text.

The table that it writes is kept in `README.md` beside this file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lapilli.data.images.view import prepare
from lapilli.model.config import Decoding
from lapilli.train.inference.assistant import Assistant, Question, open_assistant
from tests.factories import image_bytes
from tests.foreign.environments import ROOT, SCRIPTS, run_in
from tests.pipelines.test_export_runs import DECODER, LORA, Runs

pytestmark = [pytest.mark.readers, pytest.mark.timeout(900)]

VERSIONS = ("4.49", "4.57", "5.0")
NEW = 8
QUESTIONS = (
    ("square", "What colour is the cat?"),
    ("square", "What?"),
    ("other", "Which of the two is larger, the left one or the right one? Say why."),
    (None, "No picture: 1 + 1?"),
)
TABLE = ROOT / "outputs" / "transformers_readers.md"


@dataclass(frozen=True)
class Answered:
    """What a run says itself."""

    ids: list[list[int]]
    logits: list[torch.Tensor]
    texts: list[str]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of the view's size: no version's resizing takes part."""
    folder = tmp_path_factory.mktemp("photos")
    paths = {name: folder / f"{name}.png" for name in ("square", "other")}
    for seed, path in enumerate(paths.values()):
        path.write_bytes(image_bytes("png", 32, 32, seed=seed))
    return paths


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """By form a run, trained so that its weights are no longer those it began with; its export."""
    runs = Runs(tmp_path_factory.mktemp("readers"))
    grown = json.dumps({"settings": DECODER, "vocab_size": 530})[1:-1]
    rope = json.dumps({**DECODER, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    trained = {
        "whole": runs.train("whole", language=f"settings: {rope}"),
        "LoRA, merged": runs.train("lora", lora=LORA),
        "grown vocabulary": runs.train("grown", language=grown),
        "trained tower": runs.train(
            "tower", flags=("--model.trainable=[vision,projector,language]",)
        ),
    }
    return {name: (run, runs.export(run, "hf")) for name, run in trained.items()}


def ask_ourselves(asked: Assistant, photos: dict[str, Path]) -> Answered:
    questions = [
        Question.of(text, *([photos[name].read_bytes()] if name else []))
        for name, text in QUESTIONS
    ]
    ids, logits = zip(*(_logits(asked, question) for question in questions), strict=True)
    texts = [asked.answer([question], Decoding(NEW))[0] for question in questions]
    return Answered([*ids], [*logits], texts)


def _logits(asked: Assistant, question: Question) -> tuple[list[int], torch.Tensor]:
    prompt = asked.prompt(question.turns)
    ids = np.repeat(prompt, np.where(prompt < 0, asked.model.vision.num_tokens, 1))
    index = np.where(ids < 0, np.cumsum(ids < 0) - 1, -1).astype(np.int32)[None]
    size = asked.spec.size
    pixels = np.zeros((len(question.images), size, size, 3), np.uint8)
    for number, data in enumerate(question.images):
        pixels[number] = prepare(data, asked.spec)
    with torch.inference_mode():
        embedded = asked.model.embed(
            torch.from_numpy(np.where(ids < 0, 0, ids))[None],
            torch.from_numpy(index),
            torch.from_numpy(pixels),
        )
        return ids.tolist(), asked.model.language(inputs_embeds=embedded).logits[0, -1]


@pytest.fixture(scope="module")
def ours(forms: dict[str, tuple[Path, Path]], photos: dict[str, Path]) -> dict[str, Answered]:
    return {name: ask_ourselves(open_assistant(run), photos) for name, (run, _) in forms.items()}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_reads_every_form_as_the_run_answers(
    version: str,
    forms: dict[str, tuple[Path, Path]],
    ours: dict[str, Answered],
    photos: dict[str, Path],
    tmp_path: Path,
) -> None:
    questions = [[str(photos[name]) if name else None, text] for name, text in QUESTIONS]
    folders = {name: str(export) for name, (_, export) in forms.items()}
    asked, answered = tmp_path / "asked.json", tmp_path / "answered.json"
    asked.write_text(json.dumps({"folders": folders, "questions": questions, "new": NEW}))
    run_in(f"transformers-{version}", SCRIPTS / "transformers_read.py", asked, answered)
    result: dict[str, Any] = json.loads(answered.read_text())
    assert result["version"].startswith(version)
    rows: list[str] = []
    for name, said in result["found"].items():
        expected = ours[name]
        image = json.loads((Path(folders[name]) / "config.json").read_text())["image_token_index"]
        assert said["ids"] == [[image if i < 0 else i for i in ids] for ids in expected.ids], name
        worst = 0.0
        for found, logits in zip(said["logits"], expected.logits, strict=True):
            theirs = torch.tensor(found)[: len(logits)]
            torch.testing.assert_close(theirs, logits, rtol=1e-4, atol=1e-4)
            worst = max(worst, float((theirs - logits).abs().max()))
        assert said["alone"] == expected.texts, name
        assert said["batch"] == expected.texts, name
        with_image = [t for t, (p, _) in zip(expected.texts, QUESTIONS, strict=True) if p]
        assert said["chat"] == (None if version == "4.49" else with_image), name
        rows.append(f"| {result['version']} | {name} | equal | {worst:.0e} | equal | equal |")
    TABLE.parent.mkdir(exist_ok=True)
    head = "| transformers | form | ids | logits, at most | alone | in a batch |\n|" + "---|" * 6
    old = TABLE.read_text().splitlines()[2:] if TABLE.exists() else []
    kept = [row for row in old if not row.startswith(f"| {result['version']} ")]
    TABLE.write_text("\n".join([head, *sorted([*kept, *rows])]) + "\n")
