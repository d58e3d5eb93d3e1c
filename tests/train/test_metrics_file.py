"""metrics.jsonl: its bytes are a format that other scripts read; older runs stay readable."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from lapilli.train.errors import TrainError
from lapilli.train.run_folder.metrics_file import MetricsFile, StepMetrics, read_metrics, read_new

# Every key that a run can write, in the order it does.
WHOLE = (
    '{"step": 7, "loss": 6.25, "lr": 0.001, "grad_norm": 1.5, "grad_norm_by_part": '
    '{"projector": 0.9, "language": 1.2}, "samples": 8, "trained_tokens": 40, "batch": "0a1b", '
    '"loss_scale": 256.0, "overflows": 0, "aux_losses": {"gen.12.smooth_l1": 0.5}, '
    '"held_out_loss": 6.5, "held_out_aux_losses": {"gen.12.smooth_l1": 0.25}, '
    '"held_out_seconds": 0.25, "generated_seconds": 0.125, "seconds": 0.5, "wait_seconds": 0.0625, '
    '"memory_bytes": 1024, "tokens": 60, "rows": 6, "images": 4, "tokens_per_second": 120.0, '
    '"flops": 1000, "mfu": 0.5, "hardware_flops": 1500, "hfu": 0.75, '
    '"loss_by_source": {"made_up": [6.25, 40]}, '
    '"loss_by_modality": {"image": [6.0, 30], "text": [7.0, 10]}}\n'
)
# As small as a step of fp32 on a device of unknown peak rate is, where the loss is not told apart.
SMALL = (
    '{"step": 8, "loss": NaN, "lr": 0.001, "grad_norm": Infinity, "grad_norm_by_part": {}, '
    '"samples": 8, "trained_tokens": 40, "batch": "0a1b", "seconds": 0.5, "wait_seconds": 0.0, '
    '"memory_bytes": 0, "tokens": 60, "tokens_per_second": 120.0, "flops": 1000, "mfu": null, '
    '"hardware_flops": 1500, "hfu": null, "loss_by_source": {}, "loss_by_modality": {}}\n'
)
# Of an older version, and with a key of a later one.
OLD = (
    '{"step": 9, "loss": 6.0,  "samples": 8, "trained_tokens": 40, "seconds": 1, '
    '"wait_seconds": 0.0, "a later key": [1]}\n'
)


def test_a_row_is_written_byte_for_byte_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(WHOLE + SMALL)
    rows = read_metrics(tmp_path)
    assert json.loads(WHOLE).keys() == {one.name for one in fields(StepMetrics)}
    again = tmp_path / "again"
    again.mkdir()
    file = MetricsFile(again, 0)
    for row in rows:
        file.write(row)
    file.close()
    assert (again / "metrics.jsonl").read_text() == WHOLE + SMALL


def test_a_row_of_another_version_is_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(OLD)
    (row,) = read_metrics(tmp_path)
    assert (row.step, row.loss, row.seconds) == (9, 6.0, 1)
    assert row.lr is row.mfu is row.held_out_loss is None
    assert row.loss_by_source == row.grad_norm_by_part == {}


def test_a_resumed_run_keeps_the_bytes_of_the_steps_before(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(WHOLE + SMALL + OLD + '{"step": 10, "lo')
    MetricsFile(tmp_path, 10).close()
    assert path.read_text() == WHOLE + SMALL + OLD
    MetricsFile(tmp_path, 8).close()
    assert path.read_text() == WHOLE


def test_new_rows_are_those_behind_a_position(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_new(tmp_path, 0) == ([], 0)
    path.write_text(WHOLE)
    rows, position = read_new(tmp_path, 0)
    assert ([row.step for row in rows], position) == ([7], len(WHOLE))
    path.write_text(WHOLE + SMALL + OLD[:20])
    rows, position = read_new(tmp_path, position)
    assert ([row.step for row in rows], position) == ([8], len(WHOLE + SMALL))
    path.write_text(OLD)  # shorter: a resumed run
    assert [row.step for row in read_new(tmp_path, position)[0]] == [9]


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ('"loss": 6.0', '"loss": "6"', "loss: '6'; expected a number"),
        ('"seconds": 1,', '"seconds": 0,', "seconds: 0; expected more than 0"),
        ('"samples": 8, ', "", "samples: missing"),
        ('"later": [1]', '"tokens": -1', "tokens: -1; expected 0 or more"),
    ],
)
def test_a_row_that_no_run_wrote_is_one_line(
    tmp_path: Path, old: str, new: str, wrong: str
) -> None:
    text = OLD.replace("a later key", "later")
    assert old in text
    (tmp_path / "metrics.jsonl").write_text(WHOLE + text.replace(old, new))
    with pytest.raises(TrainError, match=f"metrics.jsonl: damaged, line 2: {wrong}; bring it"):
        read_metrics(tmp_path)
