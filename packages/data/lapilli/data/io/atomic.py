"""Write files atomically: temporary name, flush, hash, rename."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapilli.data.errors import DataError
from lapilli.data.io.access import FULL
from lapilli.data.io.remote_path import Output, RemotePath
from lapilli.data.io.typed_json import Digest, FilePath, Natural

__all__ = [
    "TEMPORARY",
    "ShardFacts",
    "begin_atomic",
    "drop_page_cache",
    "json_text",
    "sha256_file",
    "write_atomic",
    "write_json",
    "write_text",
]


TEMPORARY = ".tmp"


@dataclass(frozen=True)
class ShardFacts:
    """The manifest's entry for one file: enough to detect that it is missing or damaged."""

    path: FilePath
    rows: Natural
    bytes: Natural
    sha256: Digest


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(
    path: Output, write: Callable[[Path], None], *, choose: str = "another --output"
) -> ShardFacts:
    """Let `write` fill a temporary file beside `path`, flush it and rename it over `path`.

    An object of a store is written to a local file first and stored whole.

    Args:
        path: The file.
        write: Fills the file that it is given.
        choose: The remedy of the error: what to choose instead.

    Returns:
        The file's facts, with its bare name as `path` and no rows.

    Raises:
        DataError: The disk is full or the folder cannot be written; no file is left at `path`.
    """
    return begin_atomic(path, write, choose=choose)()


def begin_atomic(
    path: Output, write: Callable[[Path], None], *, choose: str = "another --output"
) -> Callable[[], ShardFacts]:
    """Fill the temporary file now; the returned function flushes or stores it, which takes longer.

    Either half raises what `write_atomic` does, and removes the temporary file when it fails.
    """
    remote = isinstance(path, RemotePath)
    # Two nodes may share a disk and a process id, and Ray may start a task twice.
    unique = f".{path.name}.{uuid.uuid4().hex[:12]}{TEMPORARY}"
    temporary = Path(tempfile.gettempdir()) / unique if remote else path.with_name(unique)
    with _removed_if_failed(path, temporary, choose):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)

    def finish() -> ShardFacts:
        with _removed_if_failed(path, temporary, choose):
            size = temporary.stat().st_size
            if isinstance(path, RemotePath):  # nothing is flushed that is removed again
                sha256 = sha256_file(temporary)
                path.put(temporary)
                temporary.unlink()
            else:
                sha256 = _flush_and_hash(temporary)
                temporary.replace(path)
        return ShardFacts(path.name, 0, size, sha256)

    return finish


@contextmanager
def _removed_if_failed(path: Output, temporary: Path, choose: str) -> Generator[None]:
    try:
        yield
    except BaseException as error:
        with suppress(OSError):  # the first error is the one to report
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        remedy = f"{'free space or ' * (error.errno in FULL)}choose {choose}"
        if isinstance(path, RemotePath):
            remedy = (
                f"free space in {temporary.parent}, where shards lie until they are stored, or set "
                "TMPDIR"
            )
        raise DataError(f"{path}: cannot be written ({error}); {remedy}") from None


def _flush_and_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, computed while the disk takes them."""
    with path.open("rb") as file, ThreadPoolExecutor(1) as pool:
        flushed = pool.submit(os.fsync, file.fileno())
        digest = sha256_file(path)
        flushed.result()
    return digest


def drop_page_cache(path: Path) -> None:
    """Drop a written file from the page cache, which photos and the next shard need."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_text(path: Output, text: str, *, choose: str = "another --output") -> None:
    """Write a text file atomically; see `write_atomic`."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomic(path, write, choose=choose)


def write_json(path: Output, value: Any) -> None:
    """Write a JSON file atomically; see `write_atomic`."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """What `write_json` writes."""
    return json.dumps(value, indent=1)
