"""Cache the shards of a remote dataset on a node's disk, shared by its processes.

A shard is copied when it is first read, hashed on its way and renamed under its name when it is
whole. Each file has a lock that ends with its holder, so a killed process blocks nobody and leaves
nothing but a temporary file, which the next one overwrites. What is removed to make room may still
be mapped somewhere: on POSIX its pages stay until the last map is gone, and its room with them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lapilli.data.cluster_metrics import add
from lapilli.data.dataset.build_settings import CONFIG
from lapilli.data.dataset.cache_room import cache_lock, lock_path, make_room
from lapilli.data.errors import DataError
from lapilli.data.io.access import blame, exists, naming
from lapilli.data.io.atomic import TEMPORARY, ShardFacts, write_atomic
from lapilli.data.io.file_lock import file_lock
from lapilli.data.io.filesystems import is_remote, open_storage, split_address
from lapilli.data.io.local_copy import cache_root, download
from lapilli.data.io.remote_path import RemotePath
from lapilli.data.record import excerpt
from lapilli.data.shards.manifest import NAME, read_manifest

__all__ = ["CacheCounts", "Mirror", "dataset_folder", "open_mirror", "parse_bytes"]

CACHE_LIMIT = "LAPILLI_CACHE_LIMIT"
TRIES = 5  # of a copy that fails or arrives damaged, the last after 7.5 s
PART = 8 * 2**20
WAIT = 0.1  # seconds between two looks for room
ANOTHER = "another cache folder"
COUNTING = threading.Lock()
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


@dataclass
class CacheCounts:
    """What one process has done with a dataset's cache since it opened it.

    Attributes:
        hits: Shards found when they were read.
        misses: Shards copied when they were read.
        ahead: Shards copied before they were read.
        bytes: Copied.
        evictions: Shards removed to make room, of other datasets too.
        wait_seconds: That reading waited for shards.
    """

    hits: int = 0
    misses: int = 0
    ahead: int = 0
    bytes: int = 0
    evictions: int = 0
    wait_seconds: float = 0.0


@dataclass(frozen=True)
class Mirror:
    """A remote dataset's copy on this node.

    Attributes:
        address: The dataset's address.
        cache: Folder that the limit is for; other datasets may be in it.
        folder: The copy of this one; its name holds the fingerprint, so that a dataset that is
            built anew under the same address is copied anew.
        limit: Most bytes in `cache`, or None.
    """

    address: str
    cache: Path
    folder: Path
    limit: int | None

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: connections stay in their process."""
        return {name: getattr(self, name) for name in ("address", "cache", "folder", "limit")}

    @cached_property
    def counts(self) -> CacheCounts:
        """Of this process."""
        return CacheCounts()

    def _count(self, name: str, amount: float) -> None:
        of = name.split("_", 2)[2]
        with COUNTING:
            setattr(self.counts, of, getattr(self.counts, of) + amount)
        add(name, amount, self.address)

    @cached_property
    def _storage(self) -> Any:
        return open_storage(split_address(self.address)[0])

    def _remote(self, name: str) -> str:
        return f"{split_address(self.address)[1]}/{name}"

    @contextlib.contextmanager
    def held(self, shard: ShardFacts) -> Generator[Path]:
        """The copy's folder, in which this shard is whole and stays until the block ends.

        Raises:
            DataError: The shard cannot be read or is damaged there, the disk is full, or the limit
                is below its size.
        """
        path, began = self.folder / shard.path, time.monotonic()
        with file_lock(lock_path(path)):
            if self.has(shard):
                self._count("lapilli_cache_hits", 1)
            else:
                self._copy(shard, path)
                self._count("lapilli_cache_misses", 1)
            self._count("lapilli_cache_wait_seconds", time.monotonic() - began)
            yield self.folder

    def fetch(self, shard: ShardFacts, spared: int) -> bool:
        """Copy a shard that is not read yet.

        Args:
            shard: The shard.
            spared: What some reader needs in fewer batches is not removed for it.

        Returns:
            Whether it is there now; not where another process copies it, or there is no room.

        Raises:
            DataError: As for `held`.
        """
        path = self.folder / shard.path
        with contextlib.suppress(BlockingIOError), file_lock(lock_path(path), wait=False):
            if self.has(shard):
                return True
            if self._copy(shard, path, spared):
                self._count("lapilli_cache_ahead", 1)
                return True
        return False

    def has(self, shard: ShardFacts) -> bool:
        """Whether it is here; it then counts as read now."""
        path = self.folder / shard.path
        try:
            if path.stat().st_size != shard.bytes:
                return False
            with contextlib.suppress(PermissionError):  # another user's copy
                os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def read_manifest(self) -> bytes:
        """The manifest as it is at the address now.

        Raises:
            DataError: There is no dataset, or the address cannot be read.
        """
        try:
            return self._storage.cat_file(self._remote(NAME))
        except FileNotFoundError:
            raise DataError(
                f"{self.address}: no dataset there (no {NAME}); copy the --output of a preprocess "
                "there"
            ) from None
        except OSError as error:
            raise self._unreadable(NAME, error) from None

    def check_sizes(self, shards: Iterable[ShardFacts]) -> None:
        """Notice a shard that is missing or cut at the address, by one listing, or never fits.

        Raises:
            DataError: Names the first such file.
        """
        shards = [*shards]
        self._check_limit(max(shards, key=lambda shard: shard.bytes))
        try:
            found: dict[str, Any] = self._storage.find(self._remote("").rstrip("/"), detail=True)
        except OSError as error:
            raise self._unreadable("", error) from None
        sizes = {name: facts["size"] for name, facts in found.items()}
        for shard in shards:
            if sizes.get(self._remote(shard.path)) != shard.bytes:
                raise DataError(
                    f"{self.address}/{shard.path}: missing or cut short; copy the dataset there "
                    "again"
                )

    def _copy(self, shard: ShardFacts, path: Path, spared: int | None = None) -> bool:
        """Copy a shard; given `spared`, not where there is no room without it."""
        temporary = path.with_name(f".{path.name}{TEMPORARY}")
        try:
            if not self._reserve(shard, temporary, spared):
                return False
            error: OSError | None = None
            for attempt in range(TRIES):
                try:
                    if self.download(shard, temporary) == shard.sha256:
                        with cache_lock(self.cache):  # whoever looks for room sees it once
                            temporary.replace(path)
                        self._count("lapilli_cache_bytes", shard.bytes)
                        return True
                    error = None
                except OSError as failed:
                    error = failed
                if attempt < TRIES - 1:
                    time.sleep(0.5 * 2**attempt)
        finally:
            with contextlib.suppress(OSError):  # the first error is the one to report
                temporary.unlink(missing_ok=True)
        if error is not None and error.filename == str(temporary):  # this machine's disk
            raise DataError(f"cache: {blame(error) or error}") from None
        if error is not None:
            raise self._unreadable(shard.path, error)
        raise DataError(
            f"{self.address}/{shard.path}: damaged there (its SHA-256 is not the manifest's); copy "
            "the dataset there again"
        )

    def _unreadable(self, name: str, error: OSError) -> DataError:
        what = "no such file" if isinstance(error, FileNotFoundError) else excerpt(str(error))
        return DataError(
            f"{self.address}/{name}".rstrip("/")
            + f": cannot be read ({what}); check address, credentials and AWS_ENDPOINT_URL"
        )

    def download(self, shard: ShardFacts, temporary: Path) -> str:
        """Copy the bytes into the room reserved for them; their SHA-256."""
        sha256 = hashlib.sha256()
        with (
            self._storage.open(self._remote(shard.path), "rb") as remote,
            temporary.open("r+b") as file,
        ):
            while part := remote.read(PART):
                sha256.update(part)
                with naming(temporary):
                    file.write(part)
            with naming(temporary):
                file.truncate()
                os.fsync(file.fileno())
        return sha256.hexdigest()

    def _reserve(self, shard: ShardFacts, temporary: Path, spared: int | None) -> bool:
        """Take the room a shard needs, from others where there is a limit."""
        self._check_limit(shard)
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)  # a killed process's
            while not self._has_reserved(shard, temporary, spared or 0):
                if spared is not None:
                    return False
                time.sleep(WAIT)  # what fills the cache is being copied, and can go after that
        except OSError as error:
            raise DataError(
                f"cache: {self.cache} has no room for {shard.bytes / 1e6:,.1f} MB of {shard.path} "
                f"({error.strerror}); free space, set cache_limit, or choose another cache folder"
            ) from None
        return True

    def _check_limit(self, shard: ShardFacts) -> None:
        if self.limit is not None and shard.bytes > self.limit:
            raise DataError(
                f"cache_limit: {self.limit / 1e6:,.1f} MB; {shard.path} alone has "
                f"{shard.bytes / 1e6:,.1f} MB; raise it, by default there is none"
            )

    def _has_reserved(self, shard: ShardFacts, temporary: Path, spared: int) -> bool:
        with cache_lock(self.cache):
            if self.limit is not None:
                has_room, removed = make_room(self.cache, self.limit - shard.bytes, spared)
                self._count("lapilli_cache_evictions", removed)
                if not has_room:
                    return False
            with temporary.open("wb") as file:
                if shard.bytes:
                    os.posix_fallocate(file.fileno(), 0, shard.bytes)
            return True


def open_mirror(
    address: str, cache: str | Path | None = None, limit: str | int | None = None
) -> Mirror:
    """Where a remote dataset is copied to; its manifest is read, and is there at once.

    Args:
        address: The dataset's address.
        cache: The folder; left out, `$LAPILLI_CACHE`, else `~/.cache/lapilli`.
        limit: Most bytes in it; left out, `$LAPILLI_CACHE_LIMIT`, else none.

    Raises:
        DataError: There is no dataset, or a wrong limit.
    """
    address = address.rstrip("/")
    root = cache_root(cache)
    most = os.environ.get(CACHE_LIMIT) if limit in (None, "") else limit
    mirror = Mirror(address, root, root, parse_bytes(most) if most not in (None, "") else None)
    data = mirror.read_manifest()
    # Its bytes name the folder: the fingerprint alone leaves out how much of an epoch is what.
    name = f"{address.rpartition('/')[2]}-{hashlib.sha256(data).hexdigest()[:16]}"
    folder = root / name
    if not exists(folder / NAME):
        write_atomic(folder / NAME, lambda path: _write(path, data), choose=ANOTHER)
    read_manifest(folder)
    return Mirror(address, root, folder, mirror.limit)


def dataset_folder(
    dataset: str | Path, cache: str | Path | None = None, limit: str | int | None = None
) -> Path:
    """A dataset's folder; of an address this node's copy of manifest, settings and tokenizer.

    Arguments and errors as for `open_mirror`.
    """
    if not is_remote(str(dataset)):
        return Path(dataset)
    mirror = open_mirror(str(dataset), cache, limit)
    for facts in read_manifest(mirror.folder).tokenizer_files:
        with mirror.held(facts):
            pass
    if not exists(mirror.folder / CONFIG):
        with contextlib.suppress(FileNotFoundError):  # one of a version that wrote none
            settings = RemotePath(mirror.address) / CONFIG
            copy = mirror.folder / CONFIG
            write_atomic(copy, lambda path: download(settings, path), choose=ANOTHER)
    return mirror.folder


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def parse_bytes(text: str | int, setting: str = "cache_limit") -> int:
    """A number of bytes: `500GB`, `1.5 TiB`, `1000000`.

    Args:
        text: The number.
        setting: What names it, for errors.

    Raises:
        DataError: It is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if found is None or found[2].upper() not in UNITS:
        raise DataError(f"{setting}: {text!r}; expected bytes, or a text like 500GB or 1.5TiB")
    return int(float(found[1]) * UNITS[found[2].upper()])
