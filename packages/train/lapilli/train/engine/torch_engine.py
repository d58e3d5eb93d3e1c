"""The engine interface of `train_step` in plain torch: one process, no DeepSpeed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lapilli.model.parts.trainable import trainable_parameters

__all__ = ["PlainEngine"]


class PlainEngine:
    """One worker's step as DeepSpeed takes it at stage 1, for machines that have no DeepSpeed.

    Weights that are not fp32 have an fp32 copy, which the optimizer updates.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        accumulation: int = 1,
        grad_clip: float = 0.0,
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self._accumulation = accumulation
        self._grad_clip = grad_clip
        self._is_boundary = True
        self._norm: float | None = None
        self._parameters = list(trainable_parameters(module).values())
        self.device = self._parameters[0].device
        self._masters = {
            parameter: parameter.detach().float()
            for parameter in self._parameters
            if parameter.dtype != torch.float32
        }
        for group in optimizer.param_groups:
            group["params"] = [self._masters.get(p, p) for p in group["params"]]

    def __call__(self, **inputs: Tensor) -> Tensor:
        """The module's loss."""
        return self.module(**inputs)

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of a whole step."""
        return self._accumulation

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Say whether the next `step` updates."""
        self._is_boundary = is_boundary

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the next `step` updates."""
        return self._is_boundary

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradient; divides by the accumulation, as DeepSpeed does."""
        (loss / self._accumulation).backward()

    def step(self) -> None:
        """Clip and update, if the step is whole."""
        if not self._is_boundary:
            return
        for parameter, master in self._masters.items():
            master.grad = None if parameter.grad is None else parameter.grad.float()
        updated = [self._masters.get(p, p) for p in self._parameters]
        limit = self._grad_clip or float("inf")
        self._norm = float(torch.nn.utils.clip_grad_norm_(updated, limit))
        self.optimizer.step()
        for parameter, master in self._masters.items():
            parameter.data.copy_(master)
            master.grad = None
        self.module.zero_grad(set_to_none=True)

    def get_global_grad_norm(self) -> float | None:
        """Norm of the last step's gradient before it was clipped."""
        return self._norm
