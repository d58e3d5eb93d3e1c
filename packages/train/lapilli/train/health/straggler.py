"""Find ranks that are steadily slower than the others.

In a step all ranks wait for each other, so its length says nothing of one of them. What a rank
spends alone does: its wait for data and its forwards, which under ZeRO-0 to 2 meet no other rank.
(ZeRO-3 gathers weights in the forward: there all ranks take a slow one's time, and only a slow feed
is seen.)
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

__all__ = ["BusyClock", "slow_line", "slow_ranks"]

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
    """What is said of a slow rank."""
    rest = median([*busy[:rank], *busy[rank + 1 :]])
    return (
        f"rank {rank} on {host} is slow: {busy[rank] * 1e3:.0f} ms of its own a step, the others "
        f"{rest * 1e3:.0f} ms (median of {WINDOW} steps); look for other work on that machine, "
        "heat, or a slow disk"
    )


class BusyClock:
    """A rank's own seconds in each step, and every `WINDOW` steps those of all ranks."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._device = device
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._busy = 0.0
        self._marks: list[Any] = []  # begin and end of each forward
        module.register_forward_pre_hook(self._before_forward)
        module.register_forward_hook(self._after_forward)

    def begin(self, waited: float) -> None:
        """A step begins, after so many seconds of waiting for its data."""
        self._busy = waited
        self._marks.clear()

    def _mark(self) -> None:
        if self._device.type == "cuda":
            event: Any = torch.cuda.Event
            self._marks.append(event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.monotonic())

    def _before_forward(self, module: nn.Module, inputs: Any) -> None:
        del module, inputs
        self._mark()

    def _after_forward(self, module: nn.Module, inputs: Any, output: Any) -> None:
        del module, inputs, output
        self._mark()

    def end(self) -> None:
        """A step has ended, its loss is known: the device has come past the forwards."""
        for first, last in zip(self._marks[::2], self._marks[1::2], strict=True):
            is_event = self._device.type == "cuda"
            self._busy += first.elapsed_time(last) / 1e3 if is_event else last - first
        self._recent.append(self._busy)

    def gather(self, step: int, rank: int, world_size: int) -> list[float]:
        """All ranks' medians at the end of a window; else, and for one worker, nothing."""
        if world_size < 2 or (step + 1) % WINDOW or len(self._recent) < WINDOW:
            return []
        busy = torch.zeros(world_size, device=self._device)
        busy[rank] = median(self._recent)
        dist.all_reduce(busy)
        return busy.tolist()
