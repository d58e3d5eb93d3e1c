"""More epochs for a run that has ended: the order and the moments go on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lapilli.train.checkpoint.find import find_checkpoints, latest_checkpoint
from lapilli.train.config import CheckpointConfig, OptimConfig, RunConfig
from lapilli.train.driver.launching import launch
from lapilli.train.driver.preflight import finished_steps, preflight
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.metrics_file import read_metrics
from lapilli.train.steps.optim import learning_rate
from tests.train.saved import saved_tensors
from tests.train.small_run import small_dataset, small_run

CONSTANT = OptimConfig(lr=0.01, schedule="constant", warmup_ratio=0.0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("length"), images=10, text_only=6)


@pytest.fixture(scope="module")
def two_epochs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Uninterrupted."""
    config = one_worker(dataset, tmp_path_factory.mktemp("two") / "run", epochs=2)
    launch(preflight(config))
    return config


def one_worker(dataset: Path, output: Path, **values: object) -> RunConfig:
    settings = {"optim": CONSTANT, "checkpoint": CheckpointConfig(every=100), **values}
    return small_run(
        dataset, output, num_workers=1, micro_batch_size=4, launcher="process", **settings
    )


def rows(config: RunConfig) -> list[tuple[int, float, float | None, str | None]]:
    found = read_metrics(Path(config.output))
    return [(row.step, row.loss, row.lr, row.batch) for row in found]


def state(config: RunConfig) -> dict[str, list[float]]:
    found = latest_checkpoint(Path(config.output))
    assert found is not None
    return {key: v.flatten().tolist() for key, v in saved_tensors(found.path).items()}


@pytest.mark.parametrize("first", [{"epochs": 1}, {"epochs": 2, "max_steps": 1}])
def test_a_run_that_is_made_longer_ends_as_if_it_had_been_begun_so(
    first: dict[str, int], two_epochs: RunConfig, dataset: Path, tmp_path: Path
) -> None:
    short = one_worker(dataset, tmp_path / "run", **first)
    launch(preflight(short))
    done = len(rows(short))
    assert finished_steps(short) == done
    longer = replace(short, epochs=2, max_steps=0)
    assert finished_steps(longer) is None
    told: list[str] = []
    ready = preflight(longer, told.append)
    total = ready.total_steps
    assert (ready.start, total) == (done, len(rows(two_epochs)))
    key = "max_steps" if "max_steps" in first else "epochs"
    assert told == [
        f"{key}: {first[key]} before, now {getattr(longer, key)}: the {done} steps that are taken "
        f"keep their learning rates, and the optimizer its moments; steps {done} to {total - 1} "
        f"follow the constant schedule of a run of {total} steps"
    ]
    launch(ready)
    assert rows(longer) == rows(two_epochs)  # losses bit for bit, and the order
    assert state(longer) == state(two_epochs)
    assert finished_steps(longer) == total
    steps = [found.step for found in find_checkpoints(Path(longer.output))]
    assert steps == [done, total]
    kept = json.loads((Path(longer.output) / "config.json").read_text())
    assert (kept["epochs"], kept["max_steps"]) == (2, 0)


def test_the_steps_that_are_left_follow_the_schedule_of_the_whole(
    dataset: Path, tmp_path: Path
) -> None:
    cosine = OptimConfig(lr=0.01)
    short = one_worker(dataset, tmp_path / "run", epochs=1, optim=cosine)
    launch(preflight(short))
    before = rows(short)
    longer = replace(short, epochs=3)
    launch(preflight(longer))
    found = rows(longer)
    assert found[: len(before)] == before
    assert len(found) == 3 * len(before)
    rates = [learning_rate(cosine, step, len(found)) for step in range(len(found))]
    assert [rate for _, _, rate, _ in found[len(before) :]] == rates[len(before) :]
    last = before[-1][2]
    assert last is not None
    assert rates[len(before)] > last  # it rises again


def test_it_cannot_become_shorter_than_it_is(two_epochs: RunConfig) -> None:
    run = Path(two_epochs.output)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = len(rows(two_epochs))
    for key, value, steps in (("epochs", 1, done // 2), ("max_steps", done - 1, done - 1)):
        shorter = replace(two_epochs, **{key: value})
        with pytest.raises(
            TrainError, match=rf"^{key}: {value} makes {steps} steps, {run} has taken {done}; raise"
        ):
            preflight(shorter)
    just = replace(two_epochs, max_steps=done)
    told: list[str] = []
    assert preflight(just, told.append).is_done
    assert "none is left" in told[0]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_what_else_decides_the_loss_stays(two_epochs: RunConfig) -> None:
    changed = replace(two_epochs, epochs=3, seed=7)
    with pytest.raises(TrainError, match=r"^seed: .* was started with 42, now 7"):
        preflight(changed)
