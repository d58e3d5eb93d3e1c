"""Estimate a run before it starts: memory by part, activations, disk."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import nn

from lapilli.data.batches.collate import BatchShape, collate
from lapilli.data.dataset.dataset import Dataset
from lapilli.model.attention.forward import holds_all_scores
from lapilli.model.attention.trees import mask_count
from lapilli.model.config import KEEP_ALL, ActivationPolicy
from lapilli.model.parts.quantized import Quantization, packed_numbers
from lapilli.train.config import RunConfig
from lapilli.train.device import Device
from lapilli.train.driver.activation_memory import ActivationBytes
from lapilli.train.driver.fake_model import Sketch, sketch_model
from lapilli.train.steps.rows import PlannedRows
from lapilli.train.steps.step import DeviceBatch

__all__ = [
    "Estimate", "RowSizes", "StateBytes", "estimate_run", "row_sizes", "sketch_run",
    "state_bytes", "time_micro_batch",
]  # fmt: skip

MOMENTS_BYTES = 8  # AdamW's two, fp32
MASTER_BYTES = 4  # the fp32 copy that is updated
SAVED_BYTES = MASTER_BYTES + MOMENTS_BYTES  # of a parameter, in a checkpoint
NF4 = Quantization()
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
    how: Quantization = NF4,
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
        packed: How many of the parameters are held in few bits, which stage 3 cannot share.
        how: In what.
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
        return replace(whole, weights=whole.weights + int(packed * how.number_bytes))
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
class RowSizes:
    """The rows that decide how much memory a run takes.

    Attributes:
        length: Tokens of the longest, its images' tokens included.
        trained: Most trained tokens of a row; None for all of the longest.
        images: Most images of a row.
        shortest: Tokens of the shortest that has images: under `micro_batch_tokens` as many of it
            as fit take most of the tower. None for no row shorter than the longest.
    """

    length: int
    trained: int | None = None
    images: int = 1
    shortest: int | None = None


def row_sizes(config: RunConfig, rows: PlannedRows | None, dataset: Dataset | None) -> RowSizes:
    """The sizes of a run's rows, from its first epoch.

    Args:
        config: The run.
        rows: Of the epoch; None where its dataset is not there yet.
        dataset: Likewise.
    """
    longest = config.longest_row if config.shares_rows else config.max_length
    if rows is None or dataset is None:
        return RowSizes(longest)
    if not config.shares_rows and not config.is_static:
        longest = int(dataset.lengths.max())  # whatever an epoch leaves out
    has_images = rows.images > 0
    shortest = rows.lengths[has_images] if has_images.any() else rows.lengths
    return RowSizes(
        length=max(longest, int(rows.lengths.max())),
        trained=int(rows.trained.max()),
        images=max(1, int(rows.images.max())),
        shortest=int(shortest.min()),
    )


@dataclass(frozen=True)
class _ShortRows:
    """A micro-batch of the shortest rows, as many as a number of tokens holds.

    Attributes:
        length: Tokens of a row.
        most: Rows at most: a worker's share of a global batch.
        one: What one row keeps for backward.
        two: What two keep.
    """

    length: int
    most: int
    one: ActivationBytes
    two: ActivationBytes

    def within(self, tokens: int) -> ActivationBytes:
        """What as many rows as fit keep for backward."""
        return self.one.grown(self.two, max(1, min(self.most, tokens // self.length)))


@dataclass(frozen=True)
class Estimate:
    """Memory and disk of a run, from its settings and longest sequence.

    Attributes:
        parameters: Parameters by part: all, and those that learn.
        packed: By part, how many of all are held in 4 bits.
        states: By ZeRO stage and part: what one worker holds beside activations.
        length: Tokens of the longest sequence.
        one: What a micro-batch of one row of that length with most images keeps for backward.
        two: The same of two rows; what more rows keep follows.
        logits_bytes: Logits of one chunk, and their gradient.
        checkpoint_bytes: One checkpoint on the disk.
        short: A micro-batch of shorter rows, where they are bounded by tokens.
    """

    parameters: dict[str, tuple[int, int]]
    packed: dict[str, int]
    states: dict[int, dict[str, StateBytes]]
    length: int
    one: ActivationBytes
    two: ActivationBytes
    logits_bytes: int
    checkpoint_bytes: int
    short: _ShortRows | None = None

    def activations(self, rows: int) -> ActivationBytes:
        """What a micro-batch of so many rows keeps for backward."""
        return self.one.grown(self.two, rows)

    def under(self, config: RunConfig) -> Estimate:
        """The estimate of the same model with another run's ZeRO stage, workers and offloading."""
        return replace(self, states=_states(config, self.parameters, self.packed))

    def batch_bytes(self, rows: int, policy: ActivationPolicy = KEEP_ALL) -> int:
        """What a micro-batch takes at its peak: the head's logits, or a layer that runs again."""
        shapes = [self.activations(rows)]
        if self.short:
            shapes.append(self.short.within(rows * self.length))
        return max(max(one.held(policy) + self.logits_bytes, one.peak(policy)) for one in shapes)

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
    config: RunConfig, sketch: Sketch, rows: RowSizes, *, device: Device = "cpu"
) -> Estimate:
    """Sizes of a run.

    Args:
        config: The run; its micro-batch may be 0.
        sketch: Its model (`sketch_run`).
        rows: Its rows.
        device: Where it computes: rows of several samples need dense masks where no kernel skips
            what a query does not see.
    """
    one, two = (_kept(config, sketch, rows, count, device) for count in (1, 2))
    short = None
    if config.micro_batch_tokens and rows.shortest and rows.shortest < rows.length:
        small = replace(rows, length=rows.shortest)
        short = _ShortRows(
            rows.shortest,
            config.global_batch_size // config.num_workers,
            *(_kept(config, sketch, small, count, device) for count in (1, 2)),
        )
    parameters = sketch.parameters()
    packed = {name: packed_numbers(part) for name, part in sketch.model.named_children()}
    return Estimate(
        parameters=parameters,
        packed=packed,
        states=_states(config, parameters, packed),
        length=rows.length,
        one=one,
        two=two,
        logits_bytes=8 * config.model.head_chunk * sketch.model.vocab_size,  # fp32, and their slope
        checkpoint_bytes=SAVED_BYTES * sum(trained for _, trained in parameters.values()),
        short=short,
    )


def _kept(
    config: RunConfig, sketch: Sketch, rows: RowSizes, count: int, device: Device
) -> ActivationBytes:
    """What a micro-batch of so many rows keeps for backward."""
    tokens, language = sketch.model.image_tokens, sketch.model.language
    images = min(rows.images, max(1, rows.length // tokens))
    trained = min(rows.length, rows.length if rows.trained is None else rows.trained)
    shape = BatchShape(
        rows=count,
        buckets=(rows.length,),
        image_tokens=tokens,
        target_sizes=(max(1, count * trained),),
    )
    batch = collate([], shape, sketch.model.vision.image_size, with_images=True)
    pixels = np.broadcast_to(batch.pixels[:1], (count * images, *batch.pixels.shape[1:]))
    kept = sketch.activations(replace(batch, pixels=pixels), config.global_batch_size)
    if config.shares_rows and (device != "cuda" or holds_all_scores(language)):
        size = 4 if config.precision == "fp32" else 2
        masks = count * mask_count(language.config, rows.length)
        window = getattr(language.config, "sliding_window", None)
        masks -= window is not None and window < rows.length  # counted: of rows of one sample
        kept = replace(kept, outside=kept.outside + masks * rows.length**2 * size)
    return kept


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
                how=Quantization.of(config.model.language),
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
