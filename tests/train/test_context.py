"""Sequences beyond the language model's positions, before a run starts and while it is asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lapilli.data.dataset.dataset import Dataset, open_dataset
from lapilli.model.config import LanguageConfig
from lapilli.model.vlm import VisionLanguageModel, build_model
from lapilli.train.config import RunConfig, ValidationConfig
from lapilli.train.driver.preflight import preflight
from lapilli.train.errors import TrainError
from lapilli.train.validation.decoding import QuestionReader, ask
from tests.train.small_run import VIEW, small_dataset, small_run


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = small_dataset(tmp_path_factory.mktemp("context"), images=4, text_only=4)
    return open_dataset(path, view=VIEW, image_tokens=4)


def config(dataset: Dataset, output: Path, language: LanguageConfig, **values: Any) -> RunConfig:
    made = small_run(dataset.path, output, num_workers=1, launcher="process", **values)
    return replace(made, model=replace(made.model, language=language))


def learnt(positions: int) -> LanguageConfig:
    settings = {"n_embd": 24, "n_layer": 1, "n_head": 2, "n_positions": positions}
    return LanguageConfig("gpt2", settings={**settings, "vocab_size": 512})


@pytest.mark.parametrize("validates", [False, True])
def test_learnt_positions_end_a_run_before_it_starts(
    dataset: Dataset, tmp_path: Path, validates: bool
) -> None:
    validation = ValidationConfig(int(validates), dataset=str(dataset.path))
    longest = int(dataset.lengths.max())
    with pytest.raises(
        TrainError, match=rf"max_length: .* {longest} tokens.* 40 positions"
    ) as said:
        preflight(config(dataset, tmp_path / "run", learnt(40), validation=validation))
    assert "\n" not in str(said.value)
    assert "set max_length: 40" in str(said.value)
    assert not (tmp_path / "run").exists()
    enough = -(-longest // 32) * 32
    preflight(config(dataset, tmp_path / "run", learnt(enough), validation=validation))


def test_rotary_positions_are_a_note_with_both_numbers(dataset: Dataset, tmp_path: Path) -> None:
    settings = {**small_run(Path(), Path()).model.language.settings, "max_position_embeddings": 40}
    notes: list[str] = []
    preflight(config(dataset, tmp_path / "run", LanguageConfig(settings=settings)), notes.append)
    (said,) = [note for note in notes if "positions" in note]
    assert str(int(dataset.lengths.max())) in said
    assert "40 positions" in said


def test_samples_that_just_fit_are_answered(dataset: Dataset) -> None:
    """The longest question and the longest answer are of two samples and together too long."""
    longest = int(dataset.lengths.max())
    made = small_run(Path(), Path()).model
    model: VisionLanguageModel = build_model(replace(made, language=learnt(longest))).eval()
    reader = QuestionReader.of(dataset)
    samples = [dataset.sample(i) for i in range(len(dataset))]
    asked = [*map(reader.first, samples)]
    together = ask(model, samples, asked, reader, most_tokens=longest // 2)
    alone = [
        ask(model, [one], [question], reader, most_tokens=longest // 2)[0]
        for one, question in zip(samples, asked, strict=True)
    ]
    assert together == alone
    assert all(one.question.startswith("What colour is") for one in together)
