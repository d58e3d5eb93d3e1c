"""One build at a time in one folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Generator
from pathlib import Path

from lapilli.data.errors import DataError
from lapilli.data.output import Output

__all__ = ["LOCK", "only_build"]

LOCK = ".lock"  # in the output while a build writes there: its host and process
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def only_build(output: Output) -> Generator[None]:
    """Hold the output folder for this process; made if it is not there, and removed if left empty.

    The kernel lets go of the lock when its process ends, however it ends, on NFS too. Where a file
    system has no locks, the process named in the file decides. A store needs no lock: two builds of
    one plan put the same bytes, and another plan is refused by `plan.json`.

    Raises:
        DataError: Another build holds the folder, or it cannot be written.
    """
    if not isinstance(output, Path) or (output.exists() and not output.is_dir()):
        yield
        return
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
        descriptor = _take(output / LOCK)
    except OSError as error:
        raise DataError(
            f"output: {output} cannot be written ({error.strerror}); choose another --output"
        ) from None
    try:
        yield
    finally:
        (output / LOCK).unlink(missing_ok=True)
        os.close(descriptor)
        with contextlib.suppress(OSError):  # not empty: there is a dataset
            for folder in made:
                folder.rmdir()


def _take(path: Path) -> int:
    """The open lock file, held and naming this process."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(descriptor, path)
            if _is_same(descriptor, path):
                os.ftruncate(descriptor, 0)
                owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
                os.pwrite(descriptor, owner.encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its build has just ended and removed it


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _held(path, _owner(path)) from None
    except OSError as error:
        owner = _owner(path)
        if error.errno not in NO_LOCKS:
            raise
        if owner is not None and not _is_gone(*owner):
            raise _held(path, owner) from None


def _is_same(descriptor: int, path: Path) -> bool:
    """Whether the file that is open still is the one under its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _owner(path: Path) -> tuple[str, int] | None:
    """Host and process that a lock file names; None where it names none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return str(found["host"]), int(found["pid"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _is_gone(host: str, pid: int) -> bool:
    """Whether a process of this machine has ended; of another machine nobody knows."""
    if host != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return pid == os.getpid()


def _held(path: Path, owner: tuple[str, int] | None) -> DataError:
    who = "another process" if owner is None else f"process {owner[1]} on {owner[0]}"
    return DataError(
        f"output: {path.parent} is being built by {who}; wait for it or choose another --output "
        f"(if that process is gone, remove {path})"
    )
