"""Bring a folder or a file of a store to this node's disk, once for all its processes.

A copy's name holds a digest of the listing, so what is changed at the address is copied anew. Its
files are written under a temporary name, compared with the listing's sizes and renamed together;
`.copy.json` beside them has their SHA-256, and a copy that no longer has those sizes is made again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lapilli.data.errors import DataError
from lapilli.data.io.access import FULL
from lapilli.data.io.addresses import refuse_web
from lapilli.data.io.atomic import sha256_file, write_json
from lapilli.data.io.file_lock import file_lock
from lapilli.data.io.filesystems import is_remote
from lapilli.data.io.remote_path import COPY_BYTES, RemotePath
from lapilli.data.io.typed_json import JsonError, from_json, is_file_path
from lapilli.data.io.whole_file import read_whole
from lapilli.data.record import excerpt

__all__ = ["cache_root", "download", "local_copy"]

CACHE = "LAPILLI_CACHE"
FACTS = ".copy.json"


def cache_root(folder: str | Path | None = None) -> Path:
    """The folder of a node's copies: the one given, `$LAPILLI_CACHE`, else `~/.cache/lapilli`."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lapilli"
    return Path(folder or os.environ.get(CACHE) or home).absolute()


def local_copy(
    place: str | Path, setting: str, keep: Callable[[str], bool] = lambda name: True
) -> Path:
    """A path of this machine for a place: itself, or of an address this node's copy.

    Args:
        place: A path, a name of the hub's, or an address.
        setting: What names it, for errors.
        keep: Which files of a folder are brought, by their path in it.

    Raises:
        DataError: The address cannot be read or holds none of these files; the disk is full.
    """
    address = str(place).rstrip("/")
    if not is_remote(address):
        return Path(place)
    refuse_web(setting, address)
    source = RemotePath(address)
    listed = _kept(source, setting, keep)
    digest = hashlib.sha256(repr((address, sorted(listed.items()))).encode()).hexdigest()[:16]
    folder = cache_root() / "copies" / digest
    with file_lock(folder.with_name(f".{digest}.lock")):
        if not _is_whole(folder):
            _copy(source, listed, folder, setting)
    return folder / source.name


Listed = dict[str, tuple[int, str]]  # bytes and time of change by path; of an object alone by ""


def _kept(source: RemotePath, setting: str, keep: Callable[[str], bool]) -> Listed:
    """What is brought of an address.

    Raises:
        DataError: Nothing.
    """
    found = source.versions()
    found.pop("", None)  # the mark of a folder that some programs make
    for name in found:
        if not is_file_path(name):  # a store's keys are any text
            raise DataError(
                f"{setting}: {source}: {excerpt(repr(name))} leads out of the folder; remove it "
                "there"
            )
    kept = {name: version for name, version in found.items() if keep(name)}
    if not kept and not found and (version := source.version()) is not None:
        kept = {"": version}
    if not kept:
        what = "none of the files that are read from it" if found else "nothing there"
        raise DataError(
            f"{setting}: {source}: {what}; check the address, credentials and AWS_ENDPOINT_URL"
        )
    return kept


def _is_whole(folder: Path) -> bool:
    """Whether a copy's files have the sizes they had when it was made."""
    try:
        known = from_json(read_whole(folder / FACTS), dict[str, dict[str, Any]])
        sizes = {name: (folder / name).stat().st_size for name in known}
        return all(size == known[name]["bytes"] for name, size in sizes.items())
    except (OSError, JsonError, KeyError):
        return False


def _copy(source: RemotePath, listed: Listed, folder: Path, setting: str) -> None:
    temporary = folder.with_name(f".{folder.name}.part")
    facts = dict[str, Any]()
    try:
        for gone in (temporary, folder):
            shutil.rmtree(gone, ignore_errors=True)
        for below, (size, _) in listed.items():
            remote = source / below if below else source
            name = f"{source.name}/{below}".rstrip("/")
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                download(remote, path)
            except FileNotFoundError:
                raise _changing(remote, setting) from None
            if path.stat().st_size != size:
                raise _changing(remote, setting)
            facts[name] = {"bytes": size, "sha256": sha256_file(path)}
        write_json(temporary / FACTS, facts)
        temporary.rename(folder)
    except OSError as error:
        remedy = "free space there" if error.errno in FULL else "see to its rights and its disk"
        raise DataError(
            f"{setting}: {source} cannot be copied to {folder} ({error.strerror}); {remedy}, or "
            f"set {CACHE} to another folder"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _changing(remote: RemotePath, setting: str) -> DataError:
    return DataError(
        f"{setting}: {remote} changed while it was copied; run the same again when what writes "
        "there has ended"
    )


def download(source: RemotePath, path: Path) -> None:
    """Write an object's bytes to a file; the folder is there.

    Raises:
        FileNotFoundError: There is no such object.
        DataError: It cannot be read.
        OSError: The file cannot be written.
    """

    def copy(remote: Any) -> OSError | None:
        with path.open("wb") as file:
            while data := remote.read(COPY_BYTES):
                try:
                    file.write(data)
                except OSError as error:  # the disk's, which no other attempt mends
                    return error
        return None

    if (failed := source.read_with(copy)) is not None:
        raise failed
