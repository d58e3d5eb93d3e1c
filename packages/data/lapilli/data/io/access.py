"""Turn file system errors into messages: missing, unreadable and full are distinguished.

`Path.exists` and its like raise for a folder that may not be searched up to Python 3.13 and say
"not there" from 3.14 on; `Path.glob` finds nothing in a folder that may not be listed. Where the
answer decides whether something is made anew, replaced or removed, these functions are asked.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeGuard

from lapilli.data.errors import DataError

__all__ = [
    "FULL", "blame", "cannot_read", "exists", "folders_below", "is_denied", "is_file",
    "is_folder", "is_missing", "naming", "require_listable", "require_readable",
    "require_writable", "subpaths",
    "system_error",
]  # fmt: skip

MOST_FOLDERS = 1_000_000
MISSING = (errno.ENOENT, errno.ENOTDIR)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What a name or bytes are to blame for. Any other number may come from a whole file.
WRONG = (errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EEXIST, errno.ENOTEMPTY)
# The machine's or its owner's doing, and neither a wrong name nor a fault of the program.
MACHINE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV,
    errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN, errno.EREMOTEIO,
    errno.EMFILE, errno.ENFILE, errno.EBUSY, errno.ETXTBSY, errno.ENOLCK, errno.EBADMSG,
}  # fmt: skip
TRIED_BYTES = 4096  # the least that a page or a manifest takes
OS_ERROR = re.compile(r"\(os error (\d+)\)")
REMEDIES = {
    errno.EROFS: "it is on a read-only disk; choose another folder",
    errno.EACCES: "ask its owner for permission, or choose another folder",
    errno.EPERM: "ask its owner for permission, or choose another folder",
    **dict.fromkeys(FULL, "free space and run the same command again"),
}


def is_missing(error: OSError) -> bool:
    """Whether an error says that the path does not exist."""
    return isinstance(error, FileNotFoundError) or error.errno in MISSING


def is_denied(error: BaseException) -> TypeGuard[OSError]:
    """Whether an error says that a path is inaccessible: rights, a disk, a server.

    The file may be intact: it is neither missing nor damaged. A library's own OSError for bytes
    that make no sense has no number.
    """
    if not isinstance(error, OSError) or error.errno is None:
        return False
    return error.errno not in (*MISSING, *WRONG, *FULL)


def blame(error: OSError, path: object = None) -> str | None:
    """The message for a system error: path, cause and remedy; None for any other error.

    Args:
        error: What the system raised.
        path: The file it is about, where the error itself does not name one.
    """
    if error.errno not in MACHINE and error.errno not in FULL:
        return None
    remedy = REMEDIES.get(error.errno, "check the disk or its server and run the same again")
    named = error.filename2 or error.filename or path
    cause = _cause(error)
    if isinstance(named, int) or not named:  # a descriptor says nothing to a reader
        return f"{cause}; {remedy}"
    return f"{os.fsdecode(named) if isinstance(named, bytes) else named}: {cause}; {remedy}"


def _cause(error: OSError) -> str:
    """The system's own words: some libraries put a paragraph in their place."""
    return os.strerror(error.errno) if error.errno else str(error) or type(error).__name__


def system_error(error: Exception) -> OSError | None:
    """The system's error that an exception is or tells of: Rust's end with `(os error 28)`."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    found = OS_ERROR.search(str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def cannot_read(path: object, error: OSError) -> str:
    """One line for a file that is there, or may be, and cannot be read."""
    remedy = "nothing was changed; give this user permission to read it, or check the disk"
    return f"{path}: cannot be read ({_cause(error)}); {remedy}"


class AnyPath(Protocol):
    """A `Path`, or a location in a store, which raises its own errors."""

    def exists(self) -> bool: ...

    def is_dir(self) -> bool: ...


def exists(path: AnyPath) -> bool:
    """Whether a path is there.

    Raises:
        DataError: It cannot be determined: a folder above is not searchable, or the disk fails.
    """
    return path.exists() if not isinstance(path, Path) else _mode(path) is not None


def is_folder(path: AnyPath) -> bool:
    """Whether a path is a folder; raises as `exists` does."""
    if not isinstance(path, Path):
        return path.is_dir()
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def is_file(path: Path) -> bool:
    """Whether a path is a plain file; raises as `exists` does."""
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


def _mode(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except ValueError:  # a NUL in it: no file can have this name
        return None
    except OSError as error:
        if not is_denied(error):
            return None
        raise DataError(cannot_read(path, error)) from None


def subpaths(folder: Path, prefix: str = "") -> list[Path]:
    """Paths in a folder whose names have this prefix, sorted; empty if there is no folder.

    Raises:
        DataError: The folder may not be listed, or the disk fails.
    """
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        if is_missing(error):
            return []
        raise DataError(cannot_read(folder, error)) from None
    return [path for path in found if path.name.startswith(prefix)]


def require_readable(path: Path) -> None:
    """Open a file, or every file directly in a folder, before a library reads it.

    Libraries report an unreadable file as missing, or without its name.

    Raises:
        DataError: Names the first that cannot be read, and the cause.
    """
    for file in subpaths(path) if is_folder(path) else [path]:
        try:
            if not file.is_dir():
                file.open("rb").close()
        except OSError as error:
            if not is_missing(error):  # a link to nothing is for the library to tell
                raise DataError(cannot_read(file, error)) from None


def require_listable(folder: Path) -> None:
    """List a folder and all below it, before `rglob` does, which passes over what it may not list.

    Raises:
        DataError: Names the first folder that cannot be listed.
    """
    try:
        for _ in folders_below(folder):
            pass
    except OSError as error:
        raise DataError(cannot_read(error.filename, error)) from None


def folders_below(
    folder: Path, *, links: bool = False, hidden: bool = True, deepest: int | None = None
) -> Iterator[tuple[Path, list[str]]]:
    """A folder and all below it, with the names of their files, however deep they lie.

    Args:
        folder: Where to begin.
        links: Follow links to folders, but not to one that the link lies in.
        hidden: Go into folders whose names begin with a dot.
        deepest: How many folders to go down; None for all.

    Raises:
        OSError: The first folder without access; missing ones are left out.
        DataError: Links make more folders of these than `MOST_FOLDERS`.
    """
    visits = 0
    left = [(folder, 0, frozenset[tuple[int, int]]())]
    while left:
        path, depth, above = left.pop()
        visits += 1
        if visits > MOST_FOLDERS:
            raise DataError(
                f"{folder}: more than {MOST_FOLDERS} folders, links followed; name the files by a "
                "pattern that goes less deep, or take the links out"
            )
        files: list[str] = []
        below: list[str] = []
        try:
            own = path.stat()
            here = (own.st_dev, own.st_ino)
            if here in above:
                continue
            with os.scandir(path) as found:
                for item in found:
                    (below if _is_way(item, links) else files).append(item.name)
        except OSError as error:
            if is_denied(error):
                raise
            continue
        yield path, sorted(files)
        if deepest is None or depth < deepest:
            names = (name for name in below if hidden or not name.startswith("."))
            lines = above | {here} if links else above
            left += [(path / name, depth + 1, lines) for name in sorted(names, reverse=True)]


def _is_way(item: os.DirEntry[str], links: bool) -> bool:
    """Whether an entry is a folder to go into; a dangling link is not one."""
    try:
        return item.is_dir(follow_symlinks=links)
    except OSError:
        return False


def require_writable(setting: str, folder: Path, remedy: str = "") -> None:
    """Write a file into a folder, or its nearest existing parent, and remove it again.

    For a command whose result is written last, so that it fails before the work.

    Args:
        setting: What names the folder.
        folder: Where the result goes.
        remedy: What to do; left out, to choose another.

    Raises:
        DataError: It cannot be written; names setting, folder and cause.
    """
    existing = next((p for p in (folder, *folder.absolute().parents) if exists(p)), folder)
    if not is_folder(existing):
        raise DataError(
            f"{setting}: {existing} is a file; expected a folder; "
            + (remedy or f"choose another --{setting}")
        )
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".try-") as file:
            file.write(b"\0" * TRIED_BYTES)
            file.flush()
    except OSError as error:
        remedy = remedy or f"choose another --{setting}"
        raise DataError(
            f"{setting}: {folder} cannot be written ({_cause(error)}); {remedy}"
        ) from None


@contextmanager
def naming(path: Path) -> Generator[None]:
    """Add this path to system errors that name no file, such as those of `write`.

    So do those of libraries in Rust, which come as bare exceptions (see `system_error`).
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
    except Exception as error:
        if (found := system_error(error)) is None:
            raise
        raise OSError(found.errno, found.strerror, str(path)) from error
