"""What restarts cost: from the files of a run that was killed, in `show` and in the report."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from lapilli.data.io.atomic import write_json
from lapilli.train.driver.launching import launch
from lapilli.train.driver.preflight import preflight
from lapilli.train.run_folder.metrics_file import MetricsFile, read_metrics
from lapilli.train.run_folder.names import METRICS, NOTES, RUN_INFO
from lapilli.train.run_folder.restarts import Start, read_starts, record_start
from lapilli.train.run_folder.settings import RunInfo, write_run_info
from pipelines.reports.describe import describe_run
from pipelines.reports.run_report import time_parts
from tests.train.gang import train_together
from tests.train.small_run import made_step, small_dataset, small_run


def rows(run: Path, count: int) -> None:
    metrics = MetricsFile(run, 0)
    for step in range(count):
        metrics.write(made_step(step, seconds=2.0))
    metrics.close()


def changed(path: Path, ago: float) -> None:
    then = time.time() - ago
    os.utime(path, (then, then))


def test_a_first_start_is_counted_from_the_command(tmp_path: Path) -> None:
    write_json(tmp_path / RUN_INFO, {})
    changed(tmp_path / RUN_INFO, 30)
    start = record_start(tmp_path, 0, 4)
    assert (start.step, start.workers, start.reason, start.repeated) == (0, 4, "command", 0)
    assert start.seconds == pytest.approx(30, abs=5)


def test_lost_workers_are_counted_from_their_last_sign(tmp_path: Path) -> None:
    write_json(tmp_path / RUN_INFO, {})
    rows(tmp_path, 7)
    changed(tmp_path / RUN_INFO, 1000)
    changed(tmp_path / METRICS, 60)
    start = record_start(tmp_path, 4, 2)
    assert (start.step, start.reason, start.repeated, start.repeated_seconds) == (
        4,
        "restart",
        3,
        6.0,
    )
    assert start.seconds == pytest.approx(60, abs=5)


def test_a_command_that_comes_later_is_not_blamed_for_the_night(tmp_path: Path) -> None:
    write_json(tmp_path / RUN_INFO, {})
    rows(tmp_path, 7)
    changed(tmp_path / METRICS, 30_000)
    changed(tmp_path / RUN_INFO, 20)
    start = record_start(tmp_path, 4, 2)
    assert (start.reason, start.repeated) == ("command", 3)
    assert start.seconds == pytest.approx(20, abs=5)


def test_a_kill_leaves_all_starts_or_the_one_before(tmp_path: Path) -> None:
    """The file is replaced; what a kill leaves of the next one is passed over."""
    first = record_start(tmp_path, 0, 1)
    (tmp_path / "starts.tmp").write_text('{"step": 3, "wor', encoding="utf-8")
    assert read_starts(tmp_path) == [first]
    second = record_start(tmp_path, 3, 2)
    assert read_starts(tmp_path) == [first, second]
    assert read_starts(tmp_path / "nowhere") == []


def test_workers_lost_before_their_first_step_are_counted_once_each(tmp_path: Path) -> None:
    write_json(tmp_path / RUN_INFO, {})
    changed(tmp_path / RUN_INFO, 90)
    first = record_start(tmp_path, 0, 2)
    MetricsFile(tmp_path, 0).close()  # what a worker does next
    changed(tmp_path / METRICS, 40)
    second = record_start(tmp_path, 0, 1)
    assert (first.reason, second.reason, second.workers) == ("command", "restart", 1)
    assert first.seconds == pytest.approx(90, abs=5)
    assert second.seconds == pytest.approx(40, abs=5)


def test_the_parts_of_the_time_are_those_of_steps_and_starts() -> None:
    steps = [
        made_step(0, seconds=3.0, wait_seconds=1.0, held_out_seconds=0.5),
        made_step(1, seconds=2.0, wait_seconds=0.0, generated_seconds=0.25),
    ]
    starts = [Start(0, 2, "command", 7.0, 0, 0.0), Start(1, 1, "restart", 9.0, 2, 4.0)]
    assert time_parts(steps, starts) == {
        "computing": 4.0,
        "waiting for data": 1.0,
        "held-out loss": 0.5,
        "held-out answers": 0.25,
        "starting workers": 16.0,
        "steps repeated": 4.0,
    }


@pytest.mark.faults
def test_a_killed_worker_is_in_the_runs_own_account(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path)
    config = small_run(dataset, tmp_path / "run", max_steps=9)
    write_json(tmp_path / "run" / "config.json", asdict(config))
    info = RunInfo(total_steps=9, samples=36, too_long=0, parameters={}, image_tokens=4)
    write_run_info(tmp_path / "run", info)
    train_together(config, kill_at=6)
    seen = read_metrics(tmp_path / "run")
    assert train_together(config) == [0, 0]
    first, second = read_starts(tmp_path / "run")
    assert (first.step, first.reason, first.repeated) == (0, "command", 0)
    assert (second.step, second.reason, second.repeated) == (4, "restart", len(seen) - 4)
    assert second.repeated_seconds == pytest.approx(sum(row.seconds for row in seen[4:]))
    assert second.seconds > 0
    assert "the workers were started again; the run resumes from step 4 with 2" in (
        tmp_path / "run" / NOTES
    ).read_text(encoding="utf-8")
    shown = describe_run(tmp_path / "run").facts["starts"]
    assert shown[0] == "2, 1 of them by Ray"
    assert shown[2].startswith(f"{counted(second.repeated)} repeated")


def counted(steps: int) -> str:
    return "1 step" if steps == 1 else f"{steps} steps"


def test_a_run_that_was_never_restarted_says_nothing(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path, images=8, text_only=0)
    config = small_run(
        dataset,
        tmp_path / "run",
        num_workers=1,
        launcher="process",
        micro_batch_size=4,
        max_steps=2,
    )
    launch(preflight(config))
    (start,) = read_starts(tmp_path / "run")
    assert (start.step, start.reason) == (0, "command")
    assert start.seconds > 0
    assert "starts" not in describe_run(tmp_path / "run").facts
