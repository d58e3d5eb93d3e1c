"""On a CUDA device: the same loss and gradients as on the CPU, and no waiting for the device."""

from __future__ import annotations

import traceback
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist

from lapilli.model.parts.trainable import trainable_parameters
from lapilli.model.vlm import build_model
from lapilli.train.config import OptimConfig
from lapilli.train.device import prepare_process
from lapilli.train.engine.torch_engine import PlainEngine
from lapilli.train.steps.optim import build_optimizer
from lapilli.train.steps.step import to_device
from lapilli.train.worker.setup import Setup
from lapilli.train.worker.taken_step import take_step
from tests.train.engine_reads import sent_step
from tests.train.tiny import model_config, random_steps, run_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("step", [0, 1])
def test_loss_and_gradients_equal_the_cpus(step: int) -> None:
    batch = random_steps(2, seed=0)[step][0][0]
    found: list[tuple[float, dict[str, torch.Tensor]]] = []
    for device in (CPU, CUDA):
        model = build_model(model_config("vision", "projector", "language")).to(device)
        loss = model(**to_device(batch, device).inputs)
        loss.backward()
        gradients = {
            n: p.grad.cpu() for n, p in trainable_parameters(model).items() if p.grad is not None
        }
        found.append((loss.item(), gradients))
    (loss_cpu, cpu), (loss_cuda, cuda) = found
    assert loss_cuda == pytest.approx(loss_cpu, rel=1e-4)
    assert cpu.keys() == cuda.keys()
    for name, gradient in cpu.items():
        torch.testing.assert_close(cuda[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def test_the_merge_never_waits_for_the_device() -> None:
    from lapilli.model.merging import merge

    ids = torch.zeros(2, 64, dtype=torch.long, device=CUDA)
    index = torch.arange(-64, 64, dtype=torch.int32, device=CUDA).clamp(min=-1).view(2, 64)
    embedding = torch.randn(32, 16, device=CUDA, requires_grad=True)
    features = torch.randn(64, 16, device=CUDA, requires_grad=True)
    merge(ids, index, embedding, features).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        merge(ids, index, embedding, features).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert features.grad is not None


def ready_for(engine: Any, config: Any) -> Setup:
    feed: Any = SimpleNamespace(total_steps=9)
    state: Any = None  # nothing is saved
    return Setup(config, CUDA, feed, engine, 0, state, 0, 1)


def take_steps(ready: Setup, mode: Literal["warn", "error"]) -> list[float]:
    """Three steps, with images and without; the last two in a mode that tells where one waits."""
    tokens = ready.engine.module.vision.num_tokens
    side = ready.engine.module.vision.image_size
    sent = [sent_step(step, [step % 2] * 2, tokens, CUDA, side) for step in range(3)]
    losses = [take_step(ready, sent[0]).known().result.loss]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        taken = [take_step(ready, one) for one in sent[1:]]
        losses += [one.known().result.loss for one in taken]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return losses


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_never_waits_for_the_device(dtype: Literal["fp32", "bf16"]) -> None:
    shapes = replace(model_config("vision", "projector", "language"), dtype=dtype)
    config = run_config(shapes, precision=dtype)
    model = build_model(config.model).to(CUDA)
    engine = PlainEngine(
        model, build_optimizer(model, OptimConfig(lr=1e-3), fused=True), accumulation=2,
        grad_clip=1.0,
    )  # fmt: skip
    losses = take_steps(ready_for(engine, config), "error")
    assert all(0 < loss < 20 for loss in losses)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_only_deepspeed_waits_for_the_device_under_its_engine(
    stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is absent")
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    from lapilli.train.engine import deepspeed_engine

    config = run_config(
        model_config("vision", "projector", "language"), num_workers=1, zero_stage=stage,
        precision="bf16", global_batch_size=4, micro_batch_size=2,
    )  # fmt: skip
    prepare_process("cuda")
    if not dist.is_initialized():
        dist.init_process_group("nccl", f"file://{tmp_path}/store", rank=0, world_size=1)
    model = build_model(config.model).to(CUDA)
    engine = deepspeed_engine.initialize(
        model, build_optimizer(model, config.optim, fused=True),
        deepspeed_engine.deepspeed_settings(config),
    )  # fmt: skip
    waits: list[list[str]] = []

    def keep_stack(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchron" in str(message):
            waits.append([frame.filename for frame in traceback.extract_stack()])

    monkeypatch.setattr(warnings, "showwarning", keep_stack)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        losses = take_steps(ready_for(engine, config), "warn")
    assert [stack for stack in waits if not any("/deepspeed/" in file for file in stack)] == []
    assert all(0 < loss < 20 for loss in losses)
