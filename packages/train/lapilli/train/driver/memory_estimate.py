"""Estimate a run before it starts: memory by part, activations, disk."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from lapilli.data.batches.collate import BatchShape, collate
from lapilli.model.config import KEEP_ALL, ActivationPolicy
from lapilli.model.parts.quantized import PACKED_BYTES, packed_numbers
from lapilli.train.config import RunConfig
from lapilli.train.driver.activation_memory import ActivationBytes
from lapilli.train.driver.fake_model import Sketch, sketch_model
from lapilli.train.steps.step import DeviceBatch

__all__ = [
    "Estimate", "StateBytes", "estimate_run", "sketch_run",
    "state_bytes", "time_micro_batch",
]  # fmt: skip

MOMENTS_BYTES = 8  # AdamW's two, fp32
MASTER_BYTES = 4  # the fp32 copy that is updated
SAVED_BYTES = MASTER_BYTES + MOMENTS_BYTES  # of a parameter, in a checkpoint
BUCKETS = 10**9  # gradients that DeepSpeed has on the device at most when they go to the host
FETCHED = 10**9  # weights that it has fetched from there at most


@dataclass(frozen=True)
class StateBytes:
    """Bytes one worker holds for a part of the model; activations come on top.

    Attributes:
        weights: On the device.
        gradients: On the device.
        optimizer: On the device.
        host: In the host's memory, where something is offloaded.
        disk: On the worker's disk, likewise.
    """

    weights: int
    gradients: int
    optimizer: int
    host: int = 0
    disk: int = 0

    @property
    def total(self) -> int:
        """All that is on the device."""
        return self.weights + self.gradients + self.optimizer


def state_bytes(
    parameters: int,
    trained: int,
    *,
    stage: Literal[0, 1, 2, 3],
    workers: int,
    precision: Literal["fp32", "bf16", "fp16"],
    offload: Literal["none", "cpu", "nvme"] = "none",
    packed: int = 0,
) -> StateBytes:
    """Memory of weights, gradients and AdamW's state on one worker.

    Each stage of ZeRO shares one thing more among the workers: the optimizer's state, the
    gradients, the weights (Rajbhandari et al., arXiv 1910.02054, figure 1). Only what is trained
    has gradients and state.

    Args:
        parameters: Of the part.
        trained: How many of them learn.
        stage: DeepSpeed's ZeRO stage.
        workers: Among whom is shared.
        precision: Of weights and gradients.
        offload: `RunConfig.offload.to`; `nvme` counts at stage 3, where DeepSpeed can do it.
        packed: How many of the parameters are held in 4 bits, which stage 3 cannot share.
    """
    if packed:
        whole = state_bytes(
            parameters - packed,
            trained,
            stage=stage,
            workers=workers,
            precision=precision,
            offload=offload,
        )
        return replace(whole, weights=whole.weights + int(packed * PACKED_BYTES))
    size = 4 if precision == "fp32" else 2
    has_master = precision != "fp32" or stage > 0  # plain fp32 is updated in place
    state = trained * (MOMENTS_BYTES + MASTER_BYTES * has_master)
    if (offload == "cpu" and stage > 0) or (offload == "nvme" and stage == 3):
        found = _offloaded(parameters, trained, stage=stage, workers=workers, size=size)
        return _swapped(found, trained, workers=workers) if offload == "nvme" else found
    return StateBytes(
        weights=size * parameters // (workers if stage == 3 else 1),
        gradients=size * trained // (workers if stage >= 2 else 1),
        optimizer=state // (workers if stage >= 1 else 1),
    )


def _offloaded(parameters: int, trained: int, *, stage: int, workers: int, size: int) -> StateBytes:
    """The optimizer's state with an fp32 gradient beside it on the host; at stage 3 weights too.

    The device holds stage 3's weights only while they are needed, and gradients on their way;
    stage 1 accumulates them there. On the host each stage has a buffer more, of gradients or of
    weights on their way back, and stage 2 accumulates in another.
    """
    host = trained * (MOMENTS_BYTES + MASTER_BYTES + 4 + size * (2 if stage == 2 else 1))
    return StateBytes(
        weights=size * (min(parameters, FETCHED) if stage == 3 else parameters),
        gradients=size * (trained if stage == 1 else min(trained, BUCKETS)),
        optimizer=0,
        host=(host + (size * parameters if stage == 3 else 0)) // workers,
    )


def _swapped(held: StateBytes, trained: int, *, workers: int) -> StateBytes:
    """What is offloaded with the optimizer's state and its fp32 gradient on a disk.

    Some buffers of `engine.SUB_GROUP` numbers, in the host's memory, are not counted.
    """
    disk = trained * (MOMENTS_BYTES + MASTER_BYTES + 4) // workers
    return replace(held, host=held.host - disk, disk=disk)


@dataclass(frozen=True)
class Estimate:
    """Memory and disk of a run, from its settings and longest sequence.

    Attributes:
        parameters: Parameters by part: all, and those that learn.
        packed: By part, how many of all are held in 4 bits.
        states: By ZeRO stage and part: what one worker holds beside activations.
        length: Tokens of the longest sequence.
        one: What a micro-batch of one row of that length with one image keeps for backward.
        two: The same of two rows; what more rows keep follows.
        logits_bytes: Logits of one chunk, and their gradient.
        checkpoint_bytes: One checkpoint on the disk.
    """

    parameters: dict[str, tuple[int, int]]
    packed: dict[str, int]
    states: dict[int, dict[str, StateBytes]]
    length: int
    one: ActivationBytes
    two: ActivationBytes
    logits_bytes: int
    checkpoint_bytes: int

    def activations(self, rows: int) -> ActivationBytes:
        """What a micro-batch of so many rows keeps for backward."""
        return self.one.grown(self.two, rows)

    def under(self, config: RunConfig) -> Estimate:
        """The estimate of the same model with another run's ZeRO stage, workers and offloading."""
        return replace(self, states=_states(config, self.parameters, self.packed))

    def batch_bytes(self, rows: int, policy: ActivationPolicy = KEEP_ALL) -> int:
        """What a micro-batch takes at its peak: the head's logits, or a layer that runs again."""
        kept = self.activations(rows)
        return max(kept.held(policy) + self.logits_bytes, kept.peak(policy))

    def worker_bytes(self, stage: int, rows: int, policy: ActivationPolicy = KEEP_ALL) -> int:
        """Everything one worker holds on its device at its peak."""
        held = sum(part.total for part in self.states[stage].values())
        return held + self.batch_bytes(rows, policy)


def sketch_run(config: RunConfig) -> Sketch:
    """The run's model of fake tensors, in the type that it computes in: no weight is read.

    Raises:
        ModelError: A part that cannot be built.
    """
    size = "fp32" if config.precision == "fp32" else "bf16"  # fp16 takes as much
    return sketch_model(replace(config.model, dtype=size))


def estimate_run(
    config: RunConfig, sketch: Sketch, *, length: int, trained: int | None = None
) -> Estimate:
    """Sizes of a run.

    Args:
        config: The run; its micro-batch may be 0.
        sketch: Its model (`sketch_run`).
        length: Tokens of the longest sequence, its images' tokens included.
        trained: Most trained tokens of a sequence; None for all of the longest.
    """
    tokens = sketch.model.image_tokens
    kept: list[ActivationBytes] = []
    for rows in (1, 2):
        shape = BatchShape(
            rows=rows, buckets=(length,), image_tokens=tokens,
            target_sizes=(max(1, rows * (length if trained is None else trained)),),
        )  # fmt: skip
        batch = collate([], shape, sketch.model.vision.image_size, with_images=True)
        kept.append(sketch.activations(batch, config.global_batch_size))
    parameters = sketch.parameters()
    packed = {name: packed_numbers(part) for name, part in sketch.model.named_children()}
    return Estimate(
        parameters=parameters,
        packed=packed,
        states=_states(config, parameters, packed),
        length=length,
        one=kept[0],
        two=kept[1],
        logits_bytes=8 * config.model.head_chunk * sketch.model.vocab_size,  # fp32, and their slope
        checkpoint_bytes=SAVED_BYTES * sum(trained for _, trained in parameters.values()),
    )


def _states(
    config: RunConfig, parameters: dict[str, tuple[int, int]], packed: dict[str, int]
) -> dict[int, dict[str, StateBytes]]:
    """What a worker holds, by ZeRO stage and part, with as few workers as the run goes on with."""
    stages: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
    return {
        stage: {
            name: state_bytes(
                *counts,
                stage=stage,
                workers=config.recovery.min_workers or config.num_workers,
                precision=config.precision,
                offload=config.offload.to,
                packed=packed[name],
            )
            for name, counts in parameters.items()
        }
        for stage in stages
    }


def time_micro_batch(model: nn.Module, batch: DeviceBatch) -> float:
    """Seconds for forward and backward of one micro-batch on one core, as a CPU worker has it.

    The model's gradients are empty afterwards. The first pass, which allocates, is not counted.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model(**batch.inputs).backward()
        started = time.monotonic()
        model(**batch.inputs).backward()
        return time.monotonic() - started
    finally:
        torch.set_num_threads(threads)
        model.zero_grad(set_to_none=True)
