"""A dataset to a trained model.

python -m pipelines.train --config RECIPE.yaml --dataset DIR --output DIR
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import TextColumn

from lapilli.data.cluster import ray_session
from lapilli.train.config import RunConfig
from lapilli.train.launch import Preflight, launch, preflight
from lapilli.train.metrics import read_metrics
from pipelines.command import parse, progress_bar, run, say


def train(config: RunConfig) -> list[dict[str, Any]]:
    """Check everything, then run to the end; returns every step's metrics."""
    with ray_session():
        ready = preflight(config)
        tell_preflight(config, ready)
        metrics = read_metrics(Path(ready.config.output)) if ready.is_done else follow(ready)
    last = metrics[-1]
    say(f"loss {metrics[0]['loss']:.4f} at step 0, {last['loss']:.4f} at step {last['step']}")
    return metrics


def follow(ready: Preflight) -> list[dict[str, Any]]:
    """Run with one live line: step, loss, samples a second, time to go."""
    started, done = time.monotonic(), 0
    with progress_bar(TextColumn("{task.fields[line]}")) as bar:
        task = bar.add_task(
            "steps", total=ready.total_steps, completed=ready.start, line="starting"
        )

        def show(row: dict[str, Any], total: int) -> None:
            nonlocal done
            done += row["samples"]
            rate = row["samples"] / row["seconds"]
            line = f"loss {row['loss']:.4f}  {rate:.0f} samples/s"
            bar.update(task, completed=row["step"] + 1, total=total, line=line)

        metrics = launch(ready, show)
    if done:
        seconds = time.monotonic() - started
        say(f"{done} samples in {seconds:.0f} s, starting and ending the workers included")
    return metrics


def tell_preflight(config: RunConfig, ready: Preflight) -> None:
    """What is about to be done."""
    for part, (total, trained) in ready.parameters.items():
        state = "trained" if trained == total else f"{trained} trained" if trained else "frozen"
        say(f"  {part:<10} {total:>12,} parameters, {state}")
    say(
        f"global batch {config.global_batch} = {config.workers} workers x micro-batch "
        f"{config.micro_batch} x accumulation {config.accumulation} on {ready.device}, "
        f"ZeRO-{config.zero_stage}, {config.precision}"
    )
    left_out = (
        f", {ready.too_long} longer than {config.max_length} left out" if ready.too_long else ""
    )
    say(f"{ready.samples} samples{left_out}, {ready.total_steps} steps")
    if ready.is_done:
        say(f"finished already, at step {ready.start}: nothing to do")
    elif ready.start:
        say(f"going on from step {ready.start}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    config = parse(RunConfig, argv, "Train a vision-language model on a dataset.")
    train(config)
    say(f"run: {config.output}")
    return 0


if __name__ == "__main__":
    run(main)
