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
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lapilli.data.cluster_metrics import add
from lapilli.data.dataset.build_settings import CONFIG
from lapilli.data.errors import DataError
from lapilli.data.io.access import blame, exists, naming
from lapilli.data.io.atomic import TEMPORARY, ShardFacts, write_atomic
from lapilli.data.io.file_lock import file_lock
from lapilli.data.io.filesystems import is_remote, open_storage, split_address
from lapilli.data.io.local_copy import cache_root, download
from lapilli.data.io.remote_path import RemotePath
from lapilli.data.record import excerpt
from lapilli.data.shards.manifest import NAME, read_manifest

__all__ = ["Mirror", "dataset_folder", "open_mirror", "parse_bytes"]

CACHE_LIMIT = "LAPILLI_CACHE_LIMIT"
TRIES = 5  # of a copy that fails or arrives damaged, the last after 7.5 s
PART = 8 * 2**20
WAIT = 0.1  # seconds between two looks for room
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


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
        path = self.folder / shard.path
        with file_lock(_lock_path(path)):
            try:
                if path.stat().st_size == shard.bytes:
                    with contextlib.suppress(PermissionError):  # another user's copy
                        os.utime(path)  # when it was read last
                    add("lapilli_cache_hits", 1, self.address)
                    yield self.folder
                    return
            except FileNotFoundError:
                pass
            self._copy(shard, path)
            add("lapilli_cache_misses", 1, self.address)
            add("lapilli_cache_bytes", shard.bytes, self.address)
            yield self.folder

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

    def _copy(self, shard: ShardFacts, path: Path) -> None:
        temporary = path.with_name(f".{path.name}{TEMPORARY}")
        try:
            self._reserve(shard, temporary)
            error: OSError | None = None
            for attempt in range(TRIES):
                try:
                    if self.download(shard, temporary) == shard.sha256:
                        temporary.replace(path)
                        return
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

    def _reserve(self, shard: ShardFacts, temporary: Path) -> None:
        """Take the room a shard needs, from what was read longest ago where there is a limit."""
        self._check_limit(shard)
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)  # a killed process's
            while not self._has_reserved(shard, temporary):
                time.sleep(WAIT)  # what fills the cache is being copied, and can go after that
        except OSError as error:
            raise DataError(
                f"cache: {self.cache} has no room for {shard.bytes / 1e6:,.1f} MB of {shard.path} "
                f"({error.strerror}); free space, set cache_limit, or choose another cache folder"
            ) from None

    def _check_limit(self, shard: ShardFacts) -> None:
        if self.limit is not None and shard.bytes > self.limit:
            raise DataError(
                f"cache_limit: {self.limit / 1e6:,.1f} MB; {shard.path} alone has "
                f"{shard.bytes / 1e6:,.1f} MB; raise it, by default there is none"
            )

    def _has_reserved(self, shard: ShardFacts, temporary: Path) -> bool:
        with file_lock(self.cache / ".lock"):
            if self.limit is not None and not _make_room(self.cache, self.limit - shard.bytes):
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
    most = limit if limit is not None else os.environ.get(CACHE_LIMIT) or None
    mirror = Mirror(address, root, root, None if most is None else parse_bytes(most))
    data = mirror.read_manifest()
    # Its bytes name the folder: the fingerprint alone leaves out how much of an epoch is what.
    name = f"{address.rpartition('/')[2]}-{hashlib.sha256(data).hexdigest()[:16]}"
    folder = root / name
    if not exists(folder / NAME):
        write_atomic(folder / NAME, lambda path: _write(path, data))
    read_manifest(folder)
    return Mirror(address, root, folder, mirror.limit)


def dataset_folder(dataset: str | Path) -> Path:
    """A dataset's folder; of an address this node's copy of manifest, settings and tokenizer.

    Raises:
        DataError: As `open_mirror`.
    """
    if not is_remote(str(dataset)):
        return Path(dataset)
    mirror = open_mirror(str(dataset))
    for facts in read_manifest(mirror.folder).tokenizer_files:
        with mirror.held(facts):
            pass
    if not exists(mirror.folder / CONFIG):
        with contextlib.suppress(FileNotFoundError):  # one of a version that wrote none
            settings = RemotePath(mirror.address) / CONFIG
            write_atomic(mirror.folder / CONFIG, lambda path: download(settings, path))
    return mirror.folder


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def parse_bytes(text: str | int) -> int:
    """A number of bytes: `500GB`, `1.5 TiB`, `1000000`.

    Raises:
        DataError: It is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if found is None or found[2].upper() not in UNITS:
        raise DataError(f"cache_limit: {text!r}; expected bytes, or a text like 500GB or 1.5TiB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def _cached_files(cache: Path) -> Iterator[tuple[float, int, Path]]:
    """When each shard was read last, its size and path; those on their way are among them."""
    for folder, _, names in os.walk(cache):
        for name in names:
            if name.endswith((".arrow", f".arrow{TEMPORARY}")):
                path = Path(folder) / name
                with contextlib.suppress(FileNotFoundError):
                    stat = path.stat()
                    yield stat.st_mtime, stat.st_size, path


def _make_room(cache: Path, most: int) -> bool:
    """Remove what was read longest ago until `most` bytes are left, if that can be."""
    files = sorted(_cached_files(cache))
    used = sum(size for _, size, _ in files)
    for _, size, path in files:
        if used <= most:
            break
        used -= size if _remove_unless_held(path) else 0
    return used <= most


def _remove_unless_held(path: Path) -> bool:
    """Remove a shard, or what a killed process left of one, that nobody is copying or opening."""
    shard = path
    if path.name.endswith(TEMPORARY):
        shard = path.with_name(path.name.removeprefix(".").removesuffix(TEMPORARY))
    try:
        with file_lock(_lock_path(shard), wait=False):
            path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    return True


def _lock_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")
