"""List the folders that image keys refer to: on disk, in an archive, at an address.

Listing a folder once and looking names up in it, instead of asking for every key, is what makes
600,000 keys a matter of seconds on a disk and of hundreds of requests on an object store.
"""

from __future__ import annotations

import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lapilli.data.io.access import is_denied
from lapilli.data.io.filesystems import is_remote, open_storage, split_address
from lapilli.data.mounts.archives import BadArchive, Index, read_index
from lapilli.data.mounts.names import loose_form, name_form, split_name
from lapilli.data.mounts.places import ARCHIVES, LARGEST_FILE, Located, Member
from lapilli.data.mounts.tables import Rows, Table, read_table
from lapilli.data.numbered import NamesByForm, NumberedNames
from lapilli.data.record import Reason, Verdict, excerpt, is_unicode

__all__ = ["Boundary", "Folder", "Listing", "open_folder"]

MOST_IMAGES = 1 << 20  # in a row of a Parquet file


@dataclass
class Listing:
    """The names in a folder; the tables for repairs are made when the first name is missed."""

    files: Mapping[str, Any]
    folders: frozenset[str]
    _near: NamesByForm | None = None
    _folders: NamesByForm | None = None

    def same_files(self, name: str) -> list[str]:
        """The files that `name` may be another spelling of (see `names`), images in particular."""
        form, extension = _file_form(name), split_name(name)[1]
        return [
            other
            for other in self.near(name)
            if _file_form(other) == form and (split_name(other)[1] or not extension)
        ]

    def same_folders(self, name: str) -> list[str]:
        """The folders that `name` may be another spelling of."""
        if self._folders is None:
            self._folders = NamesByForm([*self.folders], name_form)
        return self._folders.get(name_form(name))

    def near(self, name: str) -> list[str]:
        """The files that look like `name`, among them those that are not the same."""
        if self._near is None:
            names = self.files if isinstance(self.files, NumberedNames) else [*self.files]
            self._near = NamesByForm(names, _near_form)
        return self._near.get(_near_form(name))


def _file_form(name: str) -> str:
    return name_form(split_name(name)[0])


def _near_form(name: str) -> str:
    return loose_form(_file_form(name))


class Folder(ABC):
    """What a key's path is followed through."""

    @functools.cached_property
    def listing(self) -> Listing:
        """The names in it, read once."""
        return self.read()

    @abstractmethod
    def read(self) -> Listing:
        """Read the names in it."""

    @abstractmethod
    def child(self, name: str) -> Folder:
        """A folder of the listing, or an archive of the listing opened as one."""

    @abstractmethod
    def locate(self, name: str, repair: str) -> Located | Verdict:
        """Where a file of the listing is."""

    @abstractmethod
    def path_of(self, name: str) -> str:
        """The path of a file as it is spelt, links not followed."""

    def repair_of(self, name: str) -> str:
        """How an archive spells the name of a file otherwise than it is listed, or ""."""
        del name
        return ""

    def folder_called(self, name: str) -> Folder:
        """In an archive its folder of this name wherever it lies, or else its top."""
        del name
        return self

    def folder_at(self, path: str) -> Folder | None:
        """In an archive its folder of just this path."""
        del path
        return None


@dataclass(frozen=True)
class Boundary:
    """What links may lead to.

    Attributes:
        root: The dataset's root, resolved.
        extra: Further folders that the user has allowed, resolved.
    """

    root: Path
    extra: tuple[Path, ...] = ()

    def identity(self, real: Path, shown: str) -> str | Verdict:
        """The identity of a file: the path below the root, or the one shown below `extra`."""
        if real.is_relative_to(self.root):
            return real.relative_to(self.root).as_posix()
        if any(real.is_relative_to(folder) for folder in self.extra):
            return shown
        detail = (
            f"'{excerpt(shown)}' is a link out of the root, to {excerpt(str(real.parent))}; "
            "to allow it name a folder above that in `extra_roots`"
        )
        return Verdict(Reason.IMAGE_OUTSIDE_ROOT, detail)


@dataclass
class LocalFolder(Folder):
    """A folder on a disk. `shown` is its path below the root as the key has it."""

    path: Path
    shown: str
    boundary: Boundary
    _is_link: bytearray = field(default_factory=bytearray, init=False)  # by number of the name

    def read(self) -> Listing:
        """Names, numbered; a link to nothing or to itself is left out."""
        files, is_link = NumberedNames(), bytearray()
        folders: list[str] = []
        with os.scandir(self.path) as found:
            for item in found:
                try:
                    if item.is_dir():
                        folders.append(item.name)
                    elif item.is_file():
                        is_link.append(item.is_symlink())
                        files.add(item.name)
                except OSError as error:
                    if is_denied(error):  # reported when its target is asked for
                        is_link.append(True)
                        files.add(item.name)
        self._is_link = is_link
        return Listing(files, frozenset(folders))

    @functools.cached_property
    def _identity(self) -> str | Verdict:
        return self.boundary.identity(self.path.resolve(), self.shown)

    def child(self, name: str) -> Folder:
        """The folder below, or an archive that lies here."""
        shown = self.path_of(name)
        if name in self.listing.folders:
            return LocalFolder(self.path / name, shown, self.boundary)
        place = self.locate(name, "")
        if isinstance(place, Verdict):
            raise BadArchive(place.detail, place.reason or Reason.IMAGE_MISSING)
        with (self.path / name).open("rb") as file:
            return _open_archive(file, str(self.path / name), place)

    def path_of(self, name: str) -> str:
        """The path below the root, as the key has its folders."""
        return f"{self.shown}/{name}" if self.shown else name

    def locate(self, name: str, repair: str) -> Located | Verdict:
        """The file with its size and time."""
        shown = self.path_of(name)
        path = f"{self.path}/{name}"
        number = self.listing.files[name]
        if self._is_link[number]:
            identity = self.boundary.identity(Path(path).resolve(), shown)
        elif isinstance(self._identity, Verdict):
            identity = self._identity
        else:
            identity = name if self._identity in ("", ".") else f"{self._identity}/{name}"
        if isinstance(identity, Verdict):
            return identity
        if not is_unicode(identity):
            detail = f"the file name of '{excerpt(shown)}' is no UTF-8"
            return Verdict(Reason.IMAGE_MISSING, detail)
        if not os.access(path, os.R_OK):
            detail = f"'{excerpt(shown)}': no permission to read it"
            return Verdict(Reason.IMAGE_UNREADABLE, detail)
        stat = os.stat(path)  # noqa: PTH116 - 200,000 times, and a Path takes twice as long
        if stat.st_size > LARGEST_FILE and not name.endswith(ARCHIVES):
            return _too_large(shown, stat.st_size)
        return Located(
            image_id=identity,
            container=identity,
            size=stat.st_size,
            mtime_ns=stat.st_mtime_ns,
            member=None,
            repair=repair,
        )


@dataclass
class RemoteFolder(Folder):
    """A folder at an address, listed in pages of a thousand names.

    `shown` is its path below the root; of one outside of the root its address.
    """

    address: str
    shown: str

    def read(self) -> Listing:
        """Names, with what the store says of each."""
        scheme, path = split_address(self.address)
        files: dict[str, Any] = {}
        folders: list[str] = []
        for item in open_storage(scheme).ls(path, detail=True):
            name = str(item["name"]).rstrip("/").rpartition("/")[2]
            if item["type"] == "directory":
                folders.append(name)
            elif item["type"] == "file":
                files[name] = item
        return Listing(files, frozenset(folders))

    def child(self, name: str) -> Folder:
        """The folder below, or an archive that lies here."""
        if name in self.listing.folders:
            return RemoteFolder(f"{self.address}/{name}", self.path_of(name))
        place = self.locate(name, "")
        if isinstance(place, Verdict):
            raise BadArchive(place.detail, place.reason or Reason.IMAGE_MISSING)
        scheme, path = split_address(place.container)
        with open_storage(scheme).open(path, "rb") as file:
            return _open_archive(file, place.container, place)

    def path_of(self, name: str) -> str:
        """The object's path below the root, or its address."""
        return f"{self.shown}/{name}" if self.shown else name

    def locate(self, name: str, repair: str) -> Located | Verdict:
        """The object with its size and time."""
        item = self.listing.files[name]
        written = item.get("mtime") or item.get("LastModified")
        mtime_ns = int(written.timestamp() * 1e9) if hasattr(written, "timestamp") else 0
        image_id = self.path_of(name)
        if item["size"] > LARGEST_FILE and not name.endswith(ARCHIVES):
            return _too_large(image_id, item["size"])
        return Located(
            image_id=image_id,
            container=f"{self.address}/{name}",
            size=int(item["size"]),
            mtime_ns=mtime_ns,
            member=None,
            repair=repair,
        )


@dataclass
class ArchiveFolder(Folder):
    """A folder inside an archive; `inner` is its path there."""

    archive: Located
    index: Index
    inner: str = ""

    def read(self) -> Listing:
        """Names, with their members."""
        return Listing(self.index.folders[self.inner], frozenset(self.index.children[self.inner]))

    def child(self, name: str) -> Folder:
        """The folder below; an archive in an archive is not opened."""
        if name not in self.listing.folders:
            raise BadArchive(f"'{excerpt(name)}' is an archive in an archive; unpack it")
        inner = f"{self.inner}/{name}" if self.inner else name
        inner = self.index.linked.get(inner, inner)
        if inner not in self.index.folders:  # a link that leads nowhere
            raise BadArchive(f"'{excerpt(self.path_of(name))}' {self.listing.files[name]}")
        return ArchiveFolder(self.archive, self.index, inner)

    def path_of(self, name: str) -> str:
        """The archive and the member as one path."""
        path = f"{self.inner}/{name}" if self.inner else name
        return f"{self.archive.image_id}/{path}"

    def repair_of(self, name: str) -> str:
        """`backslash` where that is what the archive puts between folders."""
        return "backslash" if (self.inner, name) in self.index.backslashed else ""

    def locate(self, name: str, repair: str) -> Located | Verdict:
        """The member's place; one that cannot be read says why."""
        path = f"{self.inner}/{name}" if self.inner else name
        image_id = f"{self.archive.image_id}/{self.index.linked.get(path, path)}"
        member: Member | str = self.listing.files[name]
        if isinstance(member, str):
            return Verdict(Reason.IMAGE_UNDECODABLE, f"'{excerpt(image_id)}' {member}")
        if not is_unicode(image_id):
            detail = f"the name of '{excerpt(image_id)}' is no UTF-8"
            return Verdict(Reason.IMAGE_MISSING, detail)
        a = self.archive
        if not 0 <= member.offset <= a.size or min(member.size, member.stored) < 0:
            detail = f"'{excerpt(image_id)}' does not lie inside of its archive; pack it again"
            return Verdict(Reason.IMAGE_UNDECODABLE, detail)
        if max(member.size, member.stored) > LARGEST_FILE:
            return _too_large(image_id, max(member.size, member.stored))
        return Located(
            image_id=image_id,
            container=a.container,
            size=a.size,
            mtime_ns=a.mtime_ns,
            member=member,
            repair=repair,
        )

    def folder_called(self, name: str) -> Folder:
        """The folder of this name wherever it lies, or else the top."""
        return ArchiveFolder(self.archive, self.index, self.index.folder_called(name) or "")

    def folder_at(self, path: str) -> Folder | None:
        """The folder of this path, if the archive has it."""
        path = self.index.linked.get(path, path)
        return ArchiveFolder(self.archive, self.index, path) if path in self.index.folders else None


@dataclass
class TableFolder(Folder):
    """A Parquet file, one of its columns, or in a column of lists one of its rows."""

    archive: Located
    table: Table
    column: str = ""
    row: int = -1

    @property
    def listing(self) -> Listing:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The names in it: made when asked for, since each row is a folder of its own."""
        return self.read()

    def read(self) -> Listing:
        """Columns, or the numbers of rows, or of the images of a row, whose end is not known."""
        if not self.column:
            return Listing({}, frozenset(self.table.columns))
        rows = Rows(self.table.starts[-1])
        if self.row >= 0:
            return Listing(Rows(MOST_IMAGES), frozenset())
        is_list = self.table.columns[self.column].is_list
        return Listing({}, _RowNames(rows)) if is_list else Listing(rows, frozenset())

    def child(self, name: str) -> Folder:
        """A column, or a row of a column of lists."""
        if not self.column:
            return TableFolder(self.archive, self.table, name)
        return TableFolder(self.archive, self.table, self.column, int(name))

    def path_of(self, name: str) -> str:
        """File, column, row and number as one path."""
        row = "" if self.row < 0 else f"/{self.row}"
        return f"{self.archive.image_id}/{self.column}{row}/{name}"

    def locate(self, name: str, repair: str) -> Located | Verdict:
        """The image's row group and row."""
        row, index = (int(name), -1) if self.row < 0 else (self.row, int(name))
        a, cell = self.archive, self.table.cell(self.column, row, index)
        return Located(
            image_id=self.path_of(name),
            container=a.container,
            size=a.size,
            mtime_ns=a.mtime_ns,
            member=cell,
            repair=repair,
        )


class _RowNames(frozenset[str]):
    """The rows of a table as folders, which are asked for and never listed."""

    def __new__(cls, rows: Rows) -> _RowNames:
        self = super().__new__(cls)
        self.rows = rows
        return self

    rows: Rows

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self.rows


def _open_archive(file: Any, name: str, place: Located) -> Folder:
    """An archive's top; its index is read once a process for one state of the file."""
    index = _cached_index(file, name, place)
    return ArchiveFolder(place, index) if isinstance(index, Index) else TableFolder(place, index)


def _too_large(shown: str, size: int) -> Verdict:
    detail = f"'{excerpt(shown)}' has {size} bytes; {LARGEST_FILE} are the most that are read"
    return Verdict(Reason.IMAGE_TOO_LARGE, detail)


_indexes: dict[tuple[str, int, int], Index | Table] = {}


def _cached_index(file: Any, name: str, place: Located) -> Index | Table:
    """An archive's index, once a process for one state of the file: sources share archives."""
    key = (name, place.size, place.mtime_ns)
    if key not in _indexes:
        read = read_table if name.endswith(".parquet") else read_index
        _indexes[key] = read(file, name)
    return _indexes[key]


def open_folder(path: str, boundary: Boundary) -> Folder:
    """The folder that keys start at: an address, an absolute path, or `""` for the root."""
    if is_remote(path):
        return RemoteFolder(path.rstrip("/"), path.rstrip("/"))
    return LocalFolder(Path(path) if path else boundary.root, path, boundary)
