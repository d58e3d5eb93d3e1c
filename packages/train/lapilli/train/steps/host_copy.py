"""Read the device a step later: copies to the host that nothing waits for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lapilli.train.device import pinned
from lapilli.train.steps.step_timing import Mark

__all__ = ["HostCopy", "send_numbers"]


class HostCopy:
    """Numbers on their way to the host: pinned memory, and the mark behind their copy.

    Args:
        numbers: Any shape, on the device; not changed afterwards.
        flush: Called behind the copy and before its mark (`step_marker`).
    """

    def __init__(self, numbers: Tensor, flush: Callable[[], None] = lambda: None) -> None:
        self._numbers = numbers.detach()
        if numbers.device.type != "cpu":
            host = pinned(torch.empty(numbers.shape, dtype=numbers.dtype), numbers.device)
            self._numbers = host.copy_(self._numbers, non_blocking=True)
        flush()
        self.mark = Mark(numbers.device)

    def numbers(self) -> list[float]:
        """The numbers; waits for the copy, and for no work that came after it."""
        self.mark.wait()
        return self._numbers.tolist()


def send_numbers(numbers: Sequence[float], device: torch.device) -> Tensor:
    """fp32 [len(numbers)] on a device; to a GPU from pinned memory and not waited for."""
    host = pinned(torch.tensor(numbers, dtype=torch.float32), device)
    return host.to(device, non_blocking=True)
