"""The duration of a step, known once the device has passed its end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Mark", "StepTiming"]


class Mark:
    """A point in a device's work: on a CPU the clock, else an event behind what it was given.

    Between two marks lies what the device needed, its waiting for the host included, and not what
    the host needed to give it its work.
    """

    def __init__(self, device: torch.device) -> None:
        self._seconds = time.monotonic()
        self._event: Any = None
        if device.type != "cpu":
            self._event = getattr(torch, device.type).Event(enable_timing=True)
            self._event.record()

    def wait(self) -> None:
        """Wait until the device has come past this point."""
        if self._event is not None:
            self._event.synchronize()

    def since(self, earlier: Mark) -> float:
        """Seconds from another point of the same device; it must have come past both."""
        if self._event is None:
            return self._seconds - earlier._seconds
        return earlier._event.elapsed_time(self._event) / 1e3


@dataclass(frozen=True, kw_only=True)
class StepTiming:
    """Points of one step. Its seconds may be asked for once the device has come past `end`.

    Attributes:
        start: Where the step before ended, or what came after it (validation, a checkpoint).
        asked: Its batches were asked for.
        given: They were there.
        end: Its numbers were.
        forwards: Begin and end of each forward.
    """

    start: Mark
    asked: Mark
    given: Mark
    end: Mark
    forwards: Sequence[tuple[Mark, Mark]]

    @property
    def seconds(self) -> float:
        """Of the step, with waiting for data."""
        return self.end.since(self.start)

    @property
    def wait_seconds(self) -> float:
        """Waiting for data; on a GPU what of it found the device idle."""
        return self.given.since(self.asked)

    @property
    def busy_seconds(self) -> float:
        """Waiting for data and forwards: what of a step a rank spends alone."""
        return self.wait_seconds + sum(last.since(first) for first, last in self.forwards)
