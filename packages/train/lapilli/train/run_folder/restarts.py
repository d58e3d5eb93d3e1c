"""Record every start of a run and what it cost: `starts.jsonl`.

A start is recorded before its first step, so the records of a run, wherever a copy of them lies,
tell which copy is the later one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lapilli.data.io.whole_file import MOST_LINES, read_whole
from lapilli.train.run_folder.jsonl import read_lines, write_lines
from lapilli.train.run_folder.metrics_file import read_metrics
from lapilli.train.run_folder.names import CUT, METRICS, RECORDS, RUN_INFO, STARTS

__all__ = [
    "Start",
    "keep_later",
    "read_records",
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


def read_records(run: Path) -> dict[str, bytes]:
    """The run's records that are there, by name."""
    there = [name for name in RECORDS if (run / name).exists()]
    return {name: read_whole(run / name, MOST_LINES) for name in there}


def keep_later(run: Path, other: Mapping[str, bytes]) -> bool:
    """Replace a run's records by another copy of them if that is the later one.

    Args:
        run: The run's folder.
        other: The other copy: bytes by name.

    Returns:
        Whether they were replaced.
    """
    if _lateness(other) <= _lateness(read_records(run)):
        return False
    for name in RECORDS:
        if name in other:
            temporary = run / f".{name}{CUT}"
            temporary.write_bytes(other[name])
            temporary.replace(run / name)
    return True


def _lateness(records: Mapping[str, bytes]) -> tuple[int, int]:
    """Starts, then metrics of the last one: both only grow."""
    return records.get(STARTS, b"").count(b"\n"), len(records.get(METRICS, b""))
