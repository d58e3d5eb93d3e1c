"""Read the device a step later: copies to the host that nothing waits for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lapilli.train.steps.step_timing import Mark

__all__ = ["HostCopy", "send_numbers"]


class HostCopy:
    """Numbers on their way to the host: pinned memory, and the mark behind their copy.

    Args:
        numbers: Any shape, on the device; not changed afterwards.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers.detach()
        if numbers.device.type != "cpu":
            pinned = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers = pinned.copy_(self._numbers, non_blocking=True)
        self.mark = Mark(numbers.device)

    def numbers(self) -> list[float]:
        """The numbers; waits for the copy, and for no work that came after it."""
        self.mark.wait()
        return self._numbers.tolist()


def send_numbers(numbers: Sequence[float], device: torch.device) -> Tensor:
    """fp32 [len(numbers)] on a device; to a GPU from pinned memory and not waited for."""
    host = torch.tensor(numbers, dtype=torch.float32, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)
