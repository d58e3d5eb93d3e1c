"""What is done to a run from outside: its processes killed, resumed elsewhere; nothing is lost."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lapilli.train.checkpoint.find import latest_checkpoint
from lapilli.train.config import CheckpointConfig, RunConfig
from lapilli.train.metrics.batch_digest import lanes_text, sample_lanes
from lapilli.train.run_folder.metrics_file import read_metrics
from tests.train.disturbed import driver, ends, kill_at
from tests.train.gang import train_together
from tests.train.small_run import small_dataset, small_run

EPOCHS, STEPS = (
    9,
    63,
)  # 4 global batches with images and 3 without; the kills come well before the end


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """An uninterrupted run."""
    config = small_run(dataset, tmp_path_factory.mktemp("finished") / "run", epochs=EPOCHS)
    code, _, errors = ends(config)
    assert code == 0, errors
    return config


def column(config: RunConfig, name: str) -> list[Any]:
    rows = read_metrics(Path(config.output))
    assert [row.step for row in rows] == list(range(len(rows)))
    return [getattr(row, name) for row in rows]


def last_line(errors: str) -> str:
    """The line a user's mistake ends with, without any traceback before it."""
    assert "Traceback" not in errors, errors
    return errors.splitlines()[-1]


@pytest.mark.long
def test_the_raylet_is_killed_and_the_same_command_goes_on(
    finished: RunConfig, dataset: Path, tmp_path: Path
) -> None:
    config = small_run(
        dataset, tmp_path / "run", epochs=EPOCHS, checkpoint=CheckpointConfig(every=2)
    )
    with driver(config) as running:
        kill_at("raylet", config, 9, running)
        code, _, errors = running.end()
    assert code == 2, errors
    assert last_line(errors).startswith("error: Ray has died on this machine"), errors
    assert len(read_metrics(Path(config.output))) < STEPS
    code, said, errors = ends(config)
    assert code == 0, errors
    assert "resumes from step" in said
    assert column(config, "loss") == column(finished, "loss")
    assert column(config, "batch") == column(finished, "batch")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_killed_five_times_and_resumed_on_other_workers_and_another_stage(
    finished: RunConfig, dataset: Path, tmp_path: Path
) -> None:
    chance = random.Random(20)
    steps = [chance.randint(first, first + 4) for first in (2, 10, 18, 26, 34)]
    two = small_run(dataset, tmp_path / "run", epochs=EPOCHS, checkpoint=CheckpointConfig(every=2))
    with driver(two) as running:
        kill_at("worker", two, steps[0], running)  # Ray replaces it
        kill_at("raylet", two, steps[1], running)
        assert running.end()[0] == 2
    with driver(two) as running:
        kill_at("driver", two, steps[2], running)
        assert running.end()[0] == -9
    newest = latest_checkpoint(Path(two.output))  # written behind the steps: not the last one's
    assert newest is not None
    same = newest.step  # what comes later is one worker's
    one = replace(two, num_workers=1, zero_stage=3)
    with driver(one) as running:
        kill_at("worker", one, steps[3], running)
        kill_at("raylet", one, steps[4], running)
        assert running.end()[0] == 2
    four = replace(two, num_workers=4, zero_stage=3)
    code, _, errors = ends(four)
    assert code == 0, errors
    losses, expected = column(four, "loss"), column(finished, "loss")
    assert column(four, "batch") == column(finished, "batch"), steps
    assert losses[:same] == expected[:same], steps
    assert losses == pytest.approx(expected, abs=1e-4), steps


@pytest.mark.long
def test_two_one_and_four_workers_without_ray_take_the_same_batches_to_the_same_losses(
    dataset: Path, tmp_path: Path
) -> None:
    whole = small_run(dataset, tmp_path / "whole", checkpoint=CheckpointConfig(every=2))
    assert train_together(whole) == [0, 0]
    two = replace(whole, output=str(tmp_path / "run"))
    assert train_together(two, kill_at=random.Random(9).randint(2, 4)) == [-9, -9]
    assert train_together(replace(two, num_workers=1, zero_stage=3), kill_at=8) == [-9]
    four = replace(two, num_workers=4)
    assert train_together(four) == [0] * 4
    assert column(four, "batch") == column(whole, "batch")
    assert column(four, "loss") == pytest.approx(column(whole, "loss"), abs=1e-4)


def test_the_digest_of_a_batch_is_of_its_samples_alone() -> None:
    names = [f"made_up/{number}" for number in range(12)]
    whole = lanes_text(sample_lanes([names]))
    ranks = [sample_lanes([names[7:], []]), sample_lanes([names[2:7], names[:2]])]
    assert lanes_text([sum(lane) for lane in zip(*ranks, strict=True)]) == whole
    assert lanes_text(sample_lanes([names[1:]])) != whole
    assert lanes_text(sample_lanes([names, names[:1]])) != whole
    assert lanes_text(sample_lanes([[*names[1:], "made_up/12"]])) != whole
