"""The learning rate against transformers' schedules, and torch's two ways to update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from lapilli.model.vlm import build_model
from lapilli.train.config import OptimConfig
from lapilli.train.device import prepare_process
from lapilli.train.driver.workers import join_alone
from lapilli.train.engine import deepspeed_engine
from lapilli.train.engine.fragments import held_fragments
from lapilli.train.errors import TrainError
from lapilli.train.steps.optim import build_optimizer, learning_rate
from lapilli.train.steps.step import to_device, train_step
from tests.train.tiny import global_tokens, model_config, random_steps, run_config


@pytest.mark.parametrize(
    ("name", "schedule"),
    [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)],
)
def test_equals_transformers_schedule(name: Any, schedule: Callable[..., Any]) -> None:
    total, warmup = 50, 5
    config = OptimConfig(lr=0.3, schedule=name, warmup_ratio=0.1)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = schedule(optimizer, warmup, total)
    theirs = []
    for _ in range(total):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    from_zero = [learning_rate(config, step, total, starts_at_zero=True) for step in range(total)]
    assert from_zero == pytest.approx(theirs)
    ours = [learning_rate(config, step, total) for step in range(total)]
    # transformers spends its first step at rate 0; ours already moves
    assert ours[: warmup - 1] == pytest.approx(theirs[1:warmup])
    assert ours[warmup:] == pytest.approx(theirs[warmup:])


def test_warmup_by_steps_is_warmup_by_the_same_share() -> None:
    configs = OptimConfig(lr=0.1, warmup_steps=8), OptimConfig(lr=0.1, warmup_ratio=0.2)
    by_steps, by_ratio = ([learning_rate(c, step, 40) for step in range(40)] for c in configs)
    assert by_steps == by_ratio
    assert by_steps[7] == 0.1 > by_steps[6]
    # more than there are: the rate rises to the end
    assert learning_rate(OptimConfig(lr=0.1, warmup_steps=99), 3, 4) == 0.1


def test_constant_and_no_warmup() -> None:
    config = OptimConfig(lr=0.1, schedule="constant", warmup_ratio=0.0)
    assert {learning_rate(config, step, 9) for step in range(9)} == {0.1}


def test_only_matrices_decay() -> None:
    model = build_model(model_config("projector", "language"))
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.1))
    by_decay = {g["weight_decay"]: {p.dim() for p in g["params"]} for g in optimizer.param_groups}
    assert by_decay == {0.1: {2}, 0.0: {1}}


def test_bf16_weights_in_an_fp32_run_are_refused() -> None:
    with pytest.raises(TrainError, match=r"model.dtype: bf16 with precision fp32.*set precision"):
        run_config(replace(model_config("projector"), dtype="bf16"))


@pytest.mark.parametrize("values", [{"lr": 0.0}, {"warmup_ratio": 1.0}, {"warmup_steps": -1}])
def test_a_wrong_setting_names_its_field(values: dict[str, float]) -> None:
    with pytest.raises(TrainError, match=f"optim.{next(iter(values))}"):
        OptimConfig(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_fused_kernel_updates_alike_and_its_moments_have_the_same_names(stage: int) -> None:
    join_alone("cpu")
    config = run_config(model_config(), num_workers=1, zero_stage=stage)
    found: list[dict[str, torch.Tensor]] = []
    for fused in (False, True):
        prepare_process("cpu")
        model = build_model(config.model)
        built = deepspeed_engine.initialize(
            model, build_optimizer(model, config.optim, fused=fused),
            deepspeed_engine.deepspeed_settings(config),
        )  # fmt: skip
        for ranks in random_steps(3, seed=2):
            batches = [to_device(batch, torch.device("cpu")) for batch in ranks[0]]
            train_step(built, batches, global_tokens=global_tokens(ranks), world_size=1)
        found.append({f"{f.name} {f.kind}": f.get().clone() for f in held_fragments(built)})
    plain, fused = found
    assert plain.keys() == fused.keys()
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-4, atol=1e-6, msg=name)
