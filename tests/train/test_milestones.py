"""Milestones: the weights of some steps, kept for ever, and no point to go on from."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lapilli.model.parts.trainable import trainable_parameters
from lapilli.train.checkpoint.find import find_checkpoints
from lapilli.train.config import CheckpointConfig, RunConfig
from lapilli.train.driver.launching import launch
from lapilli.train.driver.preflight import preflight
from lapilli.train.errors import TrainError
from lapilli.train.inference.assistant import open_assistant
from lapilli.train.inference.evaluate import load_trained
from lapilli.train.run_folder.names import WEIGHTS
from lapilli.train.worker.compatibility import build_start
from pipelines.reports.describe import describe_run
from tests.train.earlier_run import write_earlier
from tests.train.saved import parts, saved_weights
from tests.train.small_run import small_dataset, small_run


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("milestones"), images=16, text_only=8)


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Six steps: checkpoints at 4 and 6, milestones at 2, 4 and 6."""
    config = alone(
        dataset,
        tmp_path_factory.mktemp("finished") / "run",
        checkpoint=CheckpointConfig(every=4, keep_last=1, archive_every=2),
    )
    launch(preflight(config))
    return config


def alone(dataset: Path, output: Path, **values: Any) -> RunConfig:
    return small_run(dataset, output, num_workers=1, launcher="process", **values)


def milestone(config: RunConfig, step: int) -> Path:
    return Path(config.output) / "milestones" / f"step-{step:08d}"


def test_milestones_are_the_weights_of_their_steps_and_are_not_pruned(
    finished: RunConfig, dataset: Path, tmp_path: Path
) -> None:
    assert [c.step for c in find_checkpoints(Path(finished.output))] == [6]
    shown = describe_run(Path(finished.output)).facts["milestones"]
    assert shown[:2] == ("3 milestones", "step 2 to 6")
    found = sorted(path.name for path in (Path(finished.output) / "milestones").iterdir())
    assert found == ["step-00000002", "step-00000004", "step-00000006"]
    whole = alone(dataset, tmp_path / "run", checkpoint=CheckpointConfig(every=1, keep_last=10))
    launch(preflight(whole))
    for step in (2, 4, 6):
        assert not parts(milestone(finished, step))
        weights = load_file(milestone(finished, step) / WEIGHTS)
        expected = saved_weights(Path(whole.output) / "checkpoints" / f"step-{step:08d}")
        assert weights.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(weights[name], value), name


def test_a_milestone_is_loaded_by_its_folder_wherever_it_is_copied(
    finished: RunConfig, tmp_path: Path
) -> None:
    copied = shutil.copytree(milestone(finished, 4), tmp_path / "kept")
    expected = load_file(copied / WEIGHTS)
    trained = load_trained(copied)
    assert trained.step == 4
    started, _ = build_start(replace(finished, init_from=str(copied)))
    for model in (trained.model, open_assistant(copied).model, started):
        found = trainable_parameters(model)
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_no_run_goes_on_from_a_milestone_and_it_says_why(
    finished: RunConfig, tmp_path: Path
) -> None:
    with pytest.raises(TrainError, match="a milestone has no optimizer moments to go on from"):
        preflight(replace(finished, output=str(milestone(finished, 4))))
    run = shutil.copytree(finished.output, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(milestone(finished, 4), run / "checkpoints" / "step-00000004")
    ready = preflight(replace(finished, output=str(run)))
    assert ready.start == 0
    told: list[str] = []
    launch(ready, on_note=told.append)
    assert any(
        "checkpoints/step-00000004: has no optimizer moments; passed over" in s for s in told
    )
    assert any("a milestone has weights and no optimizer moments; init_from" in s for s in told)
    assert [c.step for c in find_checkpoints(run)] == [6]


def test_milestones_count_in_the_room_a_run_needs(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(TrainError, match=r"and 3 milestones need .*checkpoint\.archive_every"):
        preflight(alone(dataset, tmp_path / "run", checkpoint=CheckpointConfig(archive_every=2)))


def test_a_checkpoint_of_the_layout_before_is_not_resumed_and_the_line_says_how_to_go_on(
    finished: RunConfig, tmp_path: Path
) -> None:
    run = shutil.copytree(finished.output, tmp_path / "run")
    newest = run / "checkpoints" / "step-00000006"
    write_earlier(newest, saved_weights(newest))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(
        TrainError, match=rf"layout 1, this version resumes from layout 2; --init_from={run} starts"
    ):
        preflight(replace(finished, output=str(run)))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    started, _ = build_start(replace(finished, init_from=str(run)))
    found = trainable_parameters(started)
    expected = load_file(newest / WEIGHTS)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
