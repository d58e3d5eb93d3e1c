"""Upload checkpoints to an object store during training, and fetch them from there.

The store holds what the run's folder does: `checkpoints/step-.../`, `milestones/step-.../`,
`config.json`, `data/` and the files of `RECORDS`. Every worker copies the part that it wrote; rank
0 copies the rest and, when all parts are there, a step's `state.json`. That is also removed first,
so that a step is whole there or has none.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lapilli.data.errors import DataError
from lapilli.data.io.access import FULL
from lapilli.data.io.atomic import sha256_file
from lapilli.data.io.remote_path import COPY_BYTES, RemotePath
from lapilli.data.io.typed_json import JsonError, as_type, from_json, is_file_path
from lapilli.data.record import excerpt
from lapilli.train.checkpoint.layout import forget_old, is_step, outdated, put_in_place, steps_in
from lapilli.train.checkpoint.parts import part_number
from lapilli.train.config import RunConfig
from lapilli.train.errors import TrainError
from lapilli.train.renamed import RUN_NAMES
from lapilli.train.run_folder.checkpoint_state import read_state
from lapilli.train.run_folder.dataset_files import run_data_files
from lapilli.train.run_folder.messages import note
from lapilli.train.run_folder.names import (
    CONFIG,
    CUT,
    DATA,
    FOLDER,
    GENERATIONS,
    METRICS,
    MILESTONES,
    STARTS,
    STATE,
    step_name,
)

__all__ = ["Uploads", "fetch_newest", "store_config", "stored_config"]

RECORDS = (METRICS, STARTS, GENERATIONS)
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
    """

    def __init__(
        self, run: Path, address: str, *, keep: int, start: int, rank: tuple[int, int] = (0, 1)
    ) -> None:
        self._run, self._address, self._keep = run, address, keep
        self._rank, self._workers = rank
        self._changed = threading.Condition()
        self._pending: list[Path] = []
        self._current: Path | None = None
        self._retry_at = 0.0
        self._tries_left: int | None = None  # until the run ends, any number
        self._said = False
        self._data_stored = False
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
        while path := self._next():
            error: Exception | None = None
            try:
                self._copy(path)
            except Exception as failed:
                error = failed
            self._end(path, error)

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
        if _bytes_at(target / STATE) != state:
            if self._rank == 0:
                (target / STATE).unlink(missing_ok=True)
            for file in sorted(path.rglob("*")):
                if file.is_file() and file.name != STATE and self._copies(file):
                    _put(file, target / file.relative_to(path).as_posix())
            if self._rank == 0:
                self._wait_for_parts(path, target)
                _put(path / STATE, target / STATE)
        if self._rank:
            return
        if not self._data_stored:
            for name in run_data_files(self._run):
                _put(self._run / name, RemotePath(self._address) / name)
            self._data_stored = True
        for name in (CONFIG, *RECORDS):
            if (self._run / name).exists():
                (RemotePath(self._address) / name).put(self._run / name)
        if path.parent.name == FOLDER:
            _prune(self._address, path.name, self._keep)

    def _copies(self, file: Path) -> bool:
        """Whether a file of a step is this worker's to copy; of an earlier world each has some."""
        writer = part_number(file.name)
        return self._rank == (0 if writer is None else writer % self._workers)

    def _wait_for_parts(self, path: Path, target: RemotePath) -> None:
        """Until the other workers' parts are at the store, whole.

        Raises:
            OSError: One is not there after `RETRY` seconds, or when the next checkpoint is whole.
        """
        give_up = time.monotonic() + RETRY
        missing = [file for file in sorted(path.iterdir()) if not self._copies(file)]
        while missing := [f for f in missing if (target / f.name).size != f.stat().st_size]:
            if time.monotonic() > give_up or self._is_overtaken(path):
                raise OSError(f"{missing[0].name} is not there yet, which another worker copies")
            time.sleep(POLL)

    def _is_overtaken(self, path: Path) -> bool:
        with self._changed:
            return any(one.parent == path.parent for one in self._pending)


def _put(file: Path, target: RemotePath) -> None:
    target.put(file)
    if (size := target.size) != file.stat().st_size:
        raise OSError(f"{target}: {size} bytes arrived of {file.stat().st_size}")


def _bytes_at(path: RemotePath) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _listed(address: str) -> dict[str, dict[str, RemotePath]]:
    """The objects of each checkpoint at an address, by step and by name."""
    folder = RemotePath(address) / FOLDER
    found: dict[str, dict[str, RemotePath]] = {}
    for path in folder.files():
        step, *names = path.relative_to(folder).parts
        if is_step(step) and len(names) == 1:
            found.setdefault(step, {})[names[0]] = path
    return found


def _prune(address: str, newest: str, keep: int) -> None:
    """Remove what is cut short and all but the newest `keep`."""
    found = _listed(address)
    whole = {step for step, files in found.items() if STATE in files}
    gone = (found.keys() - whole) | outdated(whole, int(newest.partition("-")[2]), keep)
    for step in sorted(gone):
        for path in sorted(found[step].values(), key=lambda path: path.name != STATE):
            path.unlink(missing_ok=True)


def stored_config(address: str) -> RunConfig | None:
    """The settings of the run whose copies are at an address; None where there is no run.

    Raises:
        DataError: The address cannot be read.
        TrainError: What is there is no run's.
    """
    data = _bytes_at(RemotePath(address) / CONFIG)
    if data is None:
        return None
    try:
        found = from_json(data, dict[str, Any])
        config = as_type(RUN_NAMES.with_new_names(found), RunConfig)
    except JsonError as error:
        raise TrainError(
            f"checkpoint.upload: {address}/{CONFIG} is not a run's ({error}); choose another "
            "address"
        ) from None
    if RUN_NAMES.found_in(found):
        raise TrainError(
            f"checkpoint.upload: the run at {address} was made by an earlier version and cannot be "
            "resumed; choose another address"
        )
    return config


def store_config(run: Path, address: str) -> None:
    """Upload the settings; fails before the first step if the store cannot be written.

    Raises:
        DataError: The address cannot be written.
    """
    (RemotePath(address) / CONFIG).put(run / CONFIG)


def fetch_newest(
    run: Path, address: str, step: int, on_note: Callable[[str], None] = lambda line: None
) -> int:
    """Download the newest whole checkpoint if it is newer than the local one.

    Args:
        run: The run's folder.
        address: Where its copies are.
        step: The newest whole checkpoint here, or 0.
        on_note: Called with a line for what was fetched, and for each that is damaged there.

    Returns:
        The step of the newest whole checkpoint here now.

    Raises:
        DataError: The address cannot be read.
        TrainError: The disk is full.
    """
    found = _listed(address)
    for name in sorted(found, reverse=True):
        if name <= step_name(step):
            break
        path = run / FOLDER / name
        if STATE in found[name] and _fetch(RemotePath(address) / FOLDER / name, path):
            for record in RECORDS:  # they go at least to this step
                with contextlib.suppress(FileNotFoundError):
                    _download(RemotePath(address) / record, run / f".{record}{CUT}")
                    (run / f".{record}{CUT}").replace(run / record)
            _fetch_data(run, address)
            on_note(f"{address}: fetched {FOLDER}/{name}")
            return int(name.partition("-")[2])
        on_note(f"{address}: {FOLDER}/{name} is cut short or damaged there; passed over")
    return step


def _fetch_data(run: Path, address: str) -> None:
    """Download the run's `data` if it is missing here."""
    source, temporary = RemotePath(address) / DATA, run / f".{DATA}{CUT}"
    if (run / DATA).exists():
        return
    shutil.rmtree(temporary, ignore_errors=True)
    for path in source.files():
        name = str(path.relative_to(source))
        if not is_file_path(name):  # a store's keys are any text
            raise TrainError(
                f"checkpoint.upload: {excerpt(str(path))} leads out of the run; remove it there"
            )
        target = temporary / name
        target.parent.mkdir(parents=True, exist_ok=True)
        _download(path, target)
    if temporary.exists():
        temporary.rename(run / DATA)


def _fetch(source: RemotePath, path: Path) -> bool:
    """Download a checkpoint; False if it is not what its `state.json` says."""
    temporary = path.with_name(f".{path.name}{CUT}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        state = source / STATE
        _download(state, temporary / STATE)
        for name, file in read_state(temporary).files.items():
            _download(source / name, temporary / name)
            if sha256_file(temporary / name) != file.sha256:
                return False
        put_in_place(temporary, path)
        return True
    except (FileNotFoundError, JsonError, KeyError):
        return False
    except OSError as error:
        remedy = "free space" if error.errno in FULL else "see to the folder's rights and its disk"
        raise TrainError(
            f"{path}: cannot be fetched from {source} ({error}); {remedy} and run the same again"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _download(source: RemotePath, path: Path) -> None:
    def copy(remote: Any) -> None:
        with path.open("wb") as file:
            shutil.copyfileobj(remote, file, COPY_BYTES)

    source.read_with(copy)
