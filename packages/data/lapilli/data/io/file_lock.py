"""Lock a file among the processes of a machine; the kernel gives it back when its holder dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Generator
from pathlib import Path

from lapilli.data.errors import DataError
from lapilli.data.io.access import exists

__all__ = ["file_lock"]


@contextlib.contextmanager
def file_lock(path: Path, *, wait: bool = True) -> Generator[None]:
    """Hold a file's lock until the block ends; its folder is made.

    Args:
        path: The lock's file, of a cache.
        wait: For another holder.

    Raises:
        DataError: Its folder cannot be written.
        BlockingIOError: Somebody holds it, without `wait`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _open(path)
    except OSError as error:
        raise DataError(
            f"cache: {path.parent} cannot be written ({error.strerror}); choose another folder"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:  # another user's: holding it takes no right to write
        if not exists(path):
            raise
        return os.open(path, os.O_RDONLY)
