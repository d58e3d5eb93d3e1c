"""Memory by ZeRO stage against the paper's own figures."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from lapilli.data.collate import collate
from lapilli.model.vlm import build_model
from lapilli.train.estimate import state_bytes, time_micro_batch
from lapilli.train.step import to_device
from tests.train.tiny import IMAGE_SIZE, SHAPE, model_config, random_sample


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_papers_example_of_7_5_billion_parameters_on_64_devices(
    stage: Literal[0, 1, 2, 3], gigabytes: float
) -> None:
    found = state_bytes(7_500_000_000, 7_500_000_000, stage=stage, workers=64, precision="bf16")
    assert found.total / 1e9 == pytest.approx(gigabytes, abs=0.05)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_is_frozen_has_weights_alone(stage: Literal[0, 1, 2, 3]) -> None:
    found = state_bytes(1000, 0, stage=stage, workers=2, precision="fp32")
    assert (found.gradients, found.optimizer) == (0, 0)
    assert found.weights == (2000 if stage == 3 else 4000)


def test_plain_fp32_is_what_torchs_adamw_holds() -> None:
    layer = torch.nn.Linear(30, 20)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 30)).sum().backward()
    optimizer.step()
    moments = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if value.dim()  # the step count is a scalar
    )
    found = state_bytes(620, 620, stage=0, workers=1, precision="fp32")
    assert found.weights == found.gradients == sum(p.nbytes for p in layer.parameters())
    assert found.optimizer == moments


def test_timing_leaves_no_gradient_and_the_threads_as_they_were() -> None:
    model = build_model(model_config())
    samples = [random_sample("a", np.random.default_rng(0), images=1)]
    batch = to_device(collate(samples, SHAPE, IMAGE_SIZE), torch.device("cpu"))
    threads = torch.get_num_threads()
    assert time_micro_batch(model, batch) > 0
    assert torch.get_num_threads() == threads
    assert all(parameter.grad is None for parameter in model.parameters())
