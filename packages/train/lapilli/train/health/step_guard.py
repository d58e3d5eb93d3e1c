"""Watch a worker's steps for hangs, stragglers, slow disks and wrong losses."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import NoReturn

import torch

from lapilli.data.io.remote_path import RemotePath
from lapilli.model.deepspeed_internals import shape_of
from lapilli.model.parts.trainable import trainable_parameters
from lapilli.train.config import RunConfig
from lapilli.train.errors import TrainError
from lapilli.train.health.network_check import Worker, probe_workers, save_warning
from lapilli.train.health.step_dump import is_wrong, keep_step
from lapilli.train.health.straggler import WINDOW, ForwardClock, slow_line, slow_ranks
from lapilli.train.health.watchdog import HangWatch
from lapilli.train.run_folder.messages import note
from lapilli.train.run_folder.metrics_file import StepResult
from lapilli.train.run_folder.names import REPLAY
from lapilli.train.run_folder.scratch import lies_in_store
from lapilli.train.steps.feed import StepBatches
from lapilli.train.steps.step_timing import Mark, StepTiming

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
        is_lazy = device.type == "hpu" and config.hpu.lazy  # a mark would end the graph
        self._forwards = ForwardClock(module, torch.device("cpu") if is_lazy else device)
        parameters = trainable_parameters(module).values()
        numel = sum(math.prod(shape_of(p)) for p in parameters)
        self._checkpoint_bytes = 12 * numel  # fp32, two moments
        self._device = device
        self._workers: list[Worker] = []
        self._named: set[int] = set()
        self._losses: deque[float] = deque(maxlen=REMEMBERED)
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._busy: deque[float] = deque(maxlen=WINDOW)
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

    @property
    def busy(self) -> float:
        """This rank's own seconds in a step, once there is a window of them; else 0."""
        return median(self._busy) if len(self._busy) == WINDOW else 0.0

    def begin(self) -> None:
        """A step begins."""
        self._forwards.clear()

    def end(self, step: int) -> Sequence[tuple[Mark, Mark]]:
        """The device was given a step; the next one may take as long. Returns its forwards."""
        self._hang.beat(step + 1)
        return self._forwards.take()

    def check(
        self, batches: StepBatches, result: StepResult, timing: StepTiming, busy: Sequence[float]
    ) -> None:
        """Check a step whose results all ranks have. Collective.

        Args:
            batches: This rank's share of it.
            result: What all ranks have computed together.
            timing: How long it took.
            busy: By rank the seconds that `busy` had when it was taken.

        Raises:
            TrainError: The loss or norm is not finite, or the loss spiked; the step was saved.
        """
        why = self.why_wrong(result)
        if why is not None:
            self._keep(batches, result, why)
        self._losses.append(result.loss)
        self._seconds.append(timing.seconds)
        self._busy.append(timing.busy_seconds)
        if self._rank == 0:
            if (result.step - self._start) % WINDOW == 1:  # a window was known when it was taken
                self._tell_slow(busy)
            if result.step + 1 == self._start + WINDOW:
                self._tell_disk()

    def why_wrong(self, result: StepResult) -> str | None:
        """Why a step is wrong; None if it is fine."""
        factor = self._config.recovery.loss_spike_factor
        return is_wrong(result.loss, result.grad_norm, self._losses, factor)

    def _keep(self, batches: StepBatches, result: StepResult, why: str) -> NoReturn:
        path = keep_step(
            self._run, batches.step, (result.loss, result.grad_norm), batches.batches,
            (batches.global_tokens, batches.sample_indices.tolist()),
            (self._rank, self._world_size),
        )  # fmt: skip
        if lies_in_store(self._config):  # where each rank's share of it goes
            path = RemotePath(self._config.checkpoint.upload) / REPLAY / path.name
        raise TrainError(
            f"step {batches.step + 1}: loss {result.loss}, gradient norm {result.grad_norm}; "
            f"{why}; its samples are kept, lapilli replay {path} looks for the cause"
        )

    def _tell_slow(self, busy: Sequence[float]) -> None:
        """Name a slow rank once, and again only if it had recovered."""
        if not all(busy):
            return  # a window is not full yet
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
