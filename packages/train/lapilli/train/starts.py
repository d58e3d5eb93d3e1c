"""Every start of a run's steps, and what it cost: `starts.jsonl`."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lapilli.train.folders import FACTS
from lapilli.train.metrics import METRICS, read_metrics

__all__ = ["STARTS", "Start", "read_starts", "record_start"]

STARTS = "starts.jsonl"


@dataclass(frozen=True)
class Start:
    """One start of a run's steps.

    Attributes:
        step: The first step it takes.
        workers: How many there are.
        reason: `command`, or `loss` where workers were lost and replaced.
        seconds: Until the workers are ready, from the command's checks on, or from the last sign
            of those that were lost.
        again: Steps that were done before and are taken again, since no checkpoint has them.
        again_seconds: What they had taken.
    """

    step: int
    workers: int
    reason: Literal["command", "loss"]
    seconds: float
    again: int
    again_seconds: float


def record_start(run: Path, step: int, workers: int) -> Start:
    """Write down that a run starts now with a step; called before its metrics are cut there."""
    told, seen = _changed(run / FACTS), _changed(run / METRICS)
    undone = [row["seconds"] for row in read_metrics(run) if row["step"] >= step]
    now = time.time()
    since = max(told, seen) or now
    start = Start(
        step, workers, "loss" if seen > told else "command",
        max(0.0, now - since), len(undone), sum(undone),
    )  # fmt: skip
    with (run / STARTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(start)) + "\n")
    return start


def _changed(path: Path) -> float:
    """When a file was last written; 0 where there is none."""
    return path.stat().st_mtime if path.exists() else 0.0


def read_starts(run: Path) -> list[Start]:
    """All whole lines so far; one cut short by a kill is left out."""
    try:
        data = (run / STARTS).read_bytes()
    except FileNotFoundError:
        return []
    whole = data[: data.rfind(b"\n") + 1]
    return [Start(**json.loads(line)) for line in whole.splitlines()]
