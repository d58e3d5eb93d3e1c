"""Find ranks that are steadily slower than the others.

All ranks wait for each other in a step, so its length does not identify a slow one. The time that a
rank spends alone does: its wait for data and its forwards, which under ZeRO 0 to 2 involve no other
rank. (ZeRO-3 gathers weights in the forward: there all ranks take a slow one's time, and only a
slow feed is seen.)
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import nn

from lapilli.train.steps.step_timing import Mark

__all__ = ["WINDOW", "ForwardClock", "slow_line", "slow_ranks"]

WINDOW = 20  # steps
SLOWER = 1.3  # times the median of the other ranks
LEAST = 0.1  # of a step; less is the noise of a busy machine


def slow_ranks(busy: Sequence[float], step_seconds: float) -> list[int]:
    """The ranks whose own time is above `SLOWER` times the median of all others'.

    Args:
        busy: Seconds by rank; each is a median over `WINDOW` steps, so one slow step is nothing.
        step_seconds: Length of a step, for all of them: what is little of it is not named.
    """
    found: list[int] = []
    for rank, own in enumerate(busy):
        rest = [*busy[:rank], *busy[rank + 1 :]]
        usual = median(rest) if rest else own
        if own > SLOWER * usual and own - usual > LEAST * step_seconds:
            found.append(rank)
    return found


def slow_line(busy: Sequence[float], rank: int, host: str) -> str:
    """The message about a slow rank."""
    rest = median([*busy[:rank], *busy[rank + 1 :]])
    return (
        f"rank {rank} on {host} is slow: {busy[rank] * 1e3:.0f} ms of its own a step, the others "
        f"{rest * 1e3:.0f} ms (median of {WINDOW} steps); look for other work on that machine, "
        "heat, or a slow disk"
    )


class ForwardClock:
    """Marks before and after each forward of a module.

    Args:
        module: The module.
        device: Whose clock counts; the host's where a mark would cut what is given to a device.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._device = device
        self._marks: list[Mark] = []
        module.register_forward_pre_hook(self._mark)
        module.register_forward_hook(self._mark)

    def clear(self) -> None:
        """Forget forwards that were no part of a step."""
        self._marks = []

    def take(self) -> Sequence[tuple[Mark, Mark]]:
        """Begin and end of each forward since `clear`."""
        return list(zip(self._marks[::2], self._marks[1::2], strict=True))

    def _mark(self, *_: Any) -> None:
        self._marks.append(Mark(self._device))
