"""fp16 with a loss scale: overflows repeat the step, and a resumed run goes on with the scale."""

from __future__ import annotations

import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lapilli.train.checkpoint.find import latest_checkpoint
from lapilli.train.config import CheckpointConfig, OptimConfig, RunConfig
from lapilli.train.device import check_precision
from lapilli.train.driver.launching import launch
from lapilli.train.driver.preflight import preflight
from lapilli.train.engine import deepspeed_engine
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.messages import notes_from
from lapilli.train.run_folder.metrics_file import StepMetrics, read_metrics
from tests.train.gang import train_together
from tests.train.saved import saved_weights
from tests.train.small_run import small_dataset, small_run

Rows = list[StepMetrics]

computes = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_fp16_supported(), reason="this processor has no fp16"
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("fp16"))


def alone(dataset: Path, output: Path, **values: Any) -> RunConfig:
    settings: dict[str, Any] = {"precision": "fp16", "max_steps": 8, **values}
    return small_run(dataset, output, num_workers=1, launcher="process", **settings)


def rows_of(config: RunConfig) -> Rows:
    launch(preflight(config))
    return read_metrics(Path(config.output))


def told(rows: Rows) -> list[tuple[float | None, ...]]:
    return [(row.loss, row.grad_norm, row.loss_scale) for row in rows]


def scale_from(monkeypatch: pytest.MonkeyPatch, power: int, window: int = 1000) -> None:
    monkeypatch.setitem(deepspeed_engine.SCALING, "initial_scale_power", power)
    monkeypatch.setitem(deepspeed_engine.SCALING, "loss_scale_window", window)


@computes
@pytest.mark.parametrize(  # the others for their length
    "stage", [2, *(pytest.param(stage, marks=pytest.mark.faults) for stage in (1, 3))]
)
def test_an_overflow_repeats_the_step_and_loses_no_sample(
    stage: int, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale_from(monkeypatch, 30)
    config = alone(dataset, tmp_path / "wild", zero_stage=stage)
    wild = rows_of(config)
    times = wild[0].overflows or 0
    assert wild[0].loss_scale == 2.0 ** (30 - times) < 2**20
    lines, _ = notes_from(Path(config.output), 0)
    assert any(f"lowered {times} times" in line for line in lines)
    # one that begins with the scale that fits never knew of it
    scale_from(monkeypatch, 30 - times)
    calm = rows_of(alone(dataset, tmp_path / "calm", zero_stage=stage))
    assert calm[0].overflows == 0
    assert told(wild) == told(calm)
    assert [row.batch for row in wild] == [row.batch for row in calm]


@computes
def test_losses_are_near_those_of_fp32_and_weights_are_kept_in_it(
    dataset: Path, tmp_path: Path
) -> None:
    exact = rows_of(alone(dataset, tmp_path / "fp32", precision="fp32"))
    config = alone(dataset, tmp_path / "fp16")
    rows = rows_of(config)
    assert [r.loss for r in rows] == pytest.approx([r.loss for r in exact], abs=0.03)
    for row in rows:
        whole = math.hypot(*row.grad_norm_by_part.values())
        assert whole == pytest.approx(row.grad_norm, rel=1e-4)
    newest = latest_checkpoint(Path(config.output))
    assert newest is not None
    for name, value in saved_weights(newest.path).items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, value.half().float()), name


@computes
def test_a_resumed_run_goes_on_with_the_scale(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale_from(monkeypatch, 8, window=3)  # doubled at every third step
    config = alone(dataset, tmp_path / "run", checkpoint=CheckpointConfig(every=4))
    before = rows_of(config)
    assert len({row.loss_scale for row in before}) == 3
    shutil.rmtree(Path(config.output) / "checkpoints/step-00000008")
    ready = preflight(config)
    assert ready.start == 4
    assert told(launch(ready)) == told(before)


@computes
def test_a_gradient_that_never_fits_ends_the_run_in_one_line(dataset: Path, tmp_path: Path) -> None:
    optim = OptimConfig(lr=1e30, grad_clip=0.0)
    with pytest.raises(TrainError, match=r"step 2: loss .*, gradient norm inf; .*lower optim\.lr"):
        rows_of(alone(dataset, tmp_path / "run", optim=optim))


@computes
@pytest.mark.faults  # for its length
@pytest.mark.parametrize("stage", [1, 3])
def test_two_workers_lower_the_scale_together(stage: int, dataset: Path, tmp_path: Path) -> None:
    one = rows_of(alone(dataset, tmp_path / "one", zero_stage=stage))
    config = replace(
        alone(dataset, tmp_path / "two", zero_stage=stage), num_workers=2, launcher="ray"
    )
    assert train_together(config) == [0, 0]
    two = read_metrics(Path(config.output))
    assert sum(row.overflows or 0 for row in two) > 0
    assert [r.loss for r in two] == pytest.approx([r.loss for r in one], abs=0.01)


def test_a_processor_without_fp16_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["lapilli.train.device"]
    monkeypatch.setattr(module, "computes_fp16", lambda: False)
    check_precision("cpu", "bf16")
    check_precision("cuda", "fp16")
    with pytest.raises(TrainError, match="precision: fp16 is not computed by this machine's"):
        check_precision("cpu", "fp16")


def test_fp16_needs_a_stage_that_keeps_fp32_weights(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="zero_stage: 0 with precision fp16"):
        alone(dataset, tmp_path / "run", zero_stage=0)
