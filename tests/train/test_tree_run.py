"""A run with trees in packed rows under DeepSpeed: the same losses at any stage and world size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lapilli.model.config import LoraConfig
from lapilli.model.parts.trainable import set_modes
from lapilli.model.vlm import build_model
from lapilli.train.config import RunConfig
from lapilli.train.device import prepare_process
from lapilli.train.engine.torch_engine import PlainEngine
from lapilli.train.run_folder.metrics_file import read_metrics
from lapilli.train.steps.feed import Feed
from lapilli.train.steps.optim import build_optimizer, learning_rate
from lapilli.train.steps.step import to_device, train_step
from lapilli.train.worker.compatibility import open_for
from tests.train.gang import train_together
from tests.train.small_run import small_dataset, small_run

STEPS = 7  # into the second epoch


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("trees"), images=12, text_only=4, asked=3)


def config_for(dataset: Path, output: Path, *, lora: bool = False, **values: Any) -> RunConfig:
    config = small_run(
        dataset, output, share_images=True, pack=True, row_length=1024, max_length=640,
        micro_batch_size=1, epochs=2, max_steps=STEPS, **values,
    )  # fmt: skip
    adapters = LoraConfig(rank=2, dropout=0.0) if lora else None
    return replace(config, model=replace(config.model, lora=adapters))


def expected_losses(config: RunConfig) -> list[float]:
    """One process of plain torch."""
    prepare_process("cpu")
    model = build_model(config.model)
    set_modes(model)
    feed = Feed(open_for(model, config), config, rank=0, world_size=1)
    optim = config.optim
    engine = PlainEngine(model, build_optimizer(model, optim), grad_clip=optim.grad_clip)
    found: list[float] = []
    for step in range(feed.total_steps):
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(optim, step, feed.total_steps) * group["lr_factor"]
        made = feed.make(step)
        sent = [to_device(batch, torch.device("cpu")) for batch in made.batches]
        total = train_step(engine, sent, global_tokens=made.global_tokens, world_size=1)
        found.append(float(total) / made.global_tokens)
    return found


def losses(config: RunConfig, **how: Any) -> list[float]:
    train_together(config, **how)
    return [row.loss for row in read_metrics(Path(config.output))]


@pytest.mark.parametrize("lora", [pytest.param(False, marks=pytest.mark.faults), True])
def test_two_workers_at_stage_3_are_one_process(dataset: Path, tmp_path: Path, lora: bool) -> None:
    config = config_for(dataset, tmp_path / "run", lora=lora, zero_stage=3)
    found = losses(config, cuts_all=True)
    assert len(found) == STEPS
    assert found == pytest.approx(expected_losses(config), rel=1e-5)


@pytest.mark.faults
def test_a_killed_run_goes_on_with_other_workers_at_another_stage(
    dataset: Path, tmp_path: Path
) -> None:
    config = config_for(dataset, tmp_path / "run", zero_stage=2)
    config = replace(config, checkpoint=replace(config.checkpoint, every=2))
    losses(config, kill_at=3)
    resumed = losses(replace(config, num_workers=1, zero_stage=1))
    assert resumed == pytest.approx(expected_losses(config), rel=1e-5)
