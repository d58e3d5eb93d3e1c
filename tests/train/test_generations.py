"""Held-out questions answered while a run trains: the answers of that step's weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lapilli.data.dataset.dataset import open_dataset
from lapilli.data.text.encode import load_tokenizer
from lapilli.model.generate import generate_greedy
from lapilli.train.config import CheckpointConfig, RunConfig, ValidationConfig
from lapilli.train.driver.launching import launch
from lapilli.train.driver.preflight import preflight
from lapilli.train.inference.evaluate import load_trained
from lapilli.train.run_folder.generations import (
    Generation,
    forget_generations,
    read_generations,
    write_generations,
)
from lapilli.train.run_folder.metrics_file import read_metrics
from pipelines.reports.run_report import write_run_report
from tests.browser import Chromium
from tests.factories import build_dataset, make_mixture, make_tokenizer
from tests.train.gang import train_together
from tests.train.small_run import VIEW, small_dataset, small_run

LONGEST = 9  # tokens; some answers end sooner


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("generations"), images=16, text_only=8)


def asking(
    dataset: Path, output: Path, *, every: int = 0, answers_every: int = 3, **values: Any
) -> RunConfig:
    """Asks five samples after steps 3 and 6, whose weights it keeps."""
    settings = {
        "validation": ValidationConfig(
            every, dataset=str(dataset), answers_every=answers_every, answers=5,
            answer_tokens=LONGEST,
        ),
        "checkpoint": CheckpointConfig(every=4, archive_every=3), "max_steps": 6, **values,
    }  # fmt: skip
    return small_run(dataset, output, **settings)


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of one process."""
    output = tmp_path_factory.mktemp("finished") / "run"
    config = asking(dataset, output, num_workers=1, launcher="process")
    launch(preflight(config))
    return config


def answered(run: Path, step: int, dataset: Path) -> list[tuple[str, str]]:
    """Sample and answer, one at a time, by the weights that were kept after so many steps."""
    model = load_trained(run / "milestones" / f"step-{step:08d}").model
    opened = open_dataset(dataset, view=VIEW, image_tokens=model.vision.num_tokens)
    tokenizer: Any = load_tokenizer(opened.path / "tokenizer")
    found: list[tuple[str, str]] = []
    for index in np.linspace(0, len(opened) - 1, 5).astype(int):
        sample = opened.sample(int(index))
        start, end = sample.label_spans[0]
        prompt = sample.input_ids[:start].astype(np.int64)
        pixels = sample.pixels[: int((prompt < 0).sum())]
        ids = generate_greedy(
            model,
            [prompt],
            [pixels],
            end_id=int(sample.input_ids[end - 1]),
            max_new_tokens=LONGEST,
        )[0]
        found.append((sample.sample_id, tokenizer.decode(ids, skip_special_tokens=True).strip()))
    return found


def given(found: list[Generation], step: int) -> list[tuple[str, str]]:
    return [(one.sample_id, one.given) for one in found if one.step == step - 1]


def test_they_are_the_answers_of_the_weights_of_their_step(
    finished: RunConfig, dataset: Path
) -> None:
    run = Path(finished.output)
    found = read_generations(run)
    assert {one.step for one in found} == {2, 5}
    for step in (3, 6):
        assert given(found, step) == answered(run, step, dataset)
    assert given(found, 3) != given(found, 6), "it has learnt nothing that would show"
    assert all(one.expected.startswith("The ") and one.question for one in found)
    for row in read_metrics(run):
        assert (row.generated_seconds is not None) == (row.step in (2, 5))


def test_losses_do_not_depend_on_them(finished: RunConfig, dataset: Path, tmp_path: Path) -> None:
    quiet = small_run(dataset, tmp_path / "run", num_workers=1, launcher="process", max_steps=6)
    launch(preflight(quiet))
    losses = [[row.loss for row in read_metrics(Path(c.output))] for c in (finished, quiet)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_that_share_the_weights_answer_together(
    workers: int, dataset: Path, tmp_path: Path
) -> None:
    """ZeRO-3 with every parameter cut: each forward needs all ranks, also the steps after it."""
    values: dict[str, Any] = {"num_workers": workers, "zero_stage": 3, "every": 3}
    config = asking(dataset, tmp_path / "run", **values)
    quiet = asking(dataset, tmp_path / "quiet", **values, answers_every=0)
    for one in (config, quiet):
        assert train_together(one, cuts_all=True) == [0] * workers
    found = read_generations(tmp_path / "run")
    for step in (3, 6):
        assert given(found, step) == answered(tmp_path / "run", step, dataset)
    rows = [read_metrics(Path(one.output)) for one in (config, quiet)]
    losses = [[(row.loss, row.held_out_loss) for row in of_run] for of_run in rows]
    assert losses[0] == losses[1]


def test_whatever_a_model_says_is_read_back(tmp_path: Path) -> None:
    """Line separators that JSON need not escape, an emoji, half of one."""
    said = [Generation("a/1", "q\u2028\x85?", "\n", "\ud83d \U0001f600\x0b", 4, 0)]
    write_generations(tmp_path, said)
    assert read_generations(tmp_path) == said
    forget_generations(tmp_path, 4)
    assert read_generations(tmp_path) == []


@pytest.mark.faults
def test_a_restart_repeats_what_it_repeats_and_no_more(dataset: Path, tmp_path: Path) -> None:
    config = asking(dataset, tmp_path / "run", num_workers=2, answers_every=1)
    train_together(config, kill_at=4)  # after the checkpoint of step 4
    assert train_together(config) == [0, 0]
    found = read_generations(tmp_path / "run")
    assert Counter(one.step for one in found) == dict.fromkeys(range(6), 5)
    assert given(found, 6) == answered(tmp_path / "run", 6, dataset)


def test_a_template_that_trains_all_is_asked_its_questions(tmp_path: Path) -> None:
    mixture = make_mixture(tmp_path / "raw", images=0, text_only=8)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    with pytest.warns(UserWarning, match="its end marker .* is 10 tokens"):
        build_dataset(mixture, tmp_path / "all", tokenizer, template="phi_hf")
    config = asking(
        tmp_path / "all", tmp_path / "run", num_workers=1, launcher="process", max_steps=3
    )
    launch(preflight(config))
    found = read_generations(tmp_path / "run")
    assert len(found) == 5
    for one in found:
        assert one.question.startswith("What colour is the ")
        assert one.question.endswith("?")
        assert one.expected.startswith("The ")
        assert one.expected.endswith(".")


def test_the_report_shows_them(finished: RunConfig, chromium: Chromium) -> None:
    page = write_run_report(Path(finished.output))
    assert chromium.problems(page) == []
    text = page.read_text(encoding="utf-8")
    for one in read_generations(Path(finished.output)):
        assert one.sample_id in text
    for words in ("Answers to held-out questions", "step 3", "step 6", "held-out answers"):
        assert words in text
