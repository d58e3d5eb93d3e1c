"""Upload checkpoints to an object store during training.

The store holds what the run's folder does: `checkpoints/step-.../`, `milestones/step-.../`,
`config.json`, `data/` and the files of `RECORDS`. Every worker copies the part that it wrote; rank
0 copies the rest and, when all parts are there, the records, and then a step's `state.json`. That
is also removed first, so that a step is whole there, with the records of how it came about, or has
none. Traces and kept steps are copied by who wrote them, behind the checkpoints.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from pathlib import Path

from lapilli.data.errors import DataError
from lapilli.data.io.remote_path import RemotePath
from lapilli.data.record import excerpt
from lapilli.train.checkpoint.layout import forget_old, outdated, steps_in
from lapilli.train.checkpoint.parts import part_number
from lapilli.train.checkpoint.places import Places
from lapilli.train.checkpoint.store import bytes_at, listed
from lapilli.train.run_folder.checkpoint_state import read_state
from lapilli.train.run_folder.messages import note
from lapilli.train.run_folder.names import (
    CONFIG,
    FOLDER,
    MILESTONES,
    PROFILE,
    RECORDS,
    REPLAY,
    STATE,
    step_name,
)

__all__ = ["Uploads"]

POLL = 1.0  # seconds between two looks for other workers' parts
RETRY = 60.0  # seconds until an upload that failed is tried again; a new checkpoint is at once
LAST_TRIES = 3  # of what is not there yet when the run ends, each with `RemotePath`'s own


class Uploads:
    """Copies saved folders to a store, one after the other behind the training.

    A context: its end waits until all is there. A checkpoint that is not there when the next one is
    saved is left out. One that fails is said once and tried again; it never ends the run.

    Args:
        run: The run's folder.
        address: Where its copies go.
        keep: Newest checkpoints kept there.
        start: Step the run resumes from: what an earlier start did not copy is copied now.
        rank: This worker, and how many there are. Each copies its parts; rank 0 the rest, too.
        places: Who sees the same folder; None where all workers do.
    """

    def __init__(
        self,
        run: Path,
        address: str,
        *,
        keep: int,
        start: int,
        rank: tuple[int, int] = (0, 1),
        places: Places | None = None,
    ) -> None:
        self._run, self._address, self._keep = run, address, keep
        self._rank, self._workers = rank
        self._leads = (places or Places(self._rank)).is_leader
        self._old = self._beside()  # by workers before, of which there may have been more
        self._stored = dict[Path, tuple[int, int]]()
        self._changed = threading.Condition()
        self._pending: list[Path] = []
        self._current: Path | None = None
        self._retry_at = 0.0
        self._tries_left: int | None = None  # until the run ends, any number
        self._said = False
        for path in steps_in(run / MILESTONES) if self._rank == 0 else ():
            self.offer(path)
        if start:
            self.offer(run / FOLDER / step_name(start))
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)

    def offer(self, path: Path) -> None:
        """A folder is whole; copy it, and no checkpoint before it."""
        with self._changed:
            if path.parent.name == FOLDER:
                self._pending = [p for p in self._pending if p.parent.name != FOLDER]
            self._pending.append(path)
            self._retry_at = 0.0
            self._changed.notify()

    def held(self) -> set[Path]:
        """Folders that are still to be copied or being copied."""
        with self._changed:
            return {*self._pending} | ({self._current} if self._current else set())

    def __enter__(self) -> Uploads:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        with self._changed:
            waiting = self._held_names()
            self._tries_left = LAST_TRIES if raised[0] is None else 1
            self._retry_at = 0.0
            self._changed.notify()
        if waiting and self._rank == 0:
            note(self._run, f"waiting for copies to {self._address}: {', '.join(waiting)}")
        self._thread.join()
        if self._rank:
            return  # rank 0 tells of what is not there
        for path in self._pending:
            note(
                self._run,
                f"{path.parent.name}/{path.name} is not at {self._address}; it is whole in "
                f"{path.parent}; the same command copies it",
            )
        with contextlib.suppress(DataError) if raised[0] else contextlib.nullcontext():
            steps = [path.name for path in steps_in(self._run / FOLDER)]
            if steps:  # what was held here while it was copied
                forget_old(self._run, int(steps[-1].partition("-")[2]), self._keep)

    def _held_names(self) -> list[str]:
        """What is still to be copied, to be read by a person; called with the lock held."""
        paths = [*([self._current] if self._current else []), *self._pending]
        return [f"{path.parent.name}/{path.name}" for path in paths]

    def _work(self) -> None:
        with contextlib.suppress(Exception):  # a start is known there before its first checkpoint
            self._copy_records()
        while path := self._next():
            error: Exception | None = None
            try:
                self._copy(path)
            except Exception as failed:
                error = failed
            self._end(path, error)
            self._copy_beside()
        self._copy_beside()

    def _next(self) -> Path | None:
        """The folder to copy now, after waiting for one; None at the end of the run."""
        with self._changed:
            while True:
                wait = self._retry_at - time.monotonic()
                if self._tries_left is not None and (not self._pending or not self._tries_left):
                    return None
                if self._pending and wait <= 0:
                    self._current = self._pending.pop(0)
                    return self._current
                self._changed.wait(wait if self._pending else None)

    def _end(self, path: Path, error: Exception | None) -> None:
        with self._changed:
            self._current = None
            if error is None:
                self._said = False
                return
            if isinstance(error, FileNotFoundError) and not path.is_dir():  # nobody has it any more
                if self._rank == 0:
                    note(self._run, f"{path}: removed before it was at {self._address}")
                return
            is_newest = not any(p.parent == path.parent for p in self._pending)
            if is_newest or path.parent.name == MILESTONES:
                self._pending.insert(0, path)
            self._retry_at = time.monotonic() + (RETRY if self._tries_left is None else 0.0)
            if self._tries_left is not None:
                self._tries_left -= 1
            if not self._said:
                self._said = True
                note(
                    self._run,
                    f"checkpoint.upload: {path.parent.name}/{path.name} cannot be stored "
                    f"({excerpt(str(error), 300)}); it is tried again, training continues",
                )

    def _copy(self, path: Path) -> None:
        target = RemotePath(self._address) / path.parent.name / path.name
        state = (path / STATE).read_bytes()
        if bytes_at(target / STATE) != state:
            if self._rank == 0:
                (target / STATE).unlink(missing_ok=True)
            for file in sorted(path.rglob("*")):
                if file.is_file() and file.name != STATE and self._copies(file.name):
                    _put(file, target / file.relative_to(path).as_posix())
            if self._rank == 0:
                self._wait_for_parts(path, target)
                self._copy_records()
                _put(path / STATE, target / STATE)
        if self._rank == 0 and path.parent.name == FOLDER:
            _prune(self._address, path.name, self._keep)

    def _copy_records(self) -> None:
        for name in (CONFIG, *RECORDS) if self._rank == 0 else ():
            if (self._run / name).exists():
                (RemotePath(self._address) / name).put(self._run / name)

    def _beside(self) -> dict[Path, tuple[int, int]]:
        """What lies beside the checkpoints here, with size and time: traces and kept steps."""
        found = (one for name in (PROFILE, REPLAY) for one in (self._run / name).rglob("*"))
        stats = {path: path.stat() for path in found if path.is_file()}
        return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}

    def _copy_beside(self) -> None:
        """Store what this worker wrote beside checkpoints, and the leader what was there before."""
        mine = {
            path: stamp for path, stamp in self._beside().items()
            if self._stored.get(path) != stamp
            and (self._leads if self._old.get(path) == stamp else _writer(path) == self._rank)
        }  # fmt: skip
        try:
            sizes = {
                name: (RemotePath(self._address) / name).sizes()
                for name in {path.relative_to(self._run).parts[0] for path in mine}
            }
            for path, stamp in sorted(mine.items()):
                kind, _, name = path.relative_to(self._run).as_posix().partition("/")
                if self._old.get(path) != stamp or sizes[kind].get(name) != stamp[0]:
                    _put(path, RemotePath(self._address) / kind / name)
                self._stored[path] = stamp
        except Exception as error:  # the next checkpoint tries again
            note(
                self._run,
                f"checkpoint.upload: {PROFILE} and {REPLAY} of rank {self._rank} cannot be stored "
                f"({excerpt(str(error), 300)}); they are in {self._run} on its machine",
            )

    def _copies(self, name: str) -> bool:
        """Whether a file of a step is this worker's to copy; of an earlier world each has some."""
        writer = part_number(name)
        return self._rank == (0 if writer is None else writer % self._workers)

    def _wait_for_parts(self, path: Path, target: RemotePath) -> None:
        """Until the other workers' parts are at the store, whole.

        Raises:
            OSError: One is not there after `RETRY` seconds, or when the next checkpoint is whole.
        """
        give_up = time.monotonic() + RETRY
        files = read_state(path).files
        missing = [name for name in sorted(files) if not self._copies(name)]
        while missing := [name for name in missing if (target / name).size != files[name].bytes]:
            if time.monotonic() > give_up or self._is_overtaken(path):
                raise OSError(f"{missing[0]} is not there yet, which another worker copies")
            time.sleep(POLL)

    def _is_overtaken(self, path: Path) -> bool:
        with self._changed:
            return any(one.parent == path.parent for one in self._pending)


def _writer(path: Path) -> int:
    """The rank that wrote a trace or a part of a kept step; rank 0 the rest."""
    found = re.search(r"rank-(\d+)\.", path.name)
    return int(found[1]) if found else 0


def _put(file: Path, target: RemotePath) -> None:
    target.put(file)
    if (size := target.size) != file.stat().st_size:
        raise OSError(f"{target}: {size} bytes arrived of {file.stat().st_size}")


def _prune(address: str, newest: str, keep: int) -> None:
    """Remove what is cut short and all but the newest `keep`.

    A later step without `state.json` is not cut short: a worker that is ahead puts its part there.
    """
    found = listed(address)
    whole = {step for step, files in found.items() if STATE in files}
    cut = {step for step in found.keys() - whole if step <= newest}
    gone = cut | outdated(whole, int(newest.partition("-")[2]), keep)
    for step in sorted(gone):
        for path in sorted(found[step].values(), key=lambda path: path.name != STATE):
            path.unlink(missing_ok=True)
