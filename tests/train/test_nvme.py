"""Optimizer state on a disk: the run without it, saved there, resumed there and elsewhere."""

from __future__ import annotations

import importlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lapilli.model.vlm import build_model
from lapilli.train.checkpoint import save_load as checkpoint
from lapilli.train.checkpoint.find import latest_checkpoint
from lapilli.train.config import OffloadConfig, RunConfig
from lapilli.train.device import prepare_process
from lapilli.train.driver.launching import launch
from lapilli.train.driver.memory_estimate import state_bytes
from lapilli.train.driver.preflight import preflight
from lapilli.train.engine import deepspeed_engine
from lapilli.train.run_folder.checkpoint_state import CheckpointState
from lapilli.train.run_folder.metrics_file import read_metrics
from tests.train.ready_processes import spawn
from tests.train.small_run import small_dataset, small_run
from tests.train.test_offload import SAVED, STEPS, go_on, start
from tests.train.tiny import model_config, run_config

pytestmark = pytest.mark.long  # the operator is compiled first
KINDS = ("none", "swapped", "resumed", "back")
PIECE = 600_000  # numbers; what is below 1 MiB a worker stays in memory
CPU = torch.device("cpu")


def run_at(folder: Path, **values: Any) -> RunConfig:
    """A language model some of whose parts are large enough for a disk."""
    model = model_config("vision", "projector", "language")
    model.language.settings.update(hidden_size=256, intermediate_size=1024, vocab_size=4096)
    return run_config(model, zero_stage=3, output=str(folder / "run"), **values)


def worker(rank: int, place: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", f"file://{place}/store", rank=rank, world_size=2)
    folder = Path(place)
    plain = run_at(folder)
    swapped = replace(plain, offload=OffloadConfig("nvme", str(folder / "disk")))
    found: dict[str, Any] = {"none": go_on(start(plain), rank, range(STEPS))}
    probe = start(swapped, piece=PIECE)
    zero = probe.engine.optimizer
    found["pieces"] = sum(map(zero._swappable_optimizer_subgroup, range(len(zero.fp16_groups))))
    first = go_on(probe, rank, range(SAVED))
    state = CheckpointState(files={})
    checkpoint.save(probe.engine, folder / "run", SAVED, state, keep=1)
    found["swapped"] = first + go_on(probe, rank, range(SAVED, STEPS))
    own = deepspeed_engine.swap_folder(swapped) / "zero_stage_3" / "optimizer" / f"rank{rank}"
    found["bytes"] = sum(path.stat().st_size for path in own.iterdir())
    dist.barrier()
    newest = latest_checkpoint(folder / "run")
    found["resumed"] = first + go_on(start(swapped, newest, PIECE), rank, range(SAVED, STEPS))
    found["back"] = first + go_on(start(plain, newest), rank, range(SAVED, STEPS))
    deepspeed_engine.forget_swapped(swapped, rank)
    assert not own.exists()
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    prepare_process("cpu")
    builders: Any = importlib.import_module("deepspeed.ops.op_builder.cpu")
    if not builders.AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("libaio's headers are absent: apt-get install libaio-dev")
    folder = tmp_path_factory.mktemp("nvme")
    spawn(worker, (str(folder),), nprocs=2)
    return torch.load(folder / "found.pt", weights_only=True)


def test_losses_are_those_without_it(found: dict[str, Any]) -> None:
    assert found["pieces"] >= 3, "nothing was large enough to be swapped"
    for (loss, gradients, norms), swapped in zip(found["none"], found["swapped"], strict=True):
        assert swapped[0] == pytest.approx(loss, abs=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(swapped[1][name], gradient, atol=1e-5, rtol=0)
        # of what it offloads DeepSpeed takes the norms itself, in fp32
        torch.testing.assert_close(swapped[2], norms, atol=1e-5, rtol=1e-4)


def test_a_resumed_run_is_the_uninterrupted_one(found: dict[str, Any]) -> None:
    losses = {kind: [step[0] for step in found[kind]] for kind in KINDS}
    assert losses["resumed"] == losses["swapped"]
    assert losses["back"] == pytest.approx(losses["none"], abs=1e-5)


def test_a_run_leaves_nothing_on_the_disk(found: dict[str, Any], tmp_path: Path) -> None:
    """And begins without what a killed one left there."""
    del found  # the operator is there
    dataset = small_dataset(tmp_path, images=8, text_only=0)
    disk = tmp_path / "disk"
    config = small_run(
        dataset,
        tmp_path / "run",
        num_workers=1,
        launcher="process",
        micro_batch_size=4,
        max_steps=2,
        zero_stage=3,
        offload=OffloadConfig("nvme", str(disk)),
    )
    left = deepspeed_engine.swap_folder(config) / "zero_stage_3" / "optimizer" / "rank7"
    left.mkdir(parents=True)
    (left / "5_6.tensor.swp").write_bytes(bytes(100))
    launch(preflight(config))
    assert [row.step for row in read_metrics(tmp_path / "run")] == [0, 1]
    assert [*disk.iterdir()] == []


def test_the_estimate_is_what_lies_on_the_disk(found: dict[str, Any], tmp_path: Path) -> None:
    parameters = [p.numel() for p in build_model(run_at(tmp_path).model).parameters()]
    count = sum(parameters)
    expected = state_bytes(count, count, stage=3, workers=2, precision="fp32", offload="nvme")
    # what is small stays in memory, and gradients below 1 MiB do
    assert found["bytes"] == pytest.approx(expected.disk, rel=0.15)
