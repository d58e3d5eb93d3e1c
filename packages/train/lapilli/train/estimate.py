"""What a run will take, said before it starts: memory by part, and on a CPU the time of a step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lapilli.train.step import DeviceBatch

__all__ = ["StateBytes", "state_bytes", "time_micro_batch"]

MOMENTS_BYTES = 8  # AdamW's two, fp32
MASTER_BYTES = 4  # the fp32 copy that is updated


@dataclass(frozen=True)
class StateBytes:
    """Bytes one worker holds for a part of the model; activations come on top."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All three."""
        return self.weights + self.gradients + self.optimizer


def state_bytes(
    parameters: int,
    trained: int,
    *,
    stage: Literal[0, 1, 2, 3],
    workers: int,
    precision: Literal["fp32", "bf16"],
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
    """
    size = 4 if precision == "fp32" else 2
    has_master = precision == "bf16" or stage > 0  # plain fp32 is updated in place
    state = trained * (MOMENTS_BYTES + MASTER_BYTES * has_master)
    return StateBytes(
        weights=size * parameters // (workers if stage == 3 else 1),
        gradients=size * trained // (workers if stage >= 2 else 1),
        optimizer=state // (workers if stage >= 1 else 1),
    )


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
