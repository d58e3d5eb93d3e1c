"""Watch a worker's steps for hangs, stragglers, slow disks and wrong losses."""

from __future__ import annotations

import math
import time
from collections import deque
from pathlib import Path
from statistics import median
from types import TracebackType

import torch

from lapilli.model.deepspeed_internals import shape_of
from lapilli.model.parts.trainable import trainable_parameters
from lapilli.train.config import RunConfig
from lapilli.train.errors import TrainError
from lapilli.train.health.network_check import Worker, probe_workers, save_warning
from lapilli.train.health.step_dump import is_wrong, keep_step
from lapilli.train.health.straggler import WINDOW, BusyClock, slow_line, slow_ranks
from lapilli.train.health.watchdog import HangWatch
from lapilli.train.run_folder.messages import note
from lapilli.train.steps.feed import StepBatches

__all__ = ["StepGuard"]

REMEMBERED = 100  # losses a spike is compared with


class StepGuard:
    """Watches the steps of one worker. A context around all of them; made on every rank at once.

    Args:
        config: The run's settings.
        module: The model, as the engine holds it.
        device: What it computes on.
        place: Rank and world size.
        start: The first step.
    """

    def __init__(
        self,
        config: RunConfig,
        module: torch.nn.Module,
        device: torch.device,
        place: tuple[int, int],
        start: int,
    ) -> None:
        self._config = config
        self._run = Path(config.output)
        self._rank, self._world_size = place
        self._start = start
        self._clock = BusyClock(module, device)
        parameters = trainable_parameters(module).values()
        numel = sum(math.prod(shape_of(p)) for p in parameters)
        self._checkpoint_bytes = 12 * numel  # fp32, two moments
        self._device = device
        self._began = 0.0
        self._workers: list[Worker] = []
        self._named: set[int] = set()
        self._losses: deque[float] = deque(maxlen=REMEMBERED)
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._hang = HangWatch(
            self._run,
            self._rank,
            config.recovery.step_timeout,
            is_driver=config.launcher == "process",
        )

    def __enter__(self) -> StepGuard:
        self._hang.__enter__()
        self._hang.beat(self._start)
        self._workers = probe_workers(self._run, self._device, self._rank, self._world_size)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hang.__exit__(kind, error, trace)

    def begin(self, waited: float) -> None:
        """A step begins, after so many seconds of waiting for its data."""
        self._began = time.monotonic() - waited
        self._clock.begin(waited)

    def check(self, batches: StepBatches, loss: float, norm: float | None) -> None:
        """Look at what all ranks have computed together.

        Raises:
            TrainError: It is no number, or a spike; the step has been kept.
        """
        why = is_wrong(loss, norm, self._losses, self._config.recovery.loss_spike_factor)
        self._losses.append(loss)
        if why is None:
            return
        path = keep_step(
            self._run, batches.step, (loss, norm), batches.batches,
            (batches.global_tokens, batches.sample_indices.tolist()),
            (self._rank, self._world_size),
        )  # fmt: skip
        raise TrainError(
            f"step {batches.step}: loss {loss}, gradient norm {norm}; {why}; its samples are kept, "
            f"lapilli replay {path} looks for the cause"
        )

    def end(self, step: int) -> None:
        """A step has ended; the next one may take as long. Collective."""
        self._hang.beat(step + 1)
        self._clock.end()
        self._seconds.append(time.monotonic() - self._began)
        busy = self._clock.gather(step, self._rank, self._world_size)
        if self._rank == 0:
            self._tell_slow(busy)
            if step + 1 == self._start + WINDOW:
                self._tell_disk()

    def _tell_slow(self, busy: list[float]) -> None:
        """Name a slow rank once, and again only if it had recovered."""
        if not busy:
            return
        slow = set(slow_ranks(busy, median(self._seconds)))
        for rank in sorted(slow - self._named):
            note(self._run, slow_line(busy, rank, self._workers[rank].host))
        self._named = slow

    def _tell_disk(self) -> None:
        line = save_warning(
            self._workers,
            self._checkpoint_bytes,
            median(self._seconds),
            self._config.checkpoint.every,
        )
        if line:
            note(self._run, line)
