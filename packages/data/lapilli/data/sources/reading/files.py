"""Find and open a source's annotation files on disk or at an address.

A file that is compressed (gzip, zstd, xz) is recognised by content, not by name, and read as it
is unpacked.
"""

from __future__ import annotations

import glob
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import pyarrow as pa

from lapilli.data.config import MOST_UNPACKED, SourceConfig
from lapilli.data.errors import DataError
from lapilli.data.io import file_kinds
from lapilli.data.io.access import exists, folders_below, is_denied, subpaths
from lapilli.data.io.addresses import split_root
from lapilli.data.io.file_kinds import SNIFFED, Expected
from lapilli.data.io.filesystems import BY_PYARROW, is_remote, open_storage, split_address
from lapilli.data.io.remote_path import Output, RemotePath
from lapilli.data.record import excerpt
from lapilli.data.sources.reading.bounds import bounded_stream
from lapilli.data.sources.reading.patterns import MOST_NAMES, expand_braces, matching

__all__ = [
    "annotation_files",
    "annotation_folder",
    "annotation_places",
    "compressed",
    "file_error",
    "is_compressed",
    "open_annotations",
    "what_it_is_instead",
]

WHOLE = READ_BYTES = 8 << 20  # that one call to a store brings
GZIP, ZSTD, XZ = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\0"


def annotation_places(config: SourceConfig, root: Path) -> list[Output]:
    """The files of a source in order: those named, of braces each, of a glob all, sorted.

    Raises:
        DataError: A glob matches nothing, or a file is named twice.
    """
    found = [place for pattern in config.patterns for place in _places(pattern, config, root)]
    seen: set[str] = set()
    for place in found:
        if str(place) in seen:
            raise DataError(
                f"annotations: {place} is named twice in source {config.name}; name it once "
                "(`mixture.epochs` repeats a source)"
            )
        seen.add(str(place))
    return found


def annotation_files(config: SourceConfig, root: Path) -> list[Path]:
    """The files of a source whose format is read from a disk; see `annotation_places`.

    Raises:
        DataError: One is at an address, or see there.
    """
    found: list[Path] = []
    for place in annotation_places(config, root):
        if isinstance(place, RemotePath):
            raise DataError(
                f"annotations: {place}: format {config.format} is read from a disk; copy the file "
                "below the root"
            )
        found.append(place)
    return found


def annotation_folder(config: SourceConfig, root: Path) -> str | None:
    """The folder below the root that all annotation files of a source lie in; None for several.

    No file is looked at, so that it is known where the files are gone.
    """
    marked = split_root(config.images)
    folders = {
        _below(pattern, marked[0]) if marked else _folder(pattern, root.resolve())
        for pattern in config.patterns
    }
    return folders.pop() if len(folders) == 1 else None


def _below(pattern: str, root: str) -> str | None:
    """As `_folder`, of a root at an address."""
    folder = pattern.rpartition("/")[0]
    if not f"{folder}/".startswith(f"{root}/") or glob.has_magic(folder) or "{" in folder:
        return None
    return folder.removeprefix(root).strip("/")


def _folder(pattern: str, root: Path) -> str | None:
    folder = pattern.rpartition("/")[0]
    if is_remote(pattern) or glob.has_magic(folder) or "{" in folder:
        return None
    path = (root / folder).resolve()
    if not path.is_relative_to(root):
        return None
    return path.relative_to(root).as_posix().removeprefix(".")


def _places(pattern: str, config: SourceConfig, root: Path) -> Iterator[Output]:
    """The files that one pattern matches."""
    if not is_remote(pattern) and exists(root / pattern):
        yield root / pattern
        return
    names = _braces(pattern)
    if names != [pattern]:
        for name in names:
            yield from _places(name, config, root)
    elif not glob.has_magic(pattern):
        yield RemotePath(pattern) if is_remote(pattern) else root / pattern
    else:
        found = _matches(pattern, root)
        if not found:
            raise DataError(
                f"annotations: no file matches {pattern!r} below {root}; check --root and the "
                f"`annotations` of source {config.name}"
            )
        yield from found


def _braces(pattern: str) -> list[str]:
    names = expand_braces(pattern)
    if names is None:
        raise DataError(
            f"annotations: '{excerpt(pattern)}' stands for more than {MOST_NAMES} files; use a glob"
        )
    return names


def _require_listable(pattern: Path) -> None:
    """Stop at a folder that may not be listed: `glob` would find nothing in it and say nothing.

    Raises:
        DataError: Names the folder.
    """
    parts = pattern.parts
    first = next(n for n, part in enumerate(parts) if glob.has_magic(part))
    start = Path(*parts[:first])
    if first == len(parts) - 1:
        subpaths(start)
        return

    deepest = None if "**" in parts else len(parts) - 1 - first
    try:
        for _ in folders_below(start, links=True, deepest=deepest):
            pass
    except OSError as error:
        raise file_error(Path(error.filename or start), error) from None


def _matches(pattern: str, root: Path) -> list[Output]:
    if not is_remote(pattern):
        _require_listable(root / pattern)
        return [root / name for name in matching(pattern, root)]
    scheme, path = split_address(pattern)
    try:
        found: list[str] = open_storage(scheme).glob(path)
    except OSError as error:
        raise file_error(RemotePath(pattern), error) from None
    return [RemotePath(f"{scheme}://{name}") for name in sorted(found)]


def open_annotations(place: Output, most_unpacked: int = MOST_UNPACKED) -> BinaryIO:
    """A file's bytes from the beginning, unpacked if they are compressed.

    Raises:
        DataError: The file cannot be opened; while it is read, it unpacks to more than
            `most_unpacked` bytes.
    """
    try:
        file = _open(place)
        start = file.read(len(XZ))
        file.seek(0)
    except OSError as error:
        raise file_error(place, error) from None
    if start.startswith(ZSTD):
        zstd: Any = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")
        return bounded_stream(zstd, str(place), most_unpacked)
    source: Any = file
    if isinstance(place, Path) and start.startswith((GZIP, XZ)):
        file.close()
        source = place  # what opens a file itself closes it too
    if start.startswith(GZIP):
        return bounded_stream(cast("BinaryIO", gzip.open(source)), str(place), most_unpacked)
    if start == XZ:
        return bounded_stream(cast("BinaryIO", lzma.open(source)), str(place), most_unpacked)
    return file


def is_compressed(path: Path) -> bool:
    """Whether a file on a disk is packed as a whole, by its first bytes."""
    with path.open("rb") as file:
        return compressed(file.read(len(XZ)))


def compressed(start: bytes) -> bool:
    """Whether a file that starts like this is packed as a whole."""
    return start.startswith((GZIP, ZSTD, XZ, b"BZh"))


def _open(place: Output) -> BinaryIO:
    if isinstance(place, Path):
        return place.open("rb")
    if isinstance(found := place.read_bounded(WHOLE), bytes):
        return io.BytesIO(found)
    scheme, path = split_address(place.address)
    file: IO[bytes] = open_storage(scheme).open(path, "rb")
    if scheme in BY_PYARROW:  # whose files ask the store for each read
        file = io.BufferedReader(cast("io.RawIOBase", file), READ_BYTES)
    return cast("BinaryIO", file)


def what_it_is_instead(place: Output, expected: Expected = "annotations") -> str:
    """What a file obviously is that is not what was expected, with what to do; "" if unknown.

    Raises:
        DataError: The file cannot be opened.
    """
    try:
        with open_annotations(place) as file:
            start = file.read(SNIFFED)
    except EOFError:
        return "this is a compressed file that is cut short: get it again"
    except (OSError, lzma.LZMAError, zlib.error) as error:
        if is_denied(error):
            raise file_error(place, error) from None
        return f"it is compressed and damaged ({excerpt(str(error))}): get it again"
    return file_kinds.what_it_is_instead(start, expected)


def file_error(path: Output, error: OSError) -> DataError:
    """One line for an annotation file that cannot be opened."""
    why = error.strerror or excerpt(str(error))
    return DataError(f"annotations: {path}: {why}; check --root and the recipe's `annotations`")
