"""A disk that fills while a run goes on: one line with the path, and the run resumes with room."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lapilli.train.config import CheckpointConfig
from lapilli.train.driver.launching import launch
from lapilli.train.driver.preflight import preflight
from lapilli.train.run_folder.metrics_file import StepMetrics, read_metrics
from pipelines.cli.command import run
from tests.train.small_run import small_dataset, small_run


def test_a_disk_that_fills_is_one_line_and_the_run_goes_on_when_there_is_room(
    tmp_path: Path, tiny_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = small_dataset(tmp_path, images=8, text_only=4)
    config = small_run(  # long enough for the driver to see step 3 before the last is saved
        dataset,
        tiny_disk / "run",
        launcher="process",
        num_workers=1,
        max_steps=80,
        epochs=80,
        checkpoint=CheckpointConfig(every=2, keep_last=1),
    )
    whole = launch(preflight(replace(config, output=str(tmp_path / "whole"))))
    fill = tiny_disk / "fill"

    def fill_up(row: StepMetrics, total: int) -> None:
        del total
        if row.step == 3:
            fill.write_bytes(b"\0" * shutil.disk_usage(tiny_disk).free)

    def main() -> int:
        launch(preflight(config), fill_up)
        return 0

    with pytest.raises(SystemExit) as ended:
        run(main)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert str(tiny_disk / "run") in line
    assert "free space" in line
    assert "Traceback" not in error
    fill.unlink()
    assert launch(preflight(config))[-1].loss == whole[-1].loss
    rows = read_metrics(tiny_disk / "run")
    assert [row.loss for row in rows] == [row.loss for row in whole]
