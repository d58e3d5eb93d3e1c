"""Two workers under ZeRO 0 to 3 against one process of plain PyTorch, step by step."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lapilli.model.config import GROUPS, LoraConfig
from lapilli.model.parts.trainable import group_of, trainable_parameters
from lapilli.model.vlm import build_model
from lapilli.train.checkpoint import save_load as checkpoint
from lapilli.train.checkpoint.find import latest_checkpoint
from lapilli.train.config import RunConfig
from lapilli.train.device import prepare_process
from lapilli.train.engine import deepspeed_engine
from lapilli.train.run_folder.checkpoint_state import CheckpointState
from lapilli.train.steps.optim import build_optimizer
from lapilli.train.steps.step import to_device, train_step
from tests.train.ready_processes import spawn
from tests.train.saved import saved_tensors
from tests.train.tiny import global_tokens, model_config, random_steps, run_config

STEPS = {"frozen tower": 20, "all trained": 8, "projector only": 8, "adapters": 8}
SAVED = STEPS["all trained"]
CPU = torch.device("cpu")
CASES: dict[str, RunConfig] = {
    "frozen tower": run_config(model_config("projector", "language")),
    "all trained": run_config(model_config("vision", "projector", "language", tied=True)),
    "projector only": run_config(model_config("projector")),
    "adapters": run_config(
        model_config("projector", "language", lora=LoraConfig(rank=2, alpha=8, dropout=0.0)),
        lr_by_part={"adapters": 2e-3, "projector": 2e-4},
    ),
}


class Probe:
    """An engine that keeps the whole unclipped gradient, and its norm by part, at each update."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.device = engine.device
        self.gradients: dict[str, torch.Tensor] = {}
        self.norms = torch.zeros(len(GROUPS))
        self.gradient_accumulation_steps = engine.gradient_accumulation_steps
        self.set_gradient_accumulation_boundary = engine.set_gradient_accumulation_boundary

    def __call__(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.engine(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss)

    def step(self) -> None:
        if self.engine.is_gradient_accumulation_boundary():
            self.gradients = {
                name: deepspeed_engine.read_gradient(parameter).detach().clone()
                for name, parameter in trainable_parameters(self.engine.module).items()
            }
            squares = deepspeed_engine.part_squares(self.engine)
            dist.all_reduce(squares)
            self.norms = squares.sqrt()
        self.engine.step()


def make_engine(config: RunConfig) -> Any:
    prepare_process("cpu")
    model = build_model(config.model)
    settings = deepspeed_engine.deepspeed_settings(config)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # partition all
    return deepspeed_engine.initialize(model, build_optimizer(model, config.optim), settings)


def worker(rank: int, folder: str) -> None:
    """Train every case on every stage; rank 0 writes losses and gradients."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    for case, config in CASES.items():
        steps = random_steps(STEPS[case], seed=0)
        for stage in (0, 1, 2, 3):
            probe = Probe(make_engine(replace(config, zero_stage=stage)))
            found = []
            for ranks in steps:
                batches = [to_device(batch, CPU) for batch in ranks[rank]]
                tokens = global_tokens(ranks)
                loss = train_step(probe, batches, global_tokens=tokens, world_size=2)
                dist.all_reduce(loss)
                found.append((float(loss) / tokens, probe.gradients, probe.norms))
            if rank == 0:
                torch.save(found, f"{folder}/{case}-{stage}.pt")
            if (case, stage) == ("all trained", 3):
                save_and_load(probe.engine, config, Path(folder), rank)
    dist.barrier()
    dist.destroy_process_group()


def save_and_load(engine: Any, config: RunConfig, folder: Path, rank: int) -> None:
    """Save under stage 3, load under the others, read everything back."""
    state = CheckpointState(files={})
    checkpoint.save(engine, folder, SAVED, state, keep=1)
    dist.barrier()
    found = latest_checkpoint(folder)
    assert found is not None
    for stage in (0, 1, 2, 3):
        prepare_process("cpu")
        model = build_model(replace(config.model, seed=99))
        checkpoint.load_weights(found, model)
        stage_config = replace(config, zero_stage=stage)
        settings = deepspeed_engine.deepspeed_settings(stage_config)
        optimizer = build_optimizer(model, config.optim)
        loaded = deepspeed_engine.initialize(model, optimizer, settings)
        checkpoint.load_into(loaded, found)
        again = folder / f"again-{stage}"
        checkpoint.save(loaded, again, SAVED, state, keep=1)


@pytest.fixture(scope="module")
def zero_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    spawn(worker, (str(folder),), nprocs=2)
    return folder


def plain_pytorch(config: RunConfig, steps: int) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """The same global batches in one process: one backward of the mean over trained tokens."""
    model = build_model(config.model)
    parameters = trainable_parameters(model)
    optimizer = build_optimizer(model, config.optim)
    found = []
    for ranks in random_steps(steps, seed=0):
        total = torch.zeros(())
        for micros in ranks:
            for batch in micros:
                total = total + model(**to_device(batch, CPU).inputs)
        loss = total / global_tokens(ranks)
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in parameters.items()
        }
        torch.nn.utils.clip_grad_norm_(parameters.values(), config.optim.grad_clip)
        optimizer.step()
        found.append((loss.item(), gradients))
    return found


def part_norms(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    """Torch's norm of what belongs to each part."""
    squares = torch.zeros(len(GROUPS))
    for name, gradient in gradients.items():
        squares[GROUPS.index(group_of(name))] += gradient.norm().square()
    return squares.sqrt()


@pytest.mark.parametrize("case", list(CASES))
def test_losses_and_gradients_equal_plain_pytorch_on_every_stage(
    case: str, zero_runs: Path
) -> None:
    expected = plain_pytorch(CASES[case], STEPS[case])
    assert all(loss > 1 for loss, _ in expected)
    for stage in (0, 1, 2, 3):
        found = torch.load(zero_runs / f"{case}-{stage}.pt", weights_only=True)
        for step, ((loss, gradients), (loss_here, here, norms)) in enumerate(
            zip(expected, found, strict=True)
        ):
            where = f"{case}, stage {stage}, step {step}"
            assert abs(loss - loss_here) <= 1e-5, where
            assert gradients.keys() == here.keys()
            for name, gradient in gradients.items():
                worst = (gradient - here[name]).abs().max().item()
                assert worst <= 1e-5, f"{where}, {name}: {worst}"
            torch.testing.assert_close(norms, part_norms(gradients), atol=1e-5, rtol=1e-5)


def test_text_only_steps_give_the_projector_gradient_zero(zero_runs: Path) -> None:
    for stage in (0, 1, 2, 3):
        found = torch.load(zero_runs / f"frozen tower-{stage}.pt", weights_only=True)
        for step, (_, gradients, _) in enumerate(found):
            sizes = [g.abs().max().item() for n, g in gradients.items() if "projector" in n]
            assert (max(sizes) == 0.0) is (step % 3 == 1), (stage, step)


def test_a_checkpoint_knows_no_stage(zero_runs: Path) -> None:
    before = saved_tensors(zero_runs / "checkpoints" / f"step-{SAVED:08d}")
    assert len(before) > 100
    for stage in (0, 1, 2, 3):
        again = zero_runs / f"again-{stage}" / "checkpoints" / f"step-{SAVED:08d}"
        after = saved_tensors(again)
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert torch.equal(value, after[key]), (stage, key)
