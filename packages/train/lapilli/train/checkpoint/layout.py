"""Folders of checkpoints: moved into place, pruned, cleaned up.

What is read here is either whole or not there, whenever the process was killed.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from lapilli.data.io.access import exists, subpaths
from lapilli.train.run_folder.messages import note
from lapilli.train.run_folder.names import (
    CUT,
    FOLDER,
    GONE,
    MILESTONES,
    step_name,
)

__all__ = [
    "folder_bytes",
    "forget_old",
    "is_step",
    "outdated",
    "put_in_place",
    "steps_in",
    "tidy",
]


def put_in_place(temporary: Path, path: Path) -> None:
    """Flush a filled folder and rename it; the name is on the disk too when this returns."""
    for file in temporary.rglob("*"):
        _flush(file)
    _flush(temporary)
    _remove(path)
    temporary.rename(path)
    for folder in (path.parent, path.parent.parent):  # that one has a new name when it is the first
        _flush(folder)


def _flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some file systems of networks flush no folders
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a checkpoint; a kill in between leaves none that looks whole or damaged."""
    if exists(path):
        gone = path.with_name(f".{path.name}{GONE}")
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def outdated(names: Iterable[str], step: int, keep: int) -> set[str]:
    """Names of checkpoints to remove: all but the newest `keep` up to `step`.

    A later one is damaged, or the run had not gone back.
    """
    there = {*names}
    current = sorted(name for name in there if name <= step_name(step))
    return there - {*current[-keep:]}


def forget_old(run: Path, step: int, keep: int, *, held: Collection[Path] = ()) -> None:
    """Remove the checkpoints that are `outdated`, but not what is `held`: it is being copied."""
    paths = {path.name: path for path in steps_in(run / FOLDER)}
    for path in {paths[name] for name in outdated(paths, step, keep)} - {*held}:
        try:
            _remove(path)
        except OSError as error:
            note(run, f"{FOLDER}/{path.name}: cannot be removed ({error.strerror}); it takes room")


def tidy(run: Path, step: int) -> list[str]:
    """Remove incomplete folders, and list checkpoints that the run cannot resume from.

    Args:
        run: The run's folder, to which nobody else writes.
        step: The newest whole checkpoint's, or 0.

    Returns:
        One line for each checkpoint that is not what it should be.
    """
    said: list[str] = []
    goes_on = f"the run resumes from step {step}" if step else "the run starts at step 0"
    for folder in (FOLDER, MILESTONES):
        for path in subpaths(run / folder, ".step-"):
            removed = _clear(path)
            if path.name.endswith(CUT):
                name = path.name.removeprefix(".").removesuffix(CUT)
                said.append(f"{folder}/{name}: cut short while it was saved; {removed}, {goes_on}")
    for path in steps_in(run / FOLDER):
        if path.name > step_name(step):
            said.append(
                f"{FOLDER}/{path.name}: damaged, or without optimizer moments; passed over, "
                f"{goes_on} and removes it at the next save"
            )
    milestones = steps_in(run / MILESTONES)
    if milestones and not step:
        said.append(
            f"no checkpoint to go on from, {goes_on}: a milestone has weights and no optimizer "
            f"moments; init_from: {milestones[-1]} starts another run with the newest one's"
        )
    return said


def _clear(path: Path) -> str:
    """Remove an incomplete folder; returns what was done."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        return f"cannot be removed ({error.strerror})"
    return "removed"


def is_step(name: str) -> bool:
    """Whether a folder is called as `step_name` calls it."""
    return re.fullmatch(r"step-\d{8,18}", name, re.ASCII) is not None


def steps_in(folder: Path) -> list[Path]:
    """The folders of steps, first ones first, whole or not; none where there is no such folder.

    Raises:
        DataError: The folder may not be listed: what is in it is not known.
    """
    return [path for path in subpaths(folder, "step-") if is_step(path.name)]


def folder_bytes(folder: Path) -> int:
    """Bytes of the files below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
