"""The engine interface of `train_step` in plain torch: one process, no DeepSpeed."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor, nn

from lapilli.model.parts.trainable import trainable_parameters

__all__ = ["PlainEngine"]

UPDATE_NUMBERS = 2**28  # fp32 gradients of 1 GiB


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
        """Clip and update, if the step is whole; the device is not waited for.

        The fp32 gradients of weights that are not fp32 exist for `UPDATE_NUMBERS` at a time: whole,
        they would take as much memory as the fp32 weights.
        """
        if not self._is_boundary:
            return
        learnt = [parameter for parameter in self._parameters if parameter.grad is not None]
        clip: Tensor | None = None
        if self._grad_clip and learnt:
            norm = _total_norm([p.grad for p in learnt if p.grad is not None])
            clip = (self._grad_clip / (norm + 1e-6)).clamp(max=1.0)
        self._update([p for p in learnt if p not in self._masters], clip)
        for chunk in _chunks([p for p in learnt if p in self._masters], UPDATE_NUMBERS):
            self._update(chunk, clip)
        self.module.zero_grad(set_to_none=True)

    def _update(self, chunk: list[nn.Parameter], clip: Tensor | None) -> None:
        """One update of some parameters; the optimizer passes over those without a gradient."""
        for parameter in chunk:
            updated = self._masters.get(parameter, parameter)
            assert parameter.grad is not None
            gradient = parameter.grad.float()
            parameter.grad = None
            updated.grad = gradient if clip is None else gradient.mul_(clip)
        self.optimizer.step()
        for parameter in chunk:
            updated = self._masters.get(parameter, parameter)
            updated.grad = None
            if updated is not parameter:
                parameter.data.copy_(updated)


def _total_norm(gradients: list[Tensor]) -> Tensor:
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms))


def _chunks(parameters: list[nn.Parameter], most: int) -> Generator[list[nn.Parameter]]:
    """Parameters in order, `most` numbers at once or a single larger one."""
    chunk: list[nn.Parameter] = []
    held = 0
    for parameter in parameters:
        if chunk and held + parameter.numel() > most:
            yield chunk
            chunk, held = [], 0
        chunk.append(parameter)
        held += parameter.numel()
    if chunk:
        yield chunk
