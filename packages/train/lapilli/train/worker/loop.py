"""The training loop of a worker: step, log, validate, save."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

from lapilli.data.cluster_metrics import put
from lapilli.train.checkpoint import save_load as checkpoint
from lapilli.train.checkpoint.tidy import tidy
from lapilli.train.checkpoint.upload import Uploads
from lapilli.train.device import peak_memory
from lapilli.train.engine.deepspeed_internals import scale_state
from lapilli.train.health.step_guard import StepGuard
from lapilli.train.metrics.step_log import StepLog, Validated
from lapilli.train.metrics.step_metrics import StepMeter
from lapilli.train.run_folder.generations import forget_generations
from lapilli.train.run_folder.messages import note
from lapilli.train.run_folder.names import FOLDER, MILESTONES
from lapilli.train.run_folder.restarts import record_start
from lapilli.train.run_folder.stop_request import is_stop_asked
from lapilli.train.steps.device_copy import send_ahead
from lapilli.train.steps.step_timing import Mark, StepTiming
from lapilli.train.worker.node_cache import cache_line
from lapilli.train.worker.profiling import profiled
from lapilli.train.worker.setup import Setup
from lapilli.train.worker.taken_step import SAVE, STOP, KnownStep, TakenStep, take_step

__all__ = [
    "fit",
]


def fit(ready: Setup, notice: Callable[[], object] = lambda: None) -> None:
    """Step from where the run is to its end, or to where it is asked to stop.

    `notice` tells rank 0 of a node that is to be taken away, None for none: a checkpoint is saved
    for each, and training goes on until the node is gone.

    A step's numbers are read while the next one is computed. Before anything that must not follow a
    wrong step (validation, a checkpoint, the end) its own are read as well.
    """
    run = Path(ready.config.output)
    if ready.places.is_leader:
        for line in tidy(run, ready.start):
            note(run, line)
    if ready.is_writer:
        forget_generations(run, ready.start)
    journal = _open_journal(ready) if ready.is_writer else None
    uploads = _open_uploads(ready)
    guard = StepGuard(
        ready.config, ready.engine.module, ready.device, (ready.rank, ready.world_size), ready.start
    )
    rows = _Rows(ready, guard, journal)
    copied = uploads or contextlib.nullcontext()
    with copied, _closed(journal), checkpoint.Writer() as writer, guard, rows:
        writer.reserve(ready.engine)
        start = asked = Mark(ready.device)
        heads, requests = len(ready.config.model.aux.heads), _Requests(ready, notice)
        for batches in send_ahead(ready.feed.steps(ready.start), ready.device, heads):
            given = Mark(ready.device)
            guard.begin()
            with profiled(ready.config, batches.step, ready.rank, ready.device):
                taken = take_step(ready, batches, asks=requests.next(), busy=guard.busy)
            timing = StepTiming(
                start=start, asked=asked, given=given, end=taken.told.mark,
                forwards=guard.end(batches.step),
            )  # fmt: skip
            asked_by_all = rows.follow(taken, timing)
            start = timing.end
            writer.check()
            if asked_by_all or _is_due(ready, batches.step):
                asked_by_all = max(rows.catch_up(), asked_by_all)
                if journal:
                    journal.keep()
                began = time.monotonic()
                _save(ready, batches.step + 1, writer, uploads, now=asked_by_all > 0)
                if ready.is_writer:
                    waited = time.monotonic() - began
                    put("lapilli_train_checkpoint_seconds", waited, ready.config.output)
                start = Mark(ready.device)
            if asked_by_all == STOP:
                break
            asked = Mark(ready.device)
    if (line := cache_line(ready.feed)) and ready.is_writer:
        note(run, line)


class _Rows:
    """Checks and writes each step while the next one is computed.

    A context: if training ends with an error, the step that was taken before it has its row.
    """

    def __init__(self, ready: Setup, guard: StepGuard, journal: StepLog | None) -> None:
        self._ready = ready
        self._guard = guard
        self._journal = journal
        self._last: tuple[TakenStep, StepTiming] | None = None  # all before it are written

    def __enter__(self) -> _Rows:
        return self

    def follow(self, taken: TakenStep, timing: StepTiming) -> int:
        """Write the step before this one; what was asked of all then. Collective."""
        asked = self.catch_up()
        self._last = taken, timing
        return asked

    def catch_up(self) -> int:
        """Write the last step; what was asked of all then. Collective.

        Raises:
            TrainError: It went wrong.
        """
        last, self._last = self._last, None
        if last is None:
            return 0
        known = last[0].known()
        self._guard.check(last[0].batches, known.result, last[1], known.busy)
        self._write(*last, known, _validate(self._ready, known.result.step))
        return known.asked

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or self._last is None:
            return
        with contextlib.suppress(Exception):  # report the error that ended the training
            known = self._last[0].known()
            if self._guard.why_wrong(known.result) is None:
                self._write(*self._last, known, Validated())

    def _write(
        self, taken: TakenStep, timing: StepTiming, known: KnownStep, validated: Validated
    ) -> None:
        if self._journal:
            self._journal.write(
                taken.batches, known.result, known.losses, validated,
                seconds=timing.seconds, wait_seconds=timing.wait_seconds,
                memory_bytes=peak_memory(self._ready.device),
            )  # fmt: skip


@contextlib.contextmanager
def _closed(journal: StepLog | None) -> Generator[None]:
    """Close the step log; an error of closing does not hide the one that ended the training."""
    if journal is None:
        yield
        return
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            journal.close()
        raise
    journal.close()


def _open_uploads(ready: Setup) -> Uploads | None:
    config = ready.config
    if not config.checkpoint.upload:
        return None
    return Uploads(
        Path(config.output),
        config.checkpoint.upload,
        keep=config.checkpoint.keep_last,
        start=ready.start,
        rank=(ready.rank, ready.world_size),
        places=ready.places,
    )


def _open_journal(ready: Setup) -> StepLog:
    config = ready.config
    start = record_start(Path(config.output), ready.start, ready.world_size)
    if start.reason == "restart":
        note(
            Path(config.output),
            f"the workers were started again; the run resumes from step {start.step} with "
            f"{start.workers} after {start.seconds:.0f} s; {start.repeated} steps are repeated",
        )
    meter = StepMeter(ready.feed, ready.engine.module, ready.device)
    return StepLog(config, ready.start, meter)


def _validate(ready: Setup, step: int) -> Validated:
    """The held-out loss and answers to held-out questions, where they are due. Collective."""
    done = Validated()
    start = time.monotonic()
    if ready.held_out and _is_time(ready, step, ready.config.validation.every):
        found = ready.held_out.loss(ready.engine, ready.device, ready.flush)
        seconds = time.monotonic() - start
        done = replace(done, held_out=found, held_out_seconds=seconds)
    start = time.monotonic()
    if ready.generations and _is_time(ready, step, ready.config.validation.answers_every):
        answers = ready.generations.ask(ready.engine, step)
        done = replace(done, answers=answers, generated_seconds=time.monotonic() - start)
    return done


def _is_due(ready: Setup, step: int) -> bool:
    """Whether something follows a step that must not follow a wrong one."""
    config = ready.config
    return any(
        _is_time(ready, step, every)
        for every in (
            config.checkpoint.every, config.checkpoint.archive_every,
            config.validation.every, config.validation.answers_every,
        )
    )  # fmt: skip


def _is_time(ready: Setup, step: int, every: int) -> bool:
    """Every so many steps (0: never), and after the last."""
    return (bool(every) and (step + 1) % every == 0) or step + 1 == ready.feed.total_steps


class _Requests:
    """What rank 0 asks of all workers with a step, shared with what they tell anyway.

    Args:
        ready: The worker.
        notice: As for `fit`.
    """

    def __init__(self, ready: Setup, notice: Callable[[], object]) -> None:
        self._run, self._asks, self._notice = Path(ready.config.output), ready.is_writer, notice
        self._heeded: object = None  # the last notice that a checkpoint was asked for

    def next(self) -> int:
        """`STOP`, `SAVE` or 0."""
        if not self._asks:
            return 0
        if is_stop_asked(self._run):
            return STOP
        if (now := self._notice()) is None or now == self._heeded:
            return 0
        self._heeded = now
        note(
            self._run,
            "a node is to be taken away: saving a checkpoint; the run goes on from it elsewhere",
        )
        return SAVE


def _save(
    ready: Setup, done: int, writer: checkpoint.Writer, uploads: Uploads | None, *, now: bool
) -> None:
    """Save if a checkpoint is due; it is written while training continues."""
    config = ready.config
    is_last = done == ready.feed.total_steps
    forms = [FOLDER] if now or is_last or done % config.checkpoint.every == 0 else []
    if config.checkpoint.archive_every and done % config.checkpoint.archive_every == 0:
        forms.append(MILESTONES)
    if forms:
        scale = scale_state(ready.engine)
        state = replace(ready.state, loss_scale=scale)
        checkpoint.save(
            ready.engine, Path(config.output), done, state,
            keep=config.checkpoint.keep_last, writer=writer, forms=forms,
            copies=uploads, places=ready.places,
        )  # fmt: skip
