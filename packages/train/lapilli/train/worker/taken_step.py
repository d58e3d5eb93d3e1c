"""One optimizer step of a worker: taken now, known a step later."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lapilli.model.auxiliary.target_loss import AuxInputs
from lapilli.model.config import GROUPS
from lapilli.train.engine import deepspeed_engine as engine
from lapilli.train.engine.deepspeed_internals import loss_scale
from lapilli.train.metrics.batch_digest import LANES, lanes_text, sample_lanes
from lapilli.train.metrics.step_metrics import slot_losses
from lapilli.train.run_folder.messages import note
from lapilli.train.run_folder.metrics_file import StepResult
from lapilli.train.steps.aux_targets import gathered, loss_names
from lapilli.train.steps.device_copy import SentStep
from lapilli.train.steps.feed import StepBatches
from lapilli.train.steps.host_copy import HostCopy, send_numbers
from lapilli.train.steps.optim import learning_rate
from lapilli.train.steps.step import seed_step, train_step
from lapilli.train.worker.setup import Setup

__all__ = ["SAVE", "STOP", "KnownStep", "TakenStep", "take_step"]

SAVE, STOP = 1, 2  # what rank 0 may ask of all: a checkpoint now; that and to end


@dataclass(frozen=True)
class KnownStep:
    """What all ranks have computed together in a step.

    Attributes:
        result: Its loss, gradient norms and samples.
        asked: What rank 0 asks of all: `SAVE`, `STOP` or 0.
        busy: By rank the seconds that it told for itself (`take_step`).
        losses: Every sample's summed loss by its place in the global batch.
    """

    result: StepResult
    asked: int
    busy: Sequence[float]
    losses: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class TakenStep:
    """A step that the device was given; the host has not looked at what it computes.

    Attributes:
        batches: Its samples; their tensors on the device are let go.
        lr: The learning rate.
        learning: Parts that learn.
        loss_scale: Of fp16.
        overflows: How often fp16's loss scale was lowered for it.
        heads: Task and layer of each predictor.
        told: What all ranks tell, summed over them, on its way to the host: loss, `GROUPS`'
            squared gradient norms, losses by place in the global batch, two losses a predictor,
            what rank 0 asks, lanes of the batch's digest, busy seconds by rank.
    """

    batches: StepBatches
    lr: float
    learning: frozenset[str]
    loss_scale: float | None
    overflows: int | None
    heads: Sequence[tuple[str, int]]
    told: HostCopy

    def known(self) -> KnownStep:
        """Wait for the step's numbers, and for nothing that the device was given after it."""
        numbers, step = iter(self.told.numbers()), self.batches
        summed, *squares = islice(numbers, 1 + len(GROUPS))
        losses = list(islice(numbers, len(step.placed)))
        names = loss_names(self.heads)
        aux_losses = dict(zip(names, islice(numbers, len(names)), strict=True))
        asked, *lanes = islice(numbers, 1 + LANES)
        result = StepResult(
            step=step.step,
            loss=summed / max(1, step.global_tokens),
            lr=self.lr,
            grad_norm=_root(sum(squares)),
            grad_norm_by_part={
                part: _root(square)
                for part, square in zip(GROUPS, squares, strict=True)
                if part in self.learning
            },
            samples=step.global_samples,
            trained_tokens=step.global_tokens,
            batch=lanes_text(lanes),
            loss_scale=self.loss_scale,
            overflows=self.overflows,
            aux_losses=aux_losses or None,
        )
        return KnownStep(result, round(asked), list(numbers), losses)


def _root(square: float) -> float:
    return math.sqrt(square) if square >= 0 else math.nan


def take_step(ready: Setup, batches: SentStep, *, asks: int = 0, busy: float = 0.0) -> TakenStep:
    """Give the device one optimizer step, and ask it for nothing.

    Where fp16 overflows, DeepSpeed updates nothing and lowers the scale, on all ranks alike; it
    asks the device for that. The same samples are then taken again, so that none is lost, until
    there is nothing to lower.

    Args:
        ready: The worker.
        batches: The step's batches.
        asks: What this rank asks of all; rank 0 alone may.
        busy: Seconds of its own that this rank tells the others.
    """
    rate = learning_rate(
        ready.config.optim, batches.step, ready.feed.total_steps,
        starts_at_zero=ready.config.sampler == "llava",
    )  # fmt: skip
    engine.set_learning_rate(ready.engine, rate)
    squares, aux = list[Tensor](), gathered(batches.aux, ready.world_size)
    overflows = 0
    while True:
        seed_step(ready.config.seed, batches.step, ready.rank)
        scale = loss_scale(ready.engine)
        total = train_step(
            ready.engine,
            batches.on_device,
            global_tokens=batches.global_tokens,
            world_size=ready.world_size,
            before_update=lambda: squares.append(engine.part_squares(ready.engine)),
            flush=ready.flush, aux=aux,
        )  # fmt: skip
        if loss_scale(ready.engine) >= scale:
            break
        overflows += 1
    is_fp16 = ready.config.precision == "fp16"
    if overflows and ready.is_writer:
        note(
            Path(ready.config.output),
            f"step {batches.step}: its gradient overflowed fp16; taken again with the loss scale "
            f"lowered {overflows} times, to {scale:g}; no sample is lost",
        )
    lanes = sample_lanes(batch.sample_ids for batch in batches.batches)
    own = [busy if rank == ready.rank else 0.0 for rank in range(ready.world_size)]
    known = send_numbers([float(asks), *lanes, *own], total.device)
    losses = slot_losses(batches.slots, batches.on_device, len(batches.placed))
    told = torch.cat([total[None], squares[-1], losses, *_predicted(aux), known])
    if ready.world_size > 1:
        dist.all_reduce(told)
    groups: list[dict[str, Any]] = ready.engine.optimizer.param_groups
    return TakenStep(
        batches=replace(batches, on_device=[], aux=[]),
        lr=rate,
        learning=frozenset(group["part"] for group in groups),
        loss_scale=scale if is_fp16 else None,
        overflows=overflows if is_fp16 else None,
        told=HostCopy(told, ready.flush),
        heads=ready.config.model.aux.heads,
    )


def _predicted(aux: Sequence[AuxInputs]) -> list[Tensor]:
    """This rank's share of each predictor's losses, in one tensor; none where there are none."""
    return [torch.stack([one.losses for one in aux]).sum(0).flatten()] if aux else []
