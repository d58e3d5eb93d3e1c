"""Decode one image in a child process to see whether it crashes or hangs."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Literal, TypeAlias

from lapilli.data.building.image_shard import image_columns
from lapilli.data.planning.shard_task import ImageTask

__all__ = ["DECODE_SECONDS", "try_apart"]


DECODE_SECONDS = 300  # for one image; the largest that is allowed takes some 10 s


KILLED = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}  # from outside


BEGUN, DONE = b"begun\n", b"done\n"


Outcome: TypeAlias = Literal["fine", "crash", "slow"]


def try_apart(task: ImageTask) -> Outcome:
    """Make a shard of one image in a process of its own, twice if that does not end well."""
    outcomes = [_try_once(task)]
    if outcomes[0] != "fine":
        outcomes.append(_try_once(task))
    return "fine" if "fine" in outcomes else "slow" if set(outcomes) == {"slow"} else "crash"


def _try_once(task: ImageTask) -> Outcome:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "lapilli.data.building.decode_child"]
    try:
        done = subprocess.run(
            command, input=pickle.dumps(task), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=environment, check=False, timeout=2 * DECODE_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "fine"  # decoding has a limit of its own; it was something else
    if BEGUN not in done.stdout or DONE in done.stdout or -done.returncode in KILLED:
        return "fine"
    return "slow" if -done.returncode == signal.SIGALRM else "crash"


@contextlib.contextmanager
def _told(row: int) -> Generator[None]:
    """Report on stdout when decoding begins and ends, or a Python error."""
    del row
    os.write(1, BEGUN)
    signal.setitimer(signal.ITIMER_REAL, DECODE_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(1, DONE)


def _main() -> None:
    """The process of a suspect: a task comes through stdin."""
    with contextlib.suppress(OSError):  # where memory is short, this process goes first
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")
    image_columns(pickle.load(sys.stdin.buffer), _told)


if __name__ == "__main__":
    _main()
