"""What every measurement shares: where it ran, clocks that take turns, one row in a CSV.

Two things are compared only within one run, by turns, so that a machine that slows down slows
both.
"""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipelines.command import UsageError

__all__ = ["RESULTS", "Elapsed", "add_row", "clock", "peak_memory", "pin_to_one_core", "provenance"]

T = TypeVar("T")

RESULTS = Path(__file__).parent / "results"


def provenance(packages: Sequence[str], topic: str, argv: Sequence[str]) -> dict[str, Any]:
    """Date, hardware, versions, commit and command: the first columns of every row."""
    command = f"python -m pipelines.benchmarks {topic} {shlex.join(argv)}".rstrip()
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "commit": _commit(),
        "command": command,
    }


def add_row(topic: str, row: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Append a row to `results/TOPIC.csv`, which gets a header when it is new.

    Raises:
        UsageError: The file has other columns: one file holds one kind of row.
    """
    path = folder / f"{topic}.csv"
    is_new = not path.exists()
    if not is_new:
        with path.open(newline="", encoding="utf-8") as file:
            columns = next(csv.reader(file), [])
        if columns != list(row):
            raise UsageError(
                f"{path} has columns {columns}, this run has {list(row)}; move the file away"
            )
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)
    return path


@dataclass(frozen=True)
class Elapsed:
    """Seconds of the clock on the wall, and seconds a processor worked for this process."""

    wall: float
    cpu: float


def clock(work: Callable[[], T]) -> tuple[Elapsed, T]:
    """Call `work` and time it.

    What a single thread took is best told by `cpu`: another process on its core stretches `wall`.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return Elapsed(time.perf_counter() - wall, time.process_time() - cpu), result


def pin_to_one_core() -> int:
    """Keep this process and its threads on one core, the last it may use; says which.

    A platform that cannot pin gives -1.
    """
    if not hasattr(os, "sched_setaffinity"):
        return -1
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return core


def peak_memory() -> int:
    """Most bytes of memory this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _processor() -> str:
    """The processor's name as Linux tells it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """The checkout's commit, with `+` behind it where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
        changed = subprocess.check_output([*git, "status", "--porcelain", "-uno"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + "+" * bool(changed.strip())
