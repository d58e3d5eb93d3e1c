"""Folders of checkpoints: moved into place and pruned.

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
from lapilli.train.run_folder.names import FOLDER, GONE, step_name

__all__ = [
    "folder_bytes",
    "forget_old",
    "is_step",
    "outdated",
    "put_in_place",
    "steps_in",
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
