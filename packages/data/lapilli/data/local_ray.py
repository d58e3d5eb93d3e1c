"""Start a local Ray bound to loopback, with a private token and temporary folder.

Ray itself listens on all interfaces, writes its token with the umask's rights and opens its folder
to everybody, so that several users can share one Ray.
"""

from __future__ import annotations

import os
import resource
import secrets
import stat
import tempfile
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from lapilli.data.errors import DataError
from lapilli.data.io.access import blame
from lapilli.data.ray_internals import on_loopback

__all__ = ["FOLDER", "LEAST_FILES", "local_ray", "require_open_files"]

# torch's process groups connect over the same interface.
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
FOLDER = f"ray-{os.getuid()}/r"  # the first is closed; Ray opens the second to everybody
LEAST_FILES = 1024
SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED = 1 << 30  # bytes


@contextmanager
def local_ray() -> Generator[Path]:
    """What a local Ray needs, before it starts and while it runs.

    Yields:
        The folder for `_temp_dir`.

    Raises:
        DataError: Too few open files are allowed, or the token or the folder is not this user's.
    """
    require_open_files()
    folder = _own_folder()
    _warn_of_little_memory(folder)
    _own_token()
    added = {name: value for name, value in LOOPBACK.items() if name not in os.environ}
    os.environ.update(added)
    try:
        with on_loopback():
            yield folder
    finally:
        for name in added:
            os.environ.pop(name, None)


def require_open_files() -> None:
    """Look whether enough files may be open at once.

    Raises:
        DataError: They may not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= LEAST_FILES:
        return
    raise DataError(
        f"open files: the limit is {soft}, Ray needs {LEAST_FILES}; run ulimit -n {LEAST_FILES} "
        "before" + ("" if hard == resource.RLIM_INFINITY or hard >= LEAST_FILES else " as root")
    )


def _warn_of_little_memory(folder: Path) -> None:
    """Say where Ray keeps its objects if there is no room for them in shared memory."""
    try:
        found = os.statvfs(SHARED_MEMORY)
        free = found.f_bavail * found.f_frsize
    except OSError:
        free = 0
    if free < LEAST_SHARED:
        warnings.warn(
            f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB free, Ray needs {LEAST_SHARED >> 20} MiB "
            f"and more; its objects go to the disk of {folder.parent}, which is slow: free "
            "space, or start the container with --shm-size=2g",
            stacklevel=2,
        )


def _own_folder() -> Path:
    """The folder of this user's Rays, closed to everybody else."""
    base = next(filter(None, map(os.environ.get, ("RAY_TMPDIR", "TMPDIR"))), "") or "/tmp"
    folder = Path(base) / FOLDER
    _close(folder.parent, is_folder=True)
    return folder


def _own_token() -> None:
    """The token that Ray would write, but closed, unless the environment names another."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    path = Path.home() / ".ray" / "auth_token"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # whole from the start, under a name of its own, so that two starts write one token
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".auth_token")
        try:
            os.write(descriptor, secrets.token_hex(32).encode())
            os.close(descriptor)
            os.link(name, path)
        except FileExistsError:
            pass
        finally:
            Path(name).unlink()
    except OSError as error:
        raise DataError(f"Ray cannot start: {blame(error, path) or error}") from None
    _close(path, is_folder=False)


def _close(path: Path, *, is_folder: bool) -> None:
    """Take all rights from others, after looking that it is this user's and no link."""
    try:
        if is_folder:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
        kind = stat.S_ISDIR if is_folder else stat.S_ISREG
        if found.st_uid != os.getuid() or not kind(found.st_mode):
            what = "folder" if is_folder else "file"
            raise DataError(
                f"Ray cannot start: {path} is no {what} of this user's; remove it, or set "
                f"{'RAY_TMPDIR' if is_folder else 'RAY_AUTH_TOKEN_PATH'} to another"
            )
        if found.st_mode & 0o077:
            path.chmod(found.st_mode & 0o700)
    except OSError as error:
        raise DataError(f"Ray cannot start: {blame(error, path) or error}") from None
