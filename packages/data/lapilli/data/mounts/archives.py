"""Index the members of zip and tar archives without unpacking them.

A zip's central directory and a tar's headers are all that is read. Names in an archive are only
compared with keys and never become paths, so one that leads upwards is harmless.
"""

from __future__ import annotations

import stat
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, cast

from lapilli.data.io.access import is_denied
from lapilli.data.io.file_kinds import SNIFFED, what_it_is_instead
from lapilli.data.mounts.places import Member
from lapilli.data.mounts.tar_headers import bounded, followed, headers, link_target
from lapilli.data.record import Reason, excerpt

__all__ = ["BadArchive", "Index", "read_index"]

ENCRYPTED = 0x1  # bit of a zip member's flags
CENTRAL, CENTRAL_BYTES = b"PK\1\2", 46  # a member's header; .ZIP File Format, 4.3.12
UTF8 = 0x08  # bit of the flags' second byte: the name is UTF-8
DEEPEST = 512  # folders of a member; no key goes as deep


class BadArchive(Exception):
    """An archive whose members cannot be read: one line with the reason and what to do."""

    def __init__(self, detail: str, reason: Reason = Reason.IMAGE_MISSING) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Link:
    """A link in a tar, and where it leads from the tar's top."""

    target: str


class Index:
    """The members of an archive by folder, then by name; `""` is the archive's top.

    `backslashed` are the members, by folder and name, whose paths were written with backslashes;
    `linked` are the paths of the members and folders that links lead to, by the links' own paths.
    """

    def __init__(self) -> None:
        self.folders: dict[str, dict[str, Member | str]] = {"": {}}
        self.children: dict[str, set[str]] = {"": set()}
        self.backslashed: set[tuple[str, str]] = set()
        self.linked: dict[str, str] = {}
        self._links: dict[str, str] = {}
        self._repeated: set[str] = set()

    def add(self, name: str, member: Member | Link | str) -> None:
        """Add a member, a link, or the reason why it cannot be read.

        A later one of a name replaces it. One that no key can name is left out: without a name,
        or too deep.
        """
        path = _tidy(name)
        folder, _, last = path.rpartition("/")
        if not last or folder.count("/") >= DEEPEST:
            return
        members = self._folder(folder)
        if isinstance(member, Link):
            if last not in members or _tidy(member.target) != path:  # else it is that member
                self._links[path] = member.target
                members.pop(last, None)
            return
        if last in members:
            self._repeated.add(path)
        self._links.pop(path, None)
        members[last] = member

    def add_backslashed(self, name: str, member: Member | str) -> None:
        """Add a member whose path has backslashes, below what has the same path with slashes."""
        folder, _, last = _tidy(name.replace("\\", "/")).rpartition("/")
        if last and folder.count("/") < DEEPEST and last not in self._folder(folder):
            self._folder(folder)[last] = member
            self.backslashed.add((folder, last))

    def follow_links(self) -> None:
        """Put what links lead to in their places; for one that leads nowhere, why not."""
        for path, target in self._links.items():
            folder, _, name = path.rpartition("/")
            found = followed(path, self._links)
            above, _, last = (found or "").rpartition("/")
            if found in self.folders and path not in self.folders:
                self.children[folder].add(name)
                self.linked[path] = found
            elif found and found not in self._repeated and last in self.folders.get(above, ()):
                self.folders[folder][name] = self.folders[above][last]
                self.linked[path] = found
            else:
                self.children[folder].add(name)  # so that a key below it finds it
                self.folders[folder][name] = (
                    f"is a link to '{excerpt(target)}', no one member of the archive; pack it again"
                )

    def _folder(self, path: str) -> dict[str, Member | str]:
        """The members of a folder, which is added with all above it."""
        below = path
        while below not in self.folders:
            self.folders[below] = {}
            self.children.setdefault(below, set())
            above, _, last = below.rpartition("/")
            self.children.setdefault(above, set()).add(last)
            below = above
        return self.folders[path]

    def folder_called(self, name: str) -> str | None:
        """The one folder of this name that is nearest to the top, or None."""
        found = [path for path in self.folders if path.rpartition("/")[2] == name]
        depth = min((path.count("/") for path in found), default=0)
        nearest = [path for path in found if path.count("/") == depth]
        return nearest[0] if len(nearest) == 1 else None


def _tidy(name: str) -> str:
    """A member's path from the archive's top, as it is unpacked."""
    if name.startswith(("/", "./")) or "//" in name or "/./" in name:
        name = PurePosixPath(name.lstrip("/")).as_posix()
    return "" if name == "." else name


def read_index(file: IO[bytes], name: str) -> Index:
    """The members of an archive.

    Raises:
        BadArchive: No whole zip or plain tar.
        OSError: It cannot be read, and may be whole.
    """
    index = Index()
    members: Iterator[tuple[str, Member | Link | str]]
    members = _zip_members(file) if name.endswith(".zip") else _tar_members(file)
    backslashed: list[tuple[str, Member | str]] = []
    try:
        for path, member in members:
            index.add(path, member)
            if "\\" in path and not isinstance(member, Link) and name.endswith(".zip"):
                # Some writers on Windows.
                backslashed.append((path, member))
    except (
        zipfile.BadZipFile, tarfile.TarError, OSError, EOFError, ValueError, OverflowError,
        NotImplementedError, RecursionError, struct.error,
    ) as error:  # fmt: skip
        if is_denied(error):
            raise
        kind = "zip" if name.endswith(".zip") else "uncompressed tar"
        instead = _instead(file)
        raise BadArchive(
            f"'{excerpt(name)}' is no whole {kind} ({excerpt(str(error))}); "
            + (instead or "download it again")
        ) from None
    for path, member in backslashed:
        index.add_backslashed(path, member)
    index.follow_links()
    return index


def _instead(file: IO[bytes]) -> str:
    """The kind of a file that is not an archive, with what to do; "" if unknown."""
    try:
        file.seek(0)
        return what_it_is_instead(file.read(SNIFFED), "archive")
    except OSError:
        return ""


class _NamesOfAnyKind:
    """A zip for `zipfile`, which gives up at a name that is said to be UTF-8 and is not.

    The flag is taken off such names, which are then read as older zips' are.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.tell, self.seek = file.tell, file.seek

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = bytearray(self._file.read(size))
        at = 0
        while data.startswith(CENTRAL, at) and at + CENTRAL_BYTES <= len(data):
            name, extra, comment = struct.unpack_from("<3H", data, at + 28)
            start = at + CENTRAL_BYTES
            try:
                data[start : start + name].decode()
            except UnicodeDecodeError:
                data[at + 9] &= ~UTF8
            at = start + name + extra + comment
        return bytes(data)


def _zip_members(file: IO[bytes]) -> Iterator[tuple[str, Member | str]]:
    try:
        archive = zipfile.ZipFile(file)
    except UnicodeDecodeError:
        archive = zipfile.ZipFile(cast("IO[bytes]", _NamesOfAnyKind(file)))
    with archive:
        for info in archive.infolist():
            if not info.filename or info.is_dir():
                continue
            if stat.S_ISLNK(info.external_attr >> 16):
                yield info.filename, "is a link; pack it again with what the link leads to"
            elif info.flag_bits & ENCRYPTED:
                yield info.filename, "is encrypted; pack it again without a password"
            elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                why = f"has compression method {info.compress_type}; pack it stored or deflated"
                yield info.filename, why
            else:
                yield info.filename, Member(
                    offset=info.header_offset, stored=info.compress_size, size=info.file_size,
                    method=info.compress_type, crc=info.CRC,
                )  # fmt: skip


def _tar_members(file: IO[bytes]) -> Iterator[tuple[str, Member | Link | str]]:
    """A tar of WebDataset's or the like; a compressed one has no places to read at."""
    with tarfile.open(fileobj=bounded(file), mode="r:") as archive:
        for info in headers(archive):
            if info.size < 0:
                yield info.name, "has a negative size; pack it again"
            elif info.issparse():
                yield info.name, "is a sparse file; pack it again"
            elif info.islnk() or info.issym():
                yield info.name, Link(link_target(info))
            elif info.isreg():
                yield (
                    info.name,
                    Member(
                        offset=info.offset_data,
                        stored=info.size,
                        size=info.size,
                        method="tar",
                        crc=0,
                    ),
                )
