"""Optimizer state and stage 3's weights in the host's memory: the run without it, and resumed."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lapilli.model.vlm import build_model
from lapilli.train.checkpoint import save_load as checkpoint
from lapilli.train.checkpoint.find import Checkpoint, latest_checkpoint
from lapilli.train.config import OffloadConfig, RunConfig
from lapilli.train.device import prepare_process
from lapilli.train.driver.activation_memory import leanest
from lapilli.train.driver.memory_estimate import RowSizes, estimate_run, sketch_run, state_bytes
from lapilli.train.driver.memory_policy import choose_memory
from lapilli.train.driver.preflight import preflight
from lapilli.train.engine import deepspeed_engine
from lapilli.train.engine.deepspeed_internals import MOMENTS
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.checkpoint_state import CheckpointState
from lapilli.train.steps.optim import build_optimizer
from lapilli.train.steps.step import to_device, train_step
from tests.train.ready_processes import spawn
from tests.train.small_run import small_dataset, small_run
from tests.train.test_zero import Probe, part_norms, plain_pytorch
from tests.train.tiny import global_tokens, model_config, random_steps, run_config

STEPS, SAVED = 8, 4
CPU = torch.device("cpu")
CONFIG = run_config(model_config("vision", "projector", "language", tied=True))
STAGES = (1, 2, 3)


def start(config: RunConfig, found: Checkpoint | None = None, piece: int = 0) -> Probe:
    """An engine; `piece`: numbers that go to a disk at once."""
    prepare_process("cpu")
    model = build_model(config.model)
    if found:
        checkpoint.load_weights(found, model)
    settings = deepspeed_engine.deepspeed_settings(config)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # partition all
    if piece:
        settings["zero_optimization"]["sub_group_size"] = piece
    engine = deepspeed_engine.initialize(model, build_optimizer(model, config.optim), settings)
    if found:
        checkpoint.load_into(engine, found)
    return Probe(engine)


def go_on(probe: Probe, rank: int, steps: range) -> list[Any]:
    """Loss, whole gradient and norms by part of each step."""
    seen: list[Any] = []
    for ranks in random_steps(STEPS, seed=0)[steps.start : steps.stop]:
        batches = [to_device(batch, CPU) for batch in ranks[rank]]
        tokens = global_tokens(ranks)
        loss = train_step(probe, batches, global_tokens=tokens, world_size=2)
        dist.all_reduce(loss)
        seen.append((float(loss) / tokens, probe.gradients, probe.norms))
    return seen


def host_bytes(engine: Any) -> int:
    """What DeepSpeed really holds for optimizer and offload, tensor by tensor."""
    zero = engine.optimizer
    flat = getattr(zero, "single_partition_of_fp32_groups", None)
    if flat is None:
        flat = zero.fp32_partitioned_groups_flat
        held = [parameter.ds_tensor for parameter in engine.module.parameters()]
        held.append(zero.grad_partitions_flat_buffer)
    else:
        held = [*zero.param_buffer_of_bit16_for_cpu_offload_groups]
        held += zero.accumulated_grads_in_cpu.values()
    for tensor in flat:
        held += [tensor, tensor.grad, *(zero.optimizer.state[tensor][name] for name in MOMENTS)]
    return sum(tensor.nbytes for tensor in held)


def worker(rank: int, place: str) -> None:
    """On each stage: without offload, with it, and with it stopped and resumed."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", f"file://{place}/store", rank=rank, world_size=2)
    for stage in STAGES:
        plain = replace(CONFIG, zero_stage=stage)
        offloaded = replace(plain, offload=OffloadConfig("cpu"))
        found = {"none": go_on(start(plain), rank, range(STEPS))}
        probe = start(offloaded)
        first = go_on(probe, rank, range(SAVED))
        run = Path(place) / f"run-{stage}"
        if rank == 0:
            torch.save(host_bytes(probe.engine), f"{place}/held-{stage}.pt")
        state = CheckpointState(files={})
        checkpoint.save(probe.engine, run, SAVED, state, keep=1)
        found["offloaded"] = first + go_on(probe, rank, range(SAVED, STEPS))
        dist.barrier()
        newest = latest_checkpoint(run)
        found["resumed"] = first + go_on(start(offloaded, newest), rank, range(SAVED, STEPS))
        found["back"] = first + go_on(start(plain, newest), rank, range(SAVED, STEPS))
        if rank == 0:
            torch.save(found, f"{place}/{stage}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offload")
    spawn(worker, (str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_those_without_offload_and_of_plain_pytorch(stage: int, runs: Path) -> None:
    found = torch.load(runs / f"{stage}.pt", weights_only=True)
    expected = plain_pytorch(CONFIG, STEPS)
    for (loss, gradients), without, offloaded in zip(
        expected, found["none"], found["offloaded"], strict=True
    ):
        assert offloaded[0] == pytest.approx(loss, abs=1e-5)
        assert offloaded[0] == pytest.approx(without[0], abs=0 if stage < 3 else 1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(offloaded[1][name], gradient, atol=1e-5, rtol=0)
        torch.testing.assert_close(offloaded[2], part_norms(gradients), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_is_the_uninterrupted_one(stage: int, runs: Path) -> None:
    found = torch.load(runs / f"{stage}.pt", weights_only=True)
    losses = {kind: [step[0] for step in steps] for kind, steps in found.items()}
    assert losses["resumed"] == losses["offloaded"]
    assert losses["back"] == pytest.approx(losses["none"], abs=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_the_estimate_is_what_deepspeed_holds_on_the_host(stage: Any, runs: Path) -> None:
    parameters = list(build_model(CONFIG.model).parameters())
    total = sum(p.numel() for p in parameters)
    learns = sum(p.numel() for p in parameters if p.requires_grad)
    found = state_bytes(total, learns, stage=stage, workers=2, precision="fp32", offload="cpu")
    held = torch.load(runs / f"held-{stage}.pt", weights_only=True)
    assert found.host == pytest.approx(held, rel=0.05)  # a tiny model's padding
    assert found.optimizer == 0


def test_a_run_that_does_not_fit_is_told_to_offload() -> None:
    config = replace(CONFIG, zero_stage=2, micro_batch_size=0)
    estimate = estimate_run(config, sketch_run(config), RowSizes(32))
    needed = estimate_run(
        replace(config, offload=OffloadConfig("cpu")), sketch_run(config), RowSizes(32)
    )
    lean = leanest(needed.one, offload=True)
    budget = needed.worker_bytes(2, 1, lean)
    assert budget < estimate.worker_bytes(2, 1, lean)
    with pytest.raises(TrainError, match=r"needs at least .* with offload\.to: cpu \d"):
        choose_memory(config, "cuda", budget, lambda _: estimate)
    offloaded = replace(config, offload=OffloadConfig("cpu"))
    chosen, policy = choose_memory(offloaded, "cuda", budget, lambda _: needed)
    assert (chosen.micro_batch_size, policy.estimated) == (1, budget)


@pytest.mark.parametrize(
    ("stage", "to", "disk", "said"),
    [
        (2, "nvme", "/nvme", "set zero_stage 3"),
        (3, "nvme", "", "needs a folder on a disk"),
        (3, "cpu", "/nvme", "the others take none"),
    ],
)
def test_a_disk_to_offload_to_is_named_and_takes_stage_3(
    stage: Any, to: Any, disk: str, said: str
) -> None:
    with pytest.raises(TrainError, match=rf"offload\.to: .*{said}"):
        replace(CONFIG, zero_stage=stage, offload=OffloadConfig(to, disk))


def test_a_relative_folder_is_the_drivers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's workers have working folders of their own."""
    monkeypatch.chdir(tmp_path)
    dataset = small_dataset(tmp_path, images=8, text_only=0)
    config = small_run(
        dataset,
        tmp_path / "run",
        num_workers=1,
        launcher="process",
        zero_stage=3,
        offload=OffloadConfig("nvme", "disk"),
    )
    assert preflight(config).config.offload.nvme_path == str(tmp_path / "disk")


def swapping(folder: Path) -> None:
    config = replace(
        CONFIG,
        zero_stage=3,
        offload=OffloadConfig("nvme", str(folder)),
        output=str(folder / "run"),
    )
    prepare_process("cpu")
    model = build_model(config.model)
    settings = deepspeed_engine.deepspeed_settings(config)
    deepspeed_engine.initialize(model, build_optimizer(model, config.optim), settings)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(
        TrainError, match=r"offload\.nvme_path: .*/file/.* choose a folder on a disk"
    ):
        swapping(tmp_path / "file")


def test_a_disk_that_is_too_small_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(TrainError, match=r"offload\.nvme_path: .* has .* free, .* need .*"):
        swapping(tmp_path)


def test_an_operator_that_cannot_be_compiled_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "false")  # a compiler that compiles nothing
    with pytest.raises(
        TrainError, match=r"offload\.to: nvme needs .* apt-get install .*libaio-dev"
    ):
        swapping(tmp_path)
    assert not [*tmp_path.rglob("probe*")]


def test_the_estimate_says_what_lies_on_the_disk() -> None:
    """Weights stay in the host's memory; state and gradient, 16 bytes a number, go."""
    known: dict[str, Any] = {"stage": 3, "workers": 4, "precision": "bf16"}
    disk = state_bytes(1000, 800, offload="nvme", **known)
    assert disk.disk == 16 * 800 // 4
    assert disk.host == (2 * 1000 + 2 * 800) // 4  # bf16 weights, and gradients on their way
    assert (disk.weights, disk.gradients) == (2 * 1000, 2 * 800)
    assert state_bytes(1000, 800, offload="nvme", stage=2, workers=4, precision="bf16").disk == 0


def test_stage_0_has_nothing_to_offload() -> None:
    with pytest.raises(
        TrainError, match=r"offload\.to: cpu with zero_stage 0.*set zero_stage 1 to 3"
    ):
        replace(CONFIG, zero_stage=0, offload=OffloadConfig("cpu"))
