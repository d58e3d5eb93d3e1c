"""Record every start of a run and what it cost: `starts.jsonl`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lapilli.train.run_folder.jsonl import read_lines, write_lines
from lapilli.train.run_folder.metrics_file import read_metrics
from lapilli.train.run_folder.names import METRICS, RUN_INFO, STARTS

__all__ = [
    "Start",
    "read_starts",
    "record_start",
]


@dataclass(frozen=True)
class Start:
    """One start of a run's steps.

    Attributes:
        step: The first step it takes.
        workers: How many there are.
        reason: `command`, or `restart` where Ray replaced lost workers or changed their number.
        seconds: Until the workers are ready, from the end of the command's checks on, or from the
            last step of the workers before.
        repeated: Steps that were done before and are taken again, since no checkpoint has them.
        repeated_seconds: What they had taken.
    """

    step: int
    workers: int
    reason: Literal["command", "restart"]
    seconds: float
    repeated: int
    repeated_seconds: float


def record_start(run: Path, step: int, workers: int) -> Start:
    """Record a start at a step; call it before the metrics of repeated steps are removed."""
    before = read_starts(run)
    (run / STARTS).touch()
    now = _changed(run / STARTS)  # by the clock of the other files' disk
    told, seen = _changed(run / RUN_INFO), _changed(run / METRICS)
    since = max(told, seen) or now
    undone = [row.seconds for row in read_metrics(run) if row.step >= step]
    start = Start(
        step=step,
        workers=workers,
        reason="restart" if seen > told else "command",
        seconds=max(0.0, now - since),
        repeated=len(undone),
        repeated_seconds=sum(undone),
    )
    write_lines(run / STARTS, map(asdict, (*before, start)))
    return start


def _changed(path: Path) -> float:
    """When a file was last written; 0 where there is none."""
    return path.stat().st_mtime if path.exists() else 0.0


def read_starts(run: Path) -> list[Start]:
    """Read all starts; empty without the file."""
    return read_lines(run / STARTS, Start)
