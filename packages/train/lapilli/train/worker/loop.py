"""The training loop of a worker: step, log, validate, save."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lapilli.model.parts.trainable import GROUPS
from lapilli.train.checkpoint import save_load as checkpoint
from lapilli.train.checkpoint.layout import tidy
from lapilli.train.checkpoint.upload import Uploads
from lapilli.train.device import peak_memory
from lapilli.train.engine import deepspeed_engine as engine
from lapilli.train.engine.deepspeed_internals import loss_scale, scale_state
from lapilli.train.health.step_guard import StepGuard
from lapilli.train.metrics.batch_digest import lanes_text, sample_lanes
from lapilli.train.metrics.step_log import Journal, Validated
from lapilli.train.metrics.step_metrics import StepMeter, slot_losses
from lapilli.train.run_folder.dataset_files import data_facts
from lapilli.train.run_folder.messages import note
from lapilli.train.run_folder.metrics_file import StepResult
from lapilli.train.run_folder.names import FOLDER, MILESTONES
from lapilli.train.run_folder.restarts import record_start
from lapilli.train.run_folder.stop_request import is_stop_asked
from lapilli.train.steps.device_copy import SentStep, send_ahead
from lapilli.train.steps.optim import learning_rate
from lapilli.train.steps.step import seed_step, train_step
from lapilli.train.validation.sample_generations import forget_generations
from lapilli.train.worker.setup import Setup

__all__ = [
    "data_facts",
    "fit",
    "one_step",
]  # fmt: skip


def fit(ready: Setup) -> None:
    """Step from where the run is to its end, or to where it is asked to stop."""
    if ready.is_writer:
        run = Path(ready.config.output)
        for line in tidy(run, ready.start):
            note(run, line)
        forget_generations(run, ready.start)
    journal = _open_journal(ready) if ready.is_writer else None
    uploads = _open_uploads(ready)
    clock = time.monotonic()
    guard = StepGuard(
        ready.config, ready.engine.module, ready.device, (ready.rank, ready.world_size), ready.start
    )
    closed = _closed(journal) if journal else contextlib.nullcontext()
    copied = uploads or contextlib.nullcontext()
    with copied, closed, checkpoint.Writer() as writer, guard:
        for batches in send_ahead(ready.feed.steps(ready.start), ready.device):
            waited = time.monotonic() - clock
            guard.begin(waited)
            result, stops, losses = one_step(ready, batches, wants_stop=_wants_stop(ready))
            guard.check(batches, result.loss, result.grad_norm)
            guard.end(batches.step)
            validated = _validate(ready, batches.step)
            seconds = time.monotonic() - clock - validated.seconds
            if journal:
                journal.write(
                    batches, result, losses, validated,
                    seconds=seconds, wait_seconds=waited, memory_bytes=peak_memory(ready.device),
                )  # fmt: skip
            writer.check()
            _save(ready, batches.step + 1, writer, uploads, now=stops)
            if stops:
                break
            clock = time.monotonic()


@contextlib.contextmanager
def _closed(journal: Journal) -> Generator[None]:
    """Close a journal at the end; what ended the training is what is told."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            journal.close()
        raise
    journal.close()


def _open_uploads(ready: Setup) -> Uploads | None:
    config = ready.config
    if not config.checkpoint.upload or not ready.is_writer:
        return None
    return Uploads(
        Path(config.output),
        config.checkpoint.upload,
        keep=config.checkpoint.keep_last,
        start=ready.start,
    )


def _open_journal(ready: Setup) -> Journal:
    config = ready.config
    start = record_start(Path(config.output), ready.start, ready.world_size)
    if start.reason == "restart":
        note(
            Path(config.output),
            f"the workers were started again; the run goes on from step {start.step} with "
            f"{start.workers} after {start.seconds:.0f} s; {start.repeated} steps are repeated",
        )
    meter = StepMeter(ready.feed, ready.engine.module, ready.device)
    return Journal(config, ready.start, meter)


def _validate(ready: Setup, step: int) -> Validated:
    """The held-out loss and answers to held-out questions, where they are due. Collective."""
    done = Validated()
    start = time.monotonic()
    if ready.held_out and _is_due(ready, step, ready.config.validation.every):
        loss = ready.held_out.loss(ready.engine, ready.device)
        done = replace(done, held_out_loss=loss, held_out_seconds=time.monotonic() - start)
    start = time.monotonic()
    if ready.generations and _is_due(ready, step, ready.config.validation.answers_every):
        answers = ready.generations.ask(ready.engine, step)
        done = replace(done, answers=answers, generated_seconds=time.monotonic() - start)
    return done


def _is_due(ready: Setup, step: int, every: int) -> bool:
    """Every so many steps, and after the last."""
    return (step + 1) % every == 0 or step + 1 == ready.feed.total_steps


def _wants_stop(ready: Setup) -> bool:
    return ready.is_writer and is_stop_asked(Path(ready.config.output))


def _save(
    ready: Setup, done: int, writer: checkpoint.Writer, uploads: Uploads | None, *, now: bool
) -> None:
    """Save where it is time to; the disk works while training goes on."""
    config = ready.config
    is_last = done == ready.feed.total_steps
    forms = [FOLDER] if now or is_last or done % config.checkpoint.every == 0 else []
    if config.checkpoint.archive_every and done % config.checkpoint.archive_every == 0:
        forms.append(MILESTONES)
    if forms:
        scale = scale_state(ready.engine)
        state = {**ready.state, "loss_scale": scale} if scale else ready.state
        checkpoint.save(
            ready.engine, Path(config.output), done, state,
            keep=config.checkpoint.keep_last, is_writer=ready.is_writer, writer=writer, forms=forms,
            copies=uploads,
        )  # fmt: skip


def one_step(
    ready: Setup, batches: SentStep, *, wants_stop: bool
) -> tuple[StepResult, bool, list[float]]:
    """Take one optimizer step.

    Returns:
        What it computed; whether any rank stops; every sample's summed loss by its place
        in the global batch.
    """
    rate = learning_rate(
        ready.config.optim, batches.step, ready.feed.total_steps,
        starts_at_zero=ready.config.sampler == "llava",
    )  # fmt: skip
    engine.set_learning_rate(ready.engine, rate)
    total, squares, scale, overflows = _take(ready, batches)
    taken = sample_lanes(batch.sample_ids for batch in batches.batches)
    losses = slot_losses(batches.slots, batches.on_device, ready.config.global_batch_size)
    told = torch.cat([total[None], total.new_tensor([float(wants_stop), *taken]), squares, losses])
    if ready.world_size > 1:
        dist.all_reduce(told)
    summed, stops, *rest = told.tolist()  # the step's one wait for the device
    lanes, rest = rest[: len(taken)], rest[len(taken) :]
    squared, by_slot = rest[: len(squares)], rest[len(squares) :]
    loss = summed / max(1, batches.global_tokens)
    norm = _norm(ready.engine, squared)
    result = StepResult(
        step=batches.step,
        loss=loss,
        lr=rate,
        grad_norm=norm,
        grad_norm_by_part=_by_part(ready.engine, squared),
        samples=batches.global_samples,
        trained_tokens=batches.global_tokens,
        batch=lanes_text(lanes),
        loss_scale=scale,
        overflows=overflows,
    )
    return result, stops > 0, by_slot


def _take(ready: Setup, batches: SentStep) -> tuple[Tensor, Tensor, float | None, int | None]:
    """The step itself: this rank's summed loss and its share of the gradient by part.

    For fp16 also the loss scale, and how often it was lowered for this step.

    Where fp16 overflows, DeepSpeed updates nothing and lowers the scale, on all ranks alike. The
    same samples are then taken again, so that none is lost, until there is nothing to lower.
    """
    squares: list[Tensor] = []
    overflows = 0
    while True:
        seed_step(ready.config.seed, batches.step, ready.rank)
        scale = loss_scale(ready.engine)
        total = train_step(
            ready.engine,
            batches.on_device,
            global_tokens=batches.global_tokens,
            world_size=ready.world_size,
            before_update=lambda: squares.append(engine.part_squares(ready.engine)),
        )
        if loss_scale(ready.engine) >= scale:
            break
        overflows += 1
    if ready.config.precision != "fp16":
        return total, squares[-1], None, None
    if overflows and ready.is_writer:
        note(
            Path(ready.config.output),
            f"step {batches.step}: its gradient overflowed fp16; taken again with the loss scale "
            f"lowered {overflows} times, to {scale:g}; no sample is lost",
        )
    return total, squares[-1], scale, overflows


def _by_part(built: Any, squares: list[float]) -> dict[str, float]:
    """The gradient's norm before clipping for each part that learns."""
    learning = {group["part"] for group in built.optimizer.param_groups}
    return {
        part: math.sqrt(square) if square >= 0 else math.nan
        for part, square in zip(GROUPS, squares, strict=True)
        if part in learning
    }


def _norm(built: Any, squares: list[float]) -> float:
    """The whole gradient's norm before clipping; DeepSpeed has none at ZeRO stage 0."""
    norm = built.get_global_grad_norm()
    if norm is not None:
        return float(norm)
    whole = sum(squares)
    return math.sqrt(whole) if whole >= 0 else math.nan
