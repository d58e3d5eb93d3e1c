"""Adapters under ZeRO-3 on Ray's workers: LLaVA's LoRA recipe as it is started."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lapilli.model.config import LanguageConfig, LoraConfig
from lapilli.model.vlm import build_model
from lapilli.train.config import CheckpointConfig
from lapilli.train.driver.launching import launch
from lapilli.train.driver.preflight import preflight
from lapilli.train.run_folder.metrics_file import read_metrics
from tests.train.saved import saved_tensors
from tests.train.small_run import small_dataset, small_run


@pytest.mark.faults  # for its length: Ray and two workers
@pytest.mark.usefixtures("ray_local")
def test_two_workers_have_the_losses_of_one_process(tmp_path: Path) -> None:
    """The driver knows the model by its shapes, and no worker holds what is read."""
    dataset = small_dataset(tmp_path, images=12, text_only=8)
    made = small_run(dataset, tmp_path / "run").model
    build_model(made).language.save_pretrained(tmp_path / "language")
    model = replace(
        made,
        language=LanguageConfig(pretrained=str(tmp_path / "language")),
        lora=LoraConfig(target=r"language\..*", rank=4, alpha=8, dropout=0.0),
    )
    plan: dict[str, Any] = {
        "epochs": 1,
        "max_steps": 2,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "checkpoint": CheckpointConfig(every=1),
    }
    alone = small_run(
        dataset, tmp_path / "alone", zero_stage=2, num_workers=1, launcher="process", **plan
    )
    shared = small_run(dataset, tmp_path / "shared", zero_stage=3, num_workers=2, **plan)
    for config in (alone, shared):
        launch(preflight(replace(config, model=model)))
    found, expected = (read_metrics(Path(run.output)) for run in (shared, alone))
    assert [row.step for row in found] == [0, 1]
    assert [r.loss for r in found] == pytest.approx([r.loss for r in expected], abs=1e-4)
    norms = [row.grad_norm for row in expected]
    assert [row.grad_norm for row in found] == pytest.approx(norms, abs=1e-4)
    shapes = [
        {name: value.shape for name, value in saved_tensors(run / "step-00000002").items()}
        for run in (tmp_path / "shared" / "checkpoints", tmp_path / "alone" / "checkpoints")
    ]
    assert shapes[0] == shapes[1]
