"""A step's numbers are read while the next one runs: nothing is lost, and nothing bad is saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lapilli.train.checkpoint.find import latest_checkpoint
from lapilli.train.config import CheckpointConfig
from lapilli.train.driver.workers import join_alone
from lapilli.train.errors import TrainError
from lapilli.train.health.step_dump import read_kept
from lapilli.train.run_folder.metrics_file import read_metrics
from lapilli.train.run_folder.names import STOP
from lapilli.train.worker import loop
from lapilli.train.worker.setup import Setup, setup
from tests.train.small_run import small_dataset, small_run

MICROS = 4  # of a step
BAD = float("nan")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("late"))


def prepared(dataset: Path, run: Path, **values: Any) -> Setup:
    """A worker alone, of a run without a driver; checkpoints are due after steps 3, 7, 11."""
    config = small_run(dataset, run, num_workers=1, launcher="process", **values)
    run.mkdir()
    join_alone("cpu")
    return setup(config, "cpu", rank=0, world_size=1)


def at_step(ready: Setup, step: int, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change what the decoder gives in the first micro-batch of a step."""
    calls = 0

    def hook(module: Any, given: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step * MICROS + 1:
            output.last_hidden_state = change(output.last_hidden_state)
        return output

    ready.engine.module.language.get_decoder().register_forward_hook(hook)


@pytest.mark.parametrize("step", [2, 3, 4])  # before a checkpoint is due, at it, after it
def test_no_checkpoint_holds_a_bad_step_and_the_bad_step_is_kept(
    step: int, dataset: Path, tmp_path: Path
) -> None:
    ready = prepared(dataset, tmp_path / "run")
    at_step(ready, step, lambda hidden: hidden * BAD)
    with pytest.raises(TrainError, match=f"^step {step + 1}: loss nan"):
        loop.fit(ready)
    assert [row.step for row in read_metrics(tmp_path / "run")] == list(range(step))
    newest = latest_checkpoint(tmp_path / "run")
    assert (newest.step if newest else 0) == (step // 4) * 4
    kept = read_kept(tmp_path / "run" / "replay" / f"step-{step + 1:08d}")
    expected = ready.feed.make(step)
    assert kept.sample_indices == expected.sample_indices.tolist()
    assert kept.sample_ids == [[list(batch.sample_ids) for batch in expected.batches]]


@pytest.mark.parametrize("step", [1, 5])
def test_an_error_in_a_step_loses_no_row_of_those_before(
    step: int, dataset: Path, tmp_path: Path
) -> None:
    ready = prepared(dataset, tmp_path / "run")

    def fail(hidden: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("planted")

    at_step(ready, step, fail)
    with pytest.raises(ArithmeticError, match="planted"):
        loop.fit(ready)
    assert [row.step for row in read_metrics(tmp_path / "run")] == list(range(step))


@pytest.mark.parametrize("step", [1, 3])
def test_a_stop_is_obeyed_a_step_later_and_everything_is_saved(
    step: int, dataset: Path, tmp_path: Path
) -> None:
    ready = prepared(dataset, tmp_path / "run")

    def ask(hidden: torch.Tensor) -> torch.Tensor:
        (tmp_path / "run" / STOP).touch()
        return hidden

    at_step(ready, step, ask)  # seen by the step after it
    loop.fit(ready)
    rows = read_metrics(tmp_path / "run")
    assert [row.step for row in rows] == list(range(step + 3))
    newest = latest_checkpoint(tmp_path / "run")
    assert newest
    assert newest.step == len(rows)


def test_rows_wait_for_the_next_step_and_for_nothing_where_a_checkpoint_is_due(
    dataset: Path, tmp_path: Path
) -> None:
    ready = prepared(dataset, tmp_path / "run", max_steps=6, checkpoint=CheckpointConfig(every=3))
    written: list[int] = []
    ready.engine.module.register_forward_pre_hook(
        lambda *_: written.append(len(read_metrics(tmp_path / "run")))
    )
    loop.fit(ready)
    assert written[::MICROS] == [0, 0, 1, 3, 3, 4]  # as each step begins
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 6
    assert all(0 <= row.wait_seconds < row.seconds for row in rows)
