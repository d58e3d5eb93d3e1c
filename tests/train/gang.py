"""A run's workers as plain processes on gloo, without Ray: what a worker does, at little cost."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lapilli.train.config import RunConfig
from lapilli.train.engine import deepspeed_engine as engine
from lapilli.train.run_folder.metrics_file import read_metrics
from lapilli.train.worker.loop import fit
from lapilli.train.worker.setup import setup
from tests.train.ready_processes import process

__all__ = ["train_together"]

PATIENCE = 300  # seconds without a step; a machine may have other work


def train_together(
    config: RunConfig, *, kill_at: int | None = None, cuts_all: bool = False
) -> list[int | None]:
    """Run `config.num_workers` processes to their end; returns their exit codes.

    Args:
        config: The run.
        kill_at: kill -9 the last worker once this step is done; the others are ended then.
        cuts_all: At ZeRO stage 3 share every parameter, also those that DeepSpeed finds too small.
    """
    run = Path(config.output)
    run.mkdir(parents=True, exist_ok=True)
    store = f"{tempfile.mkdtemp(dir=run.parent)}/store"
    places = [(config, rank, store, cuts_all) for rank in range(config.num_workers)]
    workers = [process(_work, *place) for place in places]
    for worker in workers:
        worker.start()
    if kill_at is not None:
        give_up = time.monotonic() + PATIENCE
        while not any(row.step >= kill_at for row in read_metrics(run)):
            assert time.monotonic() < give_up, "the run never came to the step"
            time.sleep(0.005)
        workers[-1].kill()
        workers[-1].join()
        for worker in workers[:-1]:
            worker.kill()  # as Ray does with a group of which one is lost
    for worker in workers:
        worker.join(PATIENCE)
    return [worker.exitcode for worker in workers]


def _work(config: RunConfig, rank: int, store: str, cuts_all: bool) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(config.num_workers))
    torch.set_num_threads(1)
    size = config.num_workers
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size)
    settings = engine.deepspeed_settings
    if cuts_all:
        small = {"stage3_param_persistence_threshold": 0}

        def cutting(config: RunConfig, communication: Any = None) -> dict[str, Any]:
            found = settings(config, communication)
            return {**found, "zero_optimization": found["zero_optimization"] | small}

        engine.deepspeed_settings = cutting
    fit(setup(config, "cpu", rank=rank, world_size=size))
    dist.barrier()
    dist.destroy_process_group()
