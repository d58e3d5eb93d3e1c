"""Make room in a node's cache of shards: what its readers need last is removed first.

Each reader that knows its batches announces in `.readers` of the cache how many of them it is until
it needs each shard. An announcement ends with the lock of its reader, so that of a killed process
counts for nothing. Shards that nobody has announced go first, the one read longest ago before the
others.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from lapilli.data.dataset.shard_plan import NEVER, removal_order
from lapilli.data.io.atomic import TEMPORARY
from lapilli.data.io.file_lock import file_lock
from lapilli.data.io.whole_file import read_whole

__all__ = [
    "Announcement", "announced", "cache_lock", "cached_bytes", "lock_path", "make_room",
]  # fmt: skip

READERS, NAMES, USES = ".readers", ".names", ".uses"


def lock_path(path: Path) -> Path:
    """The lock of a cached file."""
    return path.with_name(f".{path.name}.lock")


def cache_lock(cache: Path) -> contextlib.AbstractContextManager[None]:
    """Hold the cache's own lock, under which room is made and announcements begin."""
    return file_lock(cache / ".lock")


class Announcement:
    """What one reader needs next, told to all processes that use the cache. A context.

    Args:
        cache: The cache's folder.
        names: Paths of the shards in it.
    """

    def __init__(self, cache: Path, names: Sequence[str]) -> None:
        self._cache, self._names = cache, names
        self._path = cache / READERS / f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Announcement:
        with cache_lock(self._cache):  # whoever looks for ended readers holds it, too
            path = self._path.with_suffix(NAMES)
            self._held.enter_context(file_lock(path))
            path.write_text("\n".join(self._names), encoding="utf-8")
        return self

    def put(self, uses: NDArray[np.int32]) -> None:
        """Say in how many batches each shard is needed; `NEVER` for none that is known."""
        temporary = self._path.with_suffix(".part")
        temporary.write_bytes(uses.tobytes())
        temporary.replace(self._path.with_suffix(USES))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        with cache_lock(self._cache):
            _forget(self._path)
        self._held.close()


def announced(cache: Path) -> dict[str, int]:
    """In how many batches some reader needs each shard, by its path in the cache.

    Announcements of readers that have ended are removed. Call it under `cache_lock`.
    """
    found = dict[str, int]()
    for path in sorted((cache / READERS).glob(f"*{NAMES}")):
        with contextlib.suppress(BlockingIOError), file_lock(path, wait=False):
            _forget(path)  # nobody holds it: its reader has ended
            continue
        with contextlib.suppress(FileNotFoundError):  # it has said nothing yet, or ends now
            uses = np.fromfile(path.with_suffix(USES), np.int32).tolist()
            names = read_whole(path).decode("utf-8", "replace").split("\n")
            for name, distance in zip(names, uses, strict=False):
                if distance < found.get(name, NEVER):
                    found[name] = distance
    return found


def _forget(path: Path) -> None:
    for suffix in (".part", USES, NAMES):
        with contextlib.suppress(OSError):
            path.with_suffix(suffix).unlink(missing_ok=True)


def make_room(cache: Path, most: int, spared: int = 0) -> tuple[bool, int]:
    """Remove shards until at most `most` bytes are left. Call it under `cache_lock`.

    Args:
        cache: The cache's folder.
        most: Bytes.
        spared: Shards that some reader needs in fewer batches stay.

    Returns:
        Whether there are no more bytes now, and how many shards were removed. What somebody copies
        or opens now stays.
    """
    files = list(_cached_files(cache))
    used = sum(size for _, size, _ in files)
    if used <= most:
        return True, 0
    needed, removed = announced(cache), 0
    uses = [needed.get(path.relative_to(cache).as_posix(), NEVER) for _, _, path in files]
    for place in removal_order(uses, [read for read, _, _ in files], spared).tolist():
        if used <= most:
            break
        _, size, path = files[place]
        if _remove_unless_held(path):
            used -= size
            removed += not path.name.endswith(TEMPORARY)
    return used <= most, removed


def cached_bytes(cache: Path) -> int:
    """Bytes of the shards in a cache, of all datasets."""
    return sum(size for _, size, _ in _cached_files(cache))


def _cached_files(cache: Path) -> Iterator[tuple[float, int, Path]]:
    """When each shard was read last, its size and path; those on their way are among them."""
    for folder, _, names in os.walk(cache):
        for name in names:
            if name.endswith((".arrow", f".arrow{TEMPORARY}")):
                path = Path(folder) / name
                with contextlib.suppress(FileNotFoundError):
                    stat = path.stat()
                    yield stat.st_mtime, stat.st_size, path


def _remove_unless_held(path: Path) -> bool:
    """Remove a shard, or what a killed process left of one, that nobody is copying or opening."""
    shard = path
    if path.name.endswith(TEMPORARY):
        shard = path.with_name(path.name.removeprefix(".").removesuffix(TEMPORARY))
    try:
        with file_lock(lock_path(shard), wait=False):
            path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    return True
