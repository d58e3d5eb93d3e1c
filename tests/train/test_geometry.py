"""One global batch cut in many ways: the gradient does not know how."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lapilli.data.batches.collate import Batch, blank_batches, collate
from lapilli.data.dataset.dataset import Sample
from lapilli.model.parts.trainable import trainable_parameters
from lapilli.model.vlm import build_model
from lapilli.train.steps.step import to_device, train_step, warm_up
from tests.train.ready_processes import spawn
from tests.train.test_zero import Probe, make_engine
from tests.train.tiny import IMAGE_SIZE, SHAPE, model_config, random_sample, run_config

GLOBAL_BATCH = 8
CPU = torch.device("cpu")
CONFIG = run_config(
    model_config("projector", "language"), global_batch_size=GLOBAL_BATCH, micro_batch_size=1
)
# workers: (micro-batch, ZeRO stage)
CUTS = {
    1: [(8, 0), (2, 1), (1, 2), (4, 3)],
    2: [(4, 0), (1, 1), (2, 2), (1, 3)],
    4: [(1, 0), (2, 1), (1, 2), (2, 3)],
}


@cache
def samples() -> list[Sample]:
    """A global batch whose first sample trains one token and whose last 20 of 24."""
    generator = np.random.default_rng(5)
    some = [random_sample(f"{i}", generator, images=i % 2) for i in range(GLOBAL_BATCH - 2)]
    little = Sample("little", some[0].input_ids, np.array([[2, 3]], np.int32), some[0].pixels)
    ids = generator.integers(1, 40, 24).astype(np.int32)
    much = Sample("much", ids, np.array([[4, 24]], np.int32), some[0].pixels[:0])
    return [little, *some, much]


def shares(workers: int, micro_batch_size: int) -> list[list[Batch]]:
    """[rank][micro-step], the samples dealt in their order."""
    shape = replace(SHAPE, rows=micro_batch_size)
    chunks = [samples()[i : i + micro_batch_size] for i in range(0, GLOBAL_BATCH, micro_batch_size)]
    steps = [chunks[i : i + workers] for i in range(0, len(chunks), workers)]
    has_images = [any(len(s.pixels) for chunk in step for s in chunk) for step in steps]
    return [
        [
            collate(step[rank], shape, IMAGE_SIZE, with_images=has)
            for step, has in zip(steps, has_images, strict=True)
        ]
        for rank in range(workers)
    ]


def tokens() -> int:
    return sum(batch.num_targets for batch in shares(1, GLOBAL_BATCH)[0])


def worker(rank: int, folder: str, workers: int) -> None:
    """Every cut for this number of workers; rank 0 writes loss and gradient."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(workers))
    store = f"file://{folder}/store-{workers}"
    dist.init_process_group("gloo", store, rank=rank, world_size=workers)
    for micro_batch_size, stage in CUTS[workers]:
        config = replace(
            CONFIG, num_workers=workers, micro_batch_size=micro_batch_size, zero_stage=stage
        )
        probe = Probe(make_engine(config))
        blank = blank_batches(replace(SHAPE, rows=micro_batch_size), IMAGE_SIZE)
        warm_up(probe.engine, ((to_device(batch, CPU), None) for batch in blank))  # leaves no trace
        batches = [to_device(batch, CPU) for batch in shares(workers, micro_batch_size)[rank]]
        loss = train_step(probe, batches, global_tokens=tokens(), world_size=workers)
        dist.all_reduce(loss)
        if rank == 0:
            found = (float(loss) / tokens(), probe.gradients)
            torch.save(found, f"{folder}/{workers}-{micro_batch_size}-{stage}.pt")
    dist.barrier()
    dist.destroy_process_group()


@cache
def plain() -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient in plain PyTorch, a sample at a time."""
    model = build_model(CONFIG.model)
    losses = [model(**to_device(batch, CPU).inputs) for batch in shares(1, 1)[0]]
    loss = torch.stack(losses).sum() / tokens()
    loss.backward()
    gradients = {name: p.grad for name, p in trainable_parameters(model).items()}
    return loss.item(), {name: g for name, g in gradients.items() if g is not None}


@pytest.mark.parametrize(
    "workers",
    [1, 2, pytest.param(4, marks=pytest.mark.long)],  # four for their length
)
def test_the_gradient_does_not_depend_on_the_cut(workers: int, tmp_path: Path) -> None:
    counts = [batch.num_targets for batch in shares(1, 1)[0]]
    assert max(counts) >= 20 * min(counts)
    spawn(worker, (str(tmp_path), workers), nprocs=workers)
    loss, gradients = plain()
    for micro_batch_size, stage in CUTS[workers]:
        where = f"micro-batch {micro_batch_size}, stage {stage}"
        path = tmp_path / f"{workers}-{micro_batch_size}-{stage}.pt"
        loss_here, here = torch.load(path, weights_only=True)
        assert loss_here == pytest.approx(loss, abs=1e-5), where
        assert here.keys() == gradients.keys()
        for name, gradient in gradients.items():
            worst = (gradient - here[name]).abs().max().item()
            assert worst <= 1e-5, f"{where}, {name}: {worst}"
