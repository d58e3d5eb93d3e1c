"""End a step that hangs, after every rank has written its stacks.

Python's own watchdog writes the stacks: it needs no interpreter lock, so a rank that is stuck in a
kernel or in a collective is seen too.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from lapilli.train.health.torch_internals import collective_records
from lapilli.train.run_folder.messages import note
from lapilli.train.run_folder.names import STACKS

__all__ = ["HangWatch", "collectives_text", "hang_line", "stack_path", "where"]

GRACE = 3.0  # seconds between the stacks and the end: no rank ends before all have written
EXIT_CODE = 17
FRAME = re.compile(r'File "(?P<path>[^"]+)", line (?P<line>\d+) in (?P<name>\S+)')
NOT_OURS = ("site-packages", "/lib/python", "<frozen")
TRAINING = "lapilli/train/worker/loop.py"  # a frame of the thread that trains


class HangWatch:
    """Ends this process when a step takes longer than `seconds`. A context; `beat` at every step.

    Args:
        run: The run's folder; gets `stacks/rank-N.txt`, and `stacks/collectives-N.json` with what
            torch's flight recorder has.
        rank: This worker.
        seconds: Longest step, the wait for its data included; 0 watches nothing.
        is_driver: Whether this process is also the one that a person has started.
    """

    def __init__(self, run: Path, rank: int, seconds: float, *, is_driver: bool = False) -> None:
        self._run = run
        self._rank = rank
        self._seconds = seconds
        self._is_driver = is_driver
        self._started = time.time()
        self._step = 0
        self._deadline = float("inf")
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> HangWatch:
        if self._seconds > 0:
            path = stack_path(self._run, self._rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
            self._thread = threading.Thread(target=self._wait, name="hang", daemon=True)
            self._thread.start()
        return self

    def beat(self, step: int) -> None:
        """A step begins."""
        self._step = step
        if self._thread is not None:
            faulthandler.dump_traceback_later(self._seconds, file=self._file)
            self._deadline = time.monotonic() + self._seconds

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread is None:
            return
        self._stop.set()
        faulthandler.cancel_dump_traceback_later()
        with suppress(OSError):  # an empty file is no reason to fail
            is_empty = self._file.tell() == 0
            self._file.close()
            if is_empty:
                stack_path(self._run, self._rank).unlink(missing_ok=True)

    def _wait(self) -> None:
        while not self._stop.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() > self._deadline + GRACE / 3:
                break
        else:
            return
        path = stack_path(self._run, self._rank)
        place = where(path.read_text(encoding="utf-8"))
        recorded: list[str] = []
        # a recorder that is stuck as well must not keep this process alive
        asking = threading.Thread(target=self._record, args=(recorded,), daemon=True)
        asking.start()
        asking.join(GRACE / 3)
        last = recorded[0] if recorded else "torch's flight recorder does not answer"
        note(
            self._run,
            f"step {self._step + 1} has taken more than {self._seconds:g} s: rank {self._rank} is "
            f"at {place} ({STACKS}/{path.name}); last collectives: {last}",
        )
        time.sleep(GRACE / 3)
        if self._is_driver:
            sys.stderr.write(f"error: {hang_line(self._run, self._started)}\n")
        os._exit(EXIT_CODE)  # a thread that is stuck can be ended in no other way

    def _record(self, recorded: list[str]) -> None:
        """Write down this rank's collectives; the last ones as a text."""
        found = collective_records()
        recorded.append(collectives_text(found))
        if found:
            path = self._run / STACKS / f"collectives-{self._rank}.json"
            path.write_text(json.dumps(found), encoding="utf-8")


def collectives_text(records: Sequence[Mapping[str, Any]], count: int = 3) -> str:
    """The last collectives of a rank, the newest last: name, shapes, how far they came.

    Args:
        records: What `collective_records` gives.
        count: How many are told.
    """
    told = [
        f"{record.get('profiling_name', '?').rpartition(':')[2]} "
        f"{record.get('input_sizes', [])} {record.get('state', '')}".rstrip()
        for record in records[-count:]
    ]
    return ", ".join(told) or "none recorded"


def stack_path(run: Path, rank: int) -> Path:
    """Where a rank writes its stacks."""
    return run / STACKS / f"rank-{rank}.txt"


def where(dump: str) -> str:
    """The place in the training thread's stack that is nearest to what it does.

    Args:
        dump: What faulthandler wrote, most recent call first, thread after thread; of several
            dumps the last one counts.

    Returns:
        `file:line in function`: the innermost frame that is no library's.
    """
    newest = dump.rpartition("Timeout (")[2]
    threads = re.split(r"^(?:Current thread|Thread) ", newest, flags=re.MULTILINE)
    training = next((text for text in threads if TRAINING in text), newest)
    frames = list(FRAME.finditer(training))
    ours = [f for f in frames if not any(part in f["path"] for part in NOT_OURS)]
    if not (ours or frames):
        return "an unknown place"
    frame = (ours or frames)[0]
    return f"{'/'.join(Path(frame['path']).parts[-2:])}:{frame['line']} in {frame['name']}"


def hang_line(run: Path, since: float) -> str | None:
    """One line that says where every rank was, if a rank has hung since a time; else None.

    Args:
        run: The run's folder.
        since: Seconds since the epoch.
    """
    paths = sorted((run / STACKS).glob("rank-*.txt"))
    new = [path for path in paths if path.stat().st_size and path.stat().st_mtime >= since]
    if not new:
        return None
    places = "; ".join(f"{p.stem.replace('-', ' ')} at {where(p.read_text())}" for p in new)
    return (
        f"a step took longer than recovery.step_timeout: {places}; all stacks are in "
        f"{run / STACKS}; the same command resumes from the last checkpoint, a larger "
        "recovery.step_timeout waits longer"
    )
