"""One optimizer step, given an engine and device batches."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lapilli.data.batches.collate import Batch
from lapilli.model.auxiliary.target_loss import AuxInputs
from lapilli.model.parts.trainable import trainable_parameters
from lapilli.train.device import pinned

__all__ = ["DeviceBatch", "OutOfMemory", "seed_step", "to_device", "train_step", "warm_up"]


@dataclass(frozen=True)
class DeviceBatch:
    """The tensors the model's forward takes, by its argument names, and what its loss weighs."""

    inputs: dict[str, Tensor]
    weight: float = 1.0


def to_device(batch: Batch, device: torch.device, weight: float = 1.0) -> DeviceBatch:
    """Copy what the model needs to the device; pixels stay uint8 until they are there.

    To a GPU or HPU the copies go from pinned memory and are not waited for.

    Args:
        batch: A micro-batch.
        device: Where to.
        weight: Multiplies its summed loss (`StepBatches.weights`).
    """
    arrays = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "merge_index": batch.merge_index,
        "pixels": batch.pixels,
        "predict_positions": batch.predict_positions,
        "targets": batch.targets,
        "target_samples": batch.target_samples,
        "sample_losses": np.zeros(batch.sample_slots, np.float32),  # the model fills it
    }
    if batch.has_trees:
        arrays |= {"tree_ids": batch.tree_ids, "branch_ids": batch.branch_ids}
    tensors = {name: pinned(torch.from_numpy(value), device) for name, value in arrays.items()}
    moved = {name: t.to(device, non_blocking=True) for name, t in tensors.items()}
    return DeviceBatch(moved, weight)


class OutOfMemory(Exception):
    """The device, or on a CPU the host, had no room for a micro-batch.

    Attributes:
        rows: Its rows.
        tokens: Tokens of a row.
        images: Its images.
        said: What torch says, in one line.
    """

    def __init__(self, batch: DeviceBatch, error: RuntimeError) -> None:
        self.rows, self.tokens = batch.inputs["input_ids"].shape
        self.images = len(batch.inputs["pixels"])
        self.said = ". ".join(str(error).split(". ")[:2])
        super().__init__(f"out of memory at {self.rows} x {self.tokens} tokens: {self.said}")


@contextmanager
def _naming(batch: DeviceBatch) -> Generator[None]:
    """Name a micro-batch whose work finds no memory; torch's CPU allocator has no error class."""
    try:
        yield
    except RuntimeError as error:
        is_host = "DefaultCPUAllocator" in str(error)
        if not (is_host or isinstance(error, torch.OutOfMemoryError)):
            raise
        raise OutOfMemory(batch, error) from None


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the model's randomness (dropout) from the step.

    A resumed run draws what the uninterrupted one would have; no random state needs saving.
    """
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank) % 2**63)


def warm_up(
    engine: Any,
    batches: Iterable[tuple[DeviceBatch, AuxInputs | None]],
    flush: Callable[[], None] = lambda: None,
) -> None:
    """Forward and backward of each batch, which leaves no gradient and takes no step.

    With each batch stands what predictors take beside it (`train_step`).

    What a shape's first pass costs (memory that is found, kernels that are compiled) is paid
    before step 0, and what does not fit fails there. Gradients are asked for by name and not
    accumulated, so no hook of ZeRO's sees them. Collective: all ranks, the same shapes. `flush` is
    called after each (`step_marker`).
    """
    learning = list(trainable_parameters(engine.module).values())
    for batch, aux in batches:
        with _naming(batch):
            # the engine's own call would expect its `backward`
            loss = engine.module(**batch.inputs, **({"aux": aux} if aux else {}))
            torch.autograd.grad(loss, learning, allow_unused=True)
            flush()


def train_step(
    engine: Any,
    batches: Sequence[DeviceBatch],
    *,
    global_tokens: int,
    world_size: int,
    before_update: Callable[[], None] = lambda: None,
    flush: Callable[[], None] = lambda: None,
    aux: Sequence[AuxInputs] = (),
) -> Tensor:
    """Forward and backward over a worker's micro-batches, then one optimizer step.

    The gradient is that of the mean over all trained tokens of the global batch, or where the
    batches carry weights of the mean over its micro-batches' means: DeepSpeed divides by the
    accumulation and by the number of workers, so both are multiplied in before.

    Args:
        engine: DeepSpeed's engine.
        batches: This worker's micro-batches, at least one; as many as the accumulation, or fewer
            where the global batch is cut short.
        global_tokens: Trained tokens of the global batch, known from the plan.
        world_size: Number of workers.
        before_update: Called once, between the last backward and the update.
        flush: Called after each backward and after the update (`step_marker`).
        aux: What the predictors take beside each micro-batch, with all ranks' targets; none where
            nothing is predicted. Their losses are filled in.

    Returns:
        This worker's summed loss, weighted, fp32 scalar, detached; that of the predictors is in it.

    Raises:
        OutOfMemory: No room for a micro-batch; says which.
    """
    scale = world_size * engine.gradient_accumulation_steps() / max(1, global_tokens)
    total = torch.zeros((), dtype=torch.float32, device=engine.device)
    for number, batch in enumerate(batches, start=1):
        # said and not counted by DeepSpeed: a short batch has fewer micro-steps
        is_last = number == len(batches)
        engine.set_gradient_accumulation_boundary(is_last)
        with _naming(batch):
            beside = {"aux": aux[number - 1]} if aux else {}
            loss = engine(**batch.inputs, **beside) * batch.weight
            engine.backward(loss * scale)
            flush()
            if is_last:
                before_update()
            engine.step()
        if is_last:
            flush()
        total += loss.detach()
    return total
