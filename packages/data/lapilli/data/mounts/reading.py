"""Read an image's bytes from its location."""

from __future__ import annotations

import functools
import os
import struct
import threading
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO

import pyarrow as pa

from lapilli.data.images.view import BadImage
from lapilli.data.io.access import is_denied
from lapilli.data.io.filesystems import is_remote, open_storage, split_address
from lapilli.data.mounts.places import LARGEST_FILE, Cell, Located, Member
from lapilli.data.mounts.tables import read_cell
from lapilli.data.record import Reason

__all__ = ["read_image"]

LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # of a zip's member; .ZIP File Format, 4.3.7
SIGNATURE = b"PK\3\4"
OPEN_ARCHIVES = 64  # files a process holds open
REOPENED = 30.0  # seconds until an archive at an address is opened anew, to see a change
NAMES_AT_MOST = 512  # bytes of a zip member's name and extra fields that are read with its data
_OPENING = threading.Lock()


def read_image(root: Path, place: Located) -> bytes:
    """The bytes of an image that `Mount.locate` found below `root`.

    Raises:
        BadImage: `image_missing` where the container is gone or is not what it was when the plan
            was made; `image_unreadable` where rights or a disk keep it back;
            `image_undecodable` where a member of an archive is damaged.
    """
    try:
        if place.member is None:
            return _read_whole(root, place)
        if isinstance(place.member, Cell):
            return _read_cell(root, place, place.member)
        return _unpack(place.member, place.image_id, functools.partial(_read_part, root, place))
    except OSError as error:
        # A library's error may name a request; two runs must write the same detail.
        detail = f"was there when the build was planned, now: {error.strerror or 'not readable'}"
        reason = Reason.IMAGE_UNREADABLE if is_denied(error) else Reason.IMAGE_MISSING
        raise BadImage(reason, detail) from None


def _read_whole(root: Path, place: Located) -> bytes:
    if is_remote(place.container):
        scheme, path = split_address(place.container)
        data: bytes = open_storage(scheme).cat_file(path)
        _check_unchanged(place, len(data), None)
        return data
    with (root / place.container).open("rb") as file:
        _check_file(place, file)
        data = file.read(LARGEST_FILE + 1)
    _check_unchanged(place, len(data), None)
    return data


def _check_file(place: Located, file: BinaryIO) -> None:
    stat = os.fstat(file.fileno())
    _check_unchanged(place, stat.st_size, stat.st_mtime_ns)


def _check_unchanged(place: Located, size: int, mtime_ns: int | None) -> None:
    if size != place.size:
        detail = f"{place.container} had {place.size} bytes when the build was planned, now {size}"
    elif mtime_ns is not None and mtime_ns != place.mtime_ns:
        detail = f"{place.container} was written again after the build was planned"
    else:
        return
    raise BadImage(Reason.IMAGE_MISSING, f"{detail}; run the same command again")


def _read_part(root: Path, place: Located, offset: int, count: int) -> bytes:
    """`count` bytes of a container from `offset`."""
    if is_remote(place.container):
        with _OPENING:
            opened = _open_remote(place.container, int(time.monotonic() / REOPENED))
        return opened.read(place, offset, count)
    file = _open_archive(str(root / place.container), place.size, place.mtime_ns)
    _check_file(place, file)
    return os.pread(file.fileno(), count, offset)


def _read_cell(root: Path, place: Located, cell: Cell) -> bytes:
    """An image of a Parquet file, with the rest of its row group."""
    path = place.container if is_remote(place.container) else str(root / place.container)
    if not is_remote(path):
        stat = os.stat(path)  # noqa: PTH116 - for each image
        _check_unchanged(place, stat.st_size, stat.st_mtime_ns)
    identity = (path, place.size, place.mtime_ns)
    return read_cell(identity, functools.partial(_open_whole, path, place), cell, place.image_id)


def _open_whole(path: str, place: Located) -> IO[bytes]:
    """A container for random access; at an address one that is still what it was."""
    if not is_remote(path):
        return Path(path).open("rb")
    scheme, name = split_address(path)
    remote: Any = open_storage(scheme).open(name, "rb")
    _check_unchanged(place, int(remote.size), None)
    return remote


class _RemoteArchive:
    """An archive at an address, whose size was asked for when it was opened."""

    def __init__(self, address: str) -> None:
        scheme, path = split_address(address)
        self._file: Any = open_storage(scheme).open(path, "rb")
        self._lock = threading.Lock()

    def read(self, place: Located, offset: int, count: int) -> bytes:
        """Bytes of it: one call, several threads at a time where pyarrow reads."""
        _check_unchanged(place, int(self._file.size), None)
        stream: Any = getattr(self._file, "stream", None)
        if isinstance(stream, pa.NativeFile):
            data: Any = stream.read_at(count, offset)
            return data
        with self._lock:
            self._file.seek(offset)
            return self._file.read(count)


@functools.lru_cache(maxsize=OPEN_ARCHIVES)
def _open_remote(address: str, turn: int) -> _RemoteArchive:
    """An archive held open for the next member of the same half minute."""
    del turn
    return _RemoteArchive(address)


@functools.lru_cache(maxsize=OPEN_ARCHIVES)
def _open_archive(path: str, size: int, mtime_ns: int) -> BinaryIO:
    """An archive held open for the next member; one written again since is opened again."""
    del size, mtime_ns
    return Path(path).open("rb", buffering=0)  # type: ignore[return-value]


def _unpack(member: Member, image_id: str, read: Callable[[int, int], bytes]) -> bytes:
    """A member's bytes, whole and as its archive describes them."""
    if member.method == "tar":
        return _whole(read(member.offset, member.size), member.size, image_id)
    found = read(member.offset, LOCAL_HEADER.size + NAMES_AT_MOST + member.stored)
    header = _whole(found[: LOCAL_HEADER.size], LOCAL_HEADER.size, image_id)
    signature, *_, name_length, extra_length = LOCAL_HEADER.unpack(header)
    if signature != SIGNATURE:
        raise BadImage(Reason.IMAGE_UNDECODABLE, f"{image_id}: no zip member at its place")
    start = LOCAL_HEADER.size + name_length + extra_length
    data = found[start : start + member.stored]
    if len(data) < member.stored:  # long names, or a member that is cut off
        data = read(member.offset + start, member.stored)
    data = _whole(data, member.stored, image_id)
    if member.method != zipfile.ZIP_STORED:
        data = _inflate(data, member.size, image_id)
    if zlib.crc32(data) != member.crc or len(data) != member.size:
        raise BadImage(Reason.IMAGE_UNDECODABLE, f"{image_id}: damaged in its archive")
    return data


def _inflate(data: bytes, size: int, image_id: str) -> bytes:
    """Unpack to `size` bytes; a member that would be more never takes more memory."""
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
    except zlib.error as error:
        detail = f"{image_id}: damaged in its archive ({error})"
        raise BadImage(Reason.IMAGE_UNDECODABLE, detail) from None


def _whole(data: bytes, size: int, image_id: str) -> bytes:
    if len(data) != size:
        raise BadImage(Reason.IMAGE_UNDECODABLE, f"{image_id}: cut off in its archive")
    return data
