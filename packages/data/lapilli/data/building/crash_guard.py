"""Find images whose decoding kills the process, across restarts of a task.

An attempt at a shard writes down which image it decodes. Where the process dies, Ray starts the
task again somewhere; that attempt finds the row, has it decoded twice in processes of its own, and
leaves the image out if both end as well. A SIGKILL by the system (out of memory) is not blamed on
an image.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import tempfile
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from lapilli.data.building.decode_child import DECODE_SECONDS, try_apart
from lapilli.data.errors import DataError
from lapilli.data.images.view import BadImage
from lapilli.data.io.remote_path import Output
from lapilli.data.planning.shard_task import ImageTask, Task
from lapilli.data.record import Reason

__all__ = [
    "MOST_ATTEMPTS",
    "WORK",
    "CrashGuard",
    "journal_folder",
]

WORK = ".work"  # in the output while a build runs; nothing in it outlives the build
MOST_ATTEMPTS = 10  # at one shard, without an image to blame
DETAILS = {
    "crash": "decoding it ends the process, each of two times in a process of its own",
    "slow": f"decoding it takes more than {DECODE_SECONDS} s, each of two times",
}


def journal_folder(output: Output, name: str) -> Path:
    """Where attempts at a shard leave their notes: beside the output, or in this node's own files.

    For a store each node finds out for itself.
    """
    if isinstance(output, Path):
        folder = output / WORK
    else:
        mark = hashlib.sha256(str(output).encode()).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f"lapilli-{mark}"
    return folder / "journal" / name.replace("/", "_")


class CrashGuard:
    """An attempt at a shard: its own notes, and what those before it have left."""

    def __init__(self, folder: Path, name: str) -> None:
        """Note that there is one attempt more.

        Raises:
            DataError: There were too many, and no image was to blame.
        """
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._earlier = sorted(folder.glob("attempt-*"))
        if len(self._earlier) >= MOST_ATTEMPTS:
            last = _noted(self._earlier[-1])
            raise DataError(
                f"{name}: the process that makes it has ended {MOST_ATTEMPTS} times"
                + ("" if last is None else f", the last time at row {last}")
                + ", and no image is to blame; probably memory is short: lower --num_workers and "
                "run the same command again"
            )
        number = 1 + max((int(path.name[-6:]) for path in self._earlier), default=0)
        path = folder / f"attempt-{number:06d}"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        self._convicted: dict[int, str] = {}
        self._row = 0

    def examine(self, task: Task) -> None:
        """Try the images at which earlier attempts ended."""
        for path in self._earlier:
            row = _noted(path)
            if row is None or not isinstance(task, ImageTask) or row >= len(task.images):
                continue
            if (self._folder / f"fine-{row}").exists():
                continue
            outcome = try_apart(replace(task, images=(task.images[row],)))
            (self._folder / f"{outcome}-{row}").touch()
            if outcome != "fine":  # explained: it does not count as an attempt
                path.unlink(missing_ok=True)
        for outcome, detail in DETAILS.items():
            for path in self._folder.glob(f"{outcome}-*"):
                self._convicted[int(path.name.removeprefix(f"{outcome}-"))] = detail

    def decoding(self, row: int) -> AbstractContextManager[None]:
        """Stand around the decoding of a row: it is noted, and its time is bounded.

        Raises:
            BadImage: On entering, where the row's image has ended processes before.
        """
        self._row = row
        return self

    def __enter__(self) -> None:
        if self._row in self._convicted:
            raise BadImage(Reason.DECODER_CRASHED, self._convicted[self._row])
        os.pwrite(self._file, b"%010d" % self._row, 0)
        # By itself the signal ends the process, in the middle of a decoder written in C too.
        signal.setitimer(signal.ITIMER_REAL, DECODE_SECONDS)

    def __exit__(self, *error: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)

    def close(self) -> None:
        """The shard is finished, or a Python error ended the attempt: no image is suspect."""
        os.close(self._file)
        shutil.rmtree(self._folder, ignore_errors=True)


def _noted(attempt: Path) -> int | None:
    """The row that an attempt decoded last; None if it decoded none."""
    try:
        return int(attempt.read_bytes())
    except (OSError, ValueError):
        return None
