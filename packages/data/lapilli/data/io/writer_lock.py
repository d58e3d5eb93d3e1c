"""Lock a dataset, run or export so that one process writes it at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Generator
from contextlib import nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, TypedDict

from lapilli.data.errors import DataError
from lapilli.data.io.access import exists, is_folder
from lapilli.data.io.lease import LEASE, leased
from lapilli.data.io.remote_path import Output, RemotePath
from lapilli.data.io.typed_json import JsonError, from_json
from lapilli.data.io.whole_file import read_whole
from lapilli.data.record import excerpt

__all__ = ["LOCK", "only_writer"]

LOCK = LEASE  # in a folder while a process writes there; holds host and process
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
# What the callers of this thread hold: a command's lock is also that of the steps it consists of.
_HELD: ContextVar[frozenset[Output]] = ContextVar("held", default=frozenset())


@contextlib.contextmanager
def only_writer(
    output: Output, doing: str, *, beside: bool = False, setting: str = "output"
) -> Generator[None]:
    """Hold an output for this process, from before the first write to the end.

    The kernel releases the lock when the process ends in any way, on NFS too. Where a file system
    has no locks, the process named in the file decides. Readers are not blocked. A prefix of a
    store is held by a lease (`lapilli.data.io.lease`).

    Args:
        output: A folder, made if it is not there, and removed if left empty; or with `beside` a
            file, or a folder that must be empty or absent until all is written.
        doing: What is done to it, for the line: `built`, `trained`, `written`.
        beside: Whether the lock lies beside the output, as `.NAME.lock`, and not in it.
        setting: What names a prefix of a store, for the line.

    Raises:
        DataError: Another process holds it (names host and process), or it cannot be written.
    """
    held = _HELD.get()
    if not isinstance(output, Path):
        with nullcontext() if output in held else _holding(output, doing, setting):
            yield
        return
    if not beside and exists(output) and not is_folder(output):
        yield
        return
    real = Path(os.path.realpath(output))  # `resolve` raises for links in a circle
    path = real.with_name(f".{real.name}{LOCK}") if beside else real / LOCK
    if path in held:
        yield
        return
    made = [folder for folder in path.parents if not exists(folder)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _take(path, output, doing)
    except OSError as error:
        _remove_empty(made)
        raise DataError(
            f"output: {output} cannot be written ({error.strerror}); choose another --output"
        ) from None
    token = _HELD.set(held | {path})
    try:
        yield
    finally:
        _HELD.reset(token)
        with contextlib.suppress(OSError):  # a read-only disk by now: the file locks nothing
            path.unlink(missing_ok=True)
        os.close(descriptor)
        _remove_empty(made)


@contextlib.contextmanager
def _holding(prefix: RemotePath, doing: str, setting: str) -> Generator[None]:
    with leased(prefix, doing, setting):
        token = _HELD.set(_HELD.get() | {prefix})
        try:
            yield
        finally:
            _HELD.reset(token)


def _remove_empty(made: list[Path]) -> None:
    with contextlib.suppress(OSError):  # not empty: something was written
        for folder in made:
            folder.rmdir()


def _take(path: Path, output: Path, doing: str) -> int:
    """The open lock file, held and naming this process."""
    while True:
        descriptor, is_ours = _open(path)
        try:
            _lock(descriptor, path, output, doing)
            if _is_same(descriptor, path):
                if is_ours:
                    _sign(descriptor, path)
                    return descriptor
                path.unlink()  # of another user's process that has ended; make one of our own
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its writer has just ended and removed it


def _open(path: Path) -> tuple[int, bool]:
    """A descriptor of the lock file, made if need be, and whether it can be written."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666), True
    except PermissionError:
        if not exists(path):
            raise
        return os.open(path, os.O_RDONLY), False


def _sign(descriptor: int, path: Path) -> None:
    """Write host and process; a disk too full for that has no room for the output either."""
    owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, owner.encode(), 0)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _lock(descriptor: int, path: Path, output: Path, doing: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _held(path, _owner(path), output, doing) from None
    except OSError as error:
        owner = _owner(path)
        # EBADF: over NFS a file that is open for reading alone cannot be locked
        if error.errno not in (*NO_LOCKS, errno.EBADF):
            raise
        if owner is not None and not _is_gone(*owner):
            raise _held(path, owner, output, doing) from None


def _is_same(descriptor: int, path: Path) -> bool:
    """Whether the file that is open still is the one under its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _owner(path: Path) -> tuple[str, int] | None:
    """Host and process that a lock file names; None where it names none or has just gone."""
    try:
        found = from_json(read_whole(path), _Owner)
    except (FileNotFoundError, JsonError):
        return None
    return excerpt(found["host"]), found["pid"]


class _Owner(TypedDict):
    host: str
    pid: Annotated[int, lambda value: "" if 0 < value < 2**31 else "a process's number"]


def _is_gone(host: str, pid: int) -> bool:
    """Whether a process of this machine has ended; False for one of another machine."""
    if host != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return pid == os.getpid()


def _held(path: Path, owner: tuple[str, int] | None, output: Path, doing: str) -> DataError:
    who = "another process" if owner is None else f"process {owner[1]} on {owner[0]}"
    return DataError(
        f"output: {output} is being {doing} by {who}; wait for it or choose another --output "
        f"(if that process is gone, remove {path})"
    )
