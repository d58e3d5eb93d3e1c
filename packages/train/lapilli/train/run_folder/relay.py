"""Bring what workers write into the run's folder of their node to the driver's, through Ray.

Where they share the folder nothing has to be brought. Else an actor beside the driver, `Mailbox`,
writes the same files there, and tells whether the run was asked to stop. A first worker that starts
on another node than the one before goes on with the records that the driver has.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lapilli.data.io.whole_file import read_whole
from lapilli.data.io.writer_lock import LOCK
from lapilli.train.run_folder.messages import notes_end
from lapilli.train.run_folder.names import (
    CONFIG,
    CUT,
    METRICS,
    MISTAKE,
    NOTES,
    REPORT,
    RUN_INFO,
    STACKS,
    STOP,
)
from lapilli.train.run_folder.restarts import keep_later, read_records
from lapilli.train.run_folder.stop_request import is_stop_asked

__all__ = ["Mailbox", "Relay"]

DRIVERS = {CONFIG, LOCK, MISTAKE, REPORT, RUN_INFO, STOP}  # files that workers do not bring
EVERY = 0.5  # seconds


class Mailbox:
    """The driver's end, an actor on its node.

    Args:
        run: The run's folder there.
    """

    def __init__(self, run: str) -> None:
        self._run = Path(run)

    def sees(self, name: str) -> bool:
        """Whether a file is in the driver's folder."""
        return (self._run / name).exists()

    def put(self, name: str, start: int, data: bytes) -> None:
        """Write a file's bytes from `start` on, and none behind them."""
        path = self._run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("r+b" if start else "wb") as file:
            file.seek(start)
            file.write(data)
            file.truncate()

    def append(self, name: str, data: bytes) -> None:
        """Add to a file that workers of several nodes write."""
        with (self._run / name).open("ab") as file:
            file.write(data)

    def records(self) -> dict[str, bytes]:
        """The run's records, as the workers before have brought them."""
        return read_records(self._run)

    def started(self) -> tuple[bytes, dict[str, float]]:
        """The run's info, and how many seconds ago it and the last step were written."""
        now, paths = time.time(), (self._run / RUN_INFO, self._run / METRICS)
        ages = {path.name: now - path.stat().st_mtime for path in paths if path.exists()}
        return read_whole(self._run / RUN_INFO), ages

    def asks_stop(self) -> bool:
        """Whether the run is to save and end."""
        return is_stop_asked(self._run)

    def mistake(self) -> str | None:
        """What a worker said that stopped for a user's mistake."""
        path = self._run / MISTAKE
        return path.read_text(encoding="utf-8") if path.exists() else None


class Relay:
    """A worker's end: a thread that brings what changes, twice a second; its end brings the rest.

    Args:
        run: The run's folder on this node, at the start of the worker.
        call: Calls a method of the mailbox by name, and waits.
        is_first: Whether it is the worker that writes the run's records.
    """

    def __init__(self, run: Path, call: Callable[..., Any], *, is_first: bool = False) -> None:
        self._run, self._call, self._is_first = run, call, is_first
        self._noted = notes_end(run)
        self._brought = dict[str, tuple[int, int]]()  # inode and size, by name
        # of an earlier life, in which another worker may have been the first: not brought
        self._old = {path: _stamp(path.stat()) for path in self._files()}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="relay", daemon=True)

    def is_needed(self) -> bool:
        """Whether the driver's folder is another one than this node's."""
        mark = f".place-{uuid.uuid4().hex}"
        (self._run / mark).touch()
        try:
            return not self._call("sees", mark)
        finally:
            (self._run / mark).unlink()

    def __enter__(self) -> Relay:
        if self._is_first:
            self._take()
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # the driver may be gone
            self._bring()

    def _take(self) -> None:
        """Go on with the driver's records if they are later, and with its times in any case."""
        if keep_later(self._run, found := self._call("records")):
            for name, data in found.items():
                self._brought[name] = (self._run / name).stat().st_ino, len(data)
        info, ages = self._call("started")
        (self._run / RUN_INFO).write_bytes(info)
        for name, age in ages.items():
            if (path := self._run / name).exists():
                then = time.time() - age
                os.utime(path, (then, then))

    def _work(self) -> None:
        while not self._stop.wait(EVERY):
            try:
                self._bring()
                if self._call("asks_stop"):
                    (self._run / STOP).touch()
            except Exception:  # a driver that is busy or gone; the next look tries again
                continue

    def _bring(self) -> None:
        for path in self._files():
            name = path.relative_to(self._run).as_posix()
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                found = os.fstat(file.fileno())
                if self._old.get(path) == _stamp(found):
                    continue
                inode, sent = self._brought.get(name, (0, 0))
                start = sent if inode == found.st_ino and found.st_size >= sent else 0
                if inode == found.st_ino and found.st_size == sent:
                    continue
                file.seek(start)
                data = file.read()
                self._call("put", name, start, data)
                self._brought[name] = found.st_ino, start + len(data)
        with contextlib.suppress(FileNotFoundError), (self._run / NOTES).open("rb") as file:
            file.seek(self._noted)
            lines = file.read()
            whole = lines[: lines.rfind(b"\n") + 1]
            if whole:
                self._call("append", NOTES, whole)
                self._noted += len(whole)

    def _files(self) -> Iterator[Path]:
        for folder in (self._run, self._run / STACKS):
            with contextlib.suppress(OSError):
                for path in sorted(folder.iterdir()):
                    is_theirs = path.name in DRIVERS or path.name.startswith(".")
                    if is_theirs or path.suffix == CUT or path.name == NOTES:
                        continue
                    if path.is_file():
                        yield path


def _stamp(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_ino, found.st_size, found.st_mtime_ns
