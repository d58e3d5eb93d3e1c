"""Train a model on a dataset.

lapilli train --config RECIPE --dataset DIR --output DIR
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from lapilli.data.cluster.places import check_places, places_of
from lapilli.data.cluster.probe import JobPlaces
from lapilli.data.errors import DataError
from lapilli.data.io.filesystems import is_remote
from lapilli.data.io.printable import bytes_text
from lapilli.data.ray_session import ray_session
from lapilli.train.checkpoint.store import store_records, stored_beside
from lapilli.train.config import RunConfig
from lapilli.train.driver.launching import copy_rest, launch, only_trainer
from lapilli.train.driver.preflight import Preflight, finished_steps, preflight
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.metrics_file import StepMetrics, read_metrics
from lapilli.train.run_folder.scratch import in_scratch, lies_in_store
from pipelines.cli.command import (
    console,
    parse,
    progress_bar,
    run,
    say,
)
from pipelines.cli.progress import QUIET, each_while, waiting_line
from pipelines.cli.terminal import print_table
from pipelines.reports.run_report import write_run_report
from pipelines.reports.ticks import duration_text

__all__ = ["follow", "live_fields", "log_line", "print_preflight", "train"]

RECENT = 20  # steps the live line's figures are of
STOPPING = "saving a checkpoint, then exiting; press Ctrl-C again to exit now"


def train(config: RunConfig) -> list[StepMetrics]:
    """Check everything, then run to the end; returns every step's metrics."""
    if steps := finished_steps(config):
        for line in copy_rest(config, steps) if config.checkpoint.upload else ():
            say(line)
        say(f"{config.output}: already finished at step {steps}; nothing to do")
        return read_metrics(Path(in_scratch(config).output))
    # Ray is started after the lock is taken: a second command fails at once.
    session = ray_session() if config.launcher == "ray" else contextlib.nullcontext()
    with only_trainer(config), session:
        check_places(run_places(config), config.train, config.output)
        ready = preflight(config, say)
        print_preflight(config, ready)
        try:
            metrics = read_metrics(Path(ready.config.output)) if ready.is_done else follow(ready)
        except BaseException:
            with contextlib.suppress(Exception):  # report why the run ended
                _print_report(ready.config)
            raise
        _print_report(ready.config)
    if metrics:  # none where a finished run has lost them
        last = metrics[-1]
        say(f"loss {metrics[0].loss:.4f} at step 1, {last.loss:.4f} at step {last.done}")
    return metrics


def run_places(config: RunConfig) -> JobPlaces:
    """What every node that trains must see as this one does."""
    model, held_out = config.model, config.validation.dataset
    manifests = [
        name if is_remote(name) else str(Path(name) / "manifest.json")
        for name in (config.dataset, held_out)
        if name
    ]
    read = {
        "dataset": manifests,
        "init_from": config.init_from,
        "model.vision.pretrained": model.vision.pretrained,
        "model.language.pretrained": model.language.pretrained,
    }
    written = {"output": config.output, "checkpoint.upload": config.checkpoint.upload}
    return places_of(read, written)


def _print_report(config: RunConfig) -> None:
    """Write the run's report, of a stopped run too; a failure here does not fail the run."""
    try:
        is_stored = lies_in_store(config)
        stored = stored_beside(config.checkpoint.upload) if is_stored else ()
        path = write_run_report(Path(config.output), stored=stored)
        if is_stored:
            store_records(Path(config.output), config.checkpoint.upload)
            say(f"report: {config.checkpoint.upload}/{path.name}")
        else:
            say(f"report: {path}")
    except (DataError, TrainError, OSError) as error:
        say(f"report: none; {error}")


def follow(ready: Preflight) -> list[StepMetrics]:
    """Run with one live line: step, total, time to go, then `live_fields`."""
    started = spoken = time.monotonic()
    done = 0
    recent: deque[StepMetrics] = deque(maxlen=RECENT)
    with progress_bar(fields=True) as bar:
        task = bar.add_task(
            "steps", total=ready.total_steps, completed=ready.start, fields=["starting the workers"]
        )

        def show(row: StepMetrics, total: int) -> None:
            nonlocal done, spoken
            done += row.samples
            recent.append(row)
            fields = live_fields(recent)
            bar.update(task, completed=row.done, total=total, fields=fields)
            if not console.is_terminal and time.monotonic() - spoken > QUIET:
                spoken = time.monotonic()
                say(log_line(row.done, total, recent, fields))

        def tell() -> None:
            if not done:
                say(waiting_line("the first step", time.monotonic() - started))

        with each_while(QUIET, tell):
            metrics = launch(ready, show, lambda: say(STOPPING), say)
    if done:
        seconds = time.monotonic() - started
        say(f"{done} samples in {seconds:.0f} s, starting and ending the workers included")
    return metrics


def log_line(done: int, total: int, recent: Sequence[StepMetrics], fields: Sequence[str]) -> str:
    """The live line where there is no terminal.

    Args:
        done: Steps done.
        total: All steps.
        recent: The last steps, for the time to go.
        fields: Of `live_fields`.
    """
    left = (total - done) * sum(row.seconds for row in recent) / len(recent)
    return f"  step {done:,} of {total:,}, ETA {duration_text(left)}, {', '.join(fields)}"


def live_fields(recent: Sequence[StepMetrics]) -> list[str]:
    """Figures of the last steps, the most important first."""
    seconds = sum(row.seconds for row in recent)
    rate = sum(row.samples for row in recent) / seconds
    wait = sum(row.wait_seconds for row in recent) / seconds
    tokens = sum(row.tokens or 0 for row in recent) / seconds
    mfus = [row.mfu * row.seconds for row in recent if row.mfu is not None]
    found = [f"loss {recent[-1].loss:.4f}", f"{rate:.3g} samples/s"]
    found += [f"MFU {sum(mfus) / seconds:.1%}"] if mfus else []
    found += [f"wait {wait:.0%}", f"{tokens:,.0f} tokens/s"]
    return [*found, bytes_text(recent[-1].memory_bytes or 0)]


def print_preflight(config: RunConfig, ready: Preflight) -> None:
    """Print parts, memory, batch sizes and time before the start."""
    print_table(_parts_table(ready))
    config = ready.config  # its micro-batch may have followed
    say(
        f"{config.batch_note} on {ready.device}, "
        f"ZeRO-{config.zero_stage}, {config.precision}, {ready.attention.name} attention"
    )
    say(ready.memory_policy.note)
    if ready.attention.note:
        say(ready.attention.note)
    if ready.kernels:
        say(ready.kernels.note)
    if host := sum(memory.host for memory in ready.memory.values()):
        say(f"offload: {bytes_text(host)} a worker are in the host's memory")
    if disk := sum(memory.disk for memory in ready.memory.values()):
        say(f"offload: {bytes_text(disk)} a worker lie in {config.offload.nvme_path}")
    left_out = (
        f", {ready.too_long} longer than {config.max_length} left out" if ready.too_long else ""
    )
    cut = f", {ready.num_cut} cut at {config.max_length} tokens" if ready.num_cut else ""
    samples = f"{ready.samples:,} samples{cut}{left_out}"
    say(f"{samples} x {config.epochs} epochs: {ready.total_steps:,} steps")
    if config.init_from:
        say(f"starts from the weights of {config.init_from}")
    if ready.is_done:
        say(f"already finished at step {ready.start}: nothing to do")
        return
    if ready.start:
        say(f"resumes from step {ready.start}: the steps before it are reused")
    if ready.step_seconds is not None:
        seconds = ready.step_seconds * (ready.total_steps - ready.start)
        say(
            f"at least {duration_text(seconds)}: forward and backward of a step take "
            f"{ready.step_seconds:.2f} s on one core here, and each worker has one"
        )


def _parts_table(ready: Preflight) -> Table:
    """Parts of the model with what learns and what a worker holds for it."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("part")
    table.add_column("state")
    for name in ("parameters", "trained", "weights", "gradients", "optimizer"):
        table.add_column(name, justify="right")
    for part, (total, trained) in ready.parameters.items():
        memory = ready.memory[part]
        sizes = (memory.weights, memory.gradients, memory.optimizer)
        state = "trained" if trained == total else "in part" if trained else "frozen"
        table.add_row(part, state, f"{total:,}", f"{trained:,}", *map(bytes_text, sizes))
    held = sum(memory.total for memory in ready.memory.values())
    table.caption = f"{bytes_text(held)} a worker, activations not counted"
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    config = parse(
        RunConfig, argv, "Train a vision-language model on a dataset.",
        addresses=["dataset", "output", "init_from", "pretrained"],
    )  # fmt: skip
    train(config)
    say(f"run: {config.output}")
    return 0


if __name__ == "__main__":
    run(main)
