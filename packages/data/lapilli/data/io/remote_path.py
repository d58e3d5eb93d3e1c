"""Output locations: a local folder or a prefix in an object store.

A `RemotePath` has the few methods of `pathlib.Path` that a build uses. A PUT is atomic: an object
is whole or not there. Every call is tried again a few times before it is an error.
"""

from __future__ import annotations

import contextlib
import fnmatch
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias, TypeVar

from fsspec.implementations.arrow import ArrowFSWrapper

from lapilli.data.errors import DataError
from lapilli.data.io.filesystems import (
    BY_PYARROW,
    is_remote,
    list_below,
    open_storage,
    split_address,
)
from lapilli.data.record import excerpt

__all__ = ["Output", "RemotePath", "open_output"]

Result = TypeVar("Result")
FOLDERS = ("file://", "local://")  # addresses of what has folders that must be there
ATTEMPTS = 6
FIRST_WAIT = 0.2  # seconds, doubled after each attempt: 6 s in all
# What another attempt is answered too, as pyarrow's client of S3 says it.
REFUSED = (
    "ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH",
    "INVALID_CLIENT_TOKEN_ID", "EXPIRED_TOKEN", "HTTP status 400", "HTTP status 401",
    "HTTP status 403",
)  # fmt: skip
COPY_BYTES = 8 * 2**20
TIMES = ("mtime", "LastModified", "updated", "created")  # as file systems call it


@dataclass(frozen=True)
class RemotePath:
    """An object, or a prefix of objects, such as `s3://bucket/datasets/llava15`."""

    address: str

    def __str__(self) -> str:
        """The address."""
        return self.address

    def __truediv__(self, name: str) -> RemotePath:
        """The path of `name` below this one."""
        return RemotePath(f"{self.address.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """The name after the last slash."""
        return self.address.rpartition("/")[2]

    def with_name(self, name: str) -> RemotePath:
        """The object `name` beside this one."""
        return RemotePath(f"{self.address.rpartition('/')[0]}/{name}")

    def resolve(self) -> RemotePath:
        """The address means the same on every machine."""
        return self

    def relative_to(self, folder: RemotePath) -> PurePosixPath:
        """The part of the path below `folder`."""
        return PurePosixPath(self.address.removeprefix(f"{folder.address.rstrip('/')}/"))

    @property
    def size(self) -> int | None:
        """Bytes of the object; None if it does not exist."""
        found = self.version()
        return None if found is None else found[0]

    def exists(self) -> bool:
        """Whether there is such an object, or one below it."""
        return self.size is not None or any(True for _ in self.files())

    def is_dir(self) -> bool:
        """Whether objects may lie below: everywhere but at an object."""
        return self.size is None

    def iterdir(self) -> Iterator[RemotePath]:
        """The objects below, at any depth: a store has no folders."""
        return self.files()

    def files(self) -> Iterator[RemotePath]:
        """The objects below this prefix."""
        return (path for path, _ in self._items())

    def versions(self) -> dict[str, tuple[int, str]]:
        """Bytes and time of change of the objects below, by their path below this prefix."""
        return {str(path.relative_to(self)): _version(item) for path, item in self._items()}

    def version(self) -> tuple[int, str] | None:
        """Bytes and time of change of the object; None if there is none."""
        try:
            found: dict[str, Any] = self._call("looked up", lambda fs, path: fs.info(path))
        except FileNotFoundError:
            return None
        return _version(found) if found["type"] == "file" else None

    def _items(self) -> Iterator[tuple[RemotePath, dict[str, Any]]]:
        """The objects below with what the store says of them."""
        scheme, prefix = split_address(self.address)

        def listed(fs: Any, path: str) -> list[dict[str, Any]]:
            if scheme in BY_PYARROW and isinstance(fs, ArrowFSWrapper):
                return list_below(fs, path)
            fs.invalidate_cache()
            return list(fs.ls(path, detail=True))

        try:
            found = self._call("listed", listed)
        except FileNotFoundError:
            return
        # Not `find`: it passes over a folder whose listing fails.
        for item in found:
            path = RemotePath(f"{scheme}://{item['name']}")
            if item["type"] == "directory":
                yield from path._items()  # pyright: ignore[reportPrivateUsage]
            elif item["name"].startswith(f"{prefix}/"):
                yield path, item

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """The objects below whose path matches; `*` may stand for slashes too."""
        for path in self.files():
            if fnmatch.fnmatchcase(str(path.relative_to(self)), pattern):
                yield path

    def sizes(self) -> dict[str, int]:
        """Bytes of each object below by its path relative to this one: one listing a folder."""
        return {str(path.relative_to(self)): int(item["size"]) for path, item in self._items()}

    def read_bytes(self) -> bytes:
        """The object's bytes."""
        data: bytes = self._call("read", lambda fs, path: fs.cat_file(path))
        return data

    def read_bounded(self, most: int) -> bytes | int:
        """The object's bytes; where it has more than `most`, their number."""

        def read(fs: Any, path: str) -> bytes | int:
            if scheme == "s3" and hasattr(fs, "cat_bounded"):
                return fs.cat_bounded(path, most)
            size = int(fs.info(path)["size"] or 0)
            return size if size > most else fs.cat_file(path)

        scheme = split_address(self.address)[0]
        return self._call("read", read)

    def read_text(self, encoding: str = "utf-8") -> str:
        """The object's text."""
        return self.read_bytes().decode(encoding)

    def read_with(self, read: Callable[[Any], Result]) -> Result:
        """What `read` makes of the object, opened for random access."""

        def opened(fs: Any, path: str) -> Result:
            with fs.open(path, "rb") as file:
                return read(file)

        return self._call("read", opened)

    def put(self, local: Path) -> None:
        """Store a local file as this object, whole or not at all."""

        def upload(sink: Any) -> None:
            with local.open("rb") as source:
                while data := source.read(COPY_BYTES):
                    sink.write(data)

        self._write(upload)

    def write_bytes(self, data: bytes) -> None:
        """Store these bytes as this object."""
        self._write(lambda sink: sink.write(data))

    def create(self, data: bytes) -> bool | None:
        """Store an object unless there is one; None where the store has no call for that.

        At `file://` the system decides; pyarrow's clients of S3 and GCS have no conditional PUT.
        """
        if not self.address.startswith(FOLDERS):
            return None
        path = Path(split_address(self.address)[1])
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                file.write(data)
        except FileExistsError:
            return False
        except OSError as error:
            raise DataError(
                f"{self.address}: cannot be written ({error.strerror}); choose another address"
            ) from None
        return True

    def copy_from(self, other: RemotePath) -> None:
        """Store another object's bytes as this object."""
        data = other.read_bytes()
        self._write(lambda sink: sink.write(data))

    def _write(self, write: Callable[[Any], object]) -> None:
        """Store what `write` writes; at file:// the folder above is made, as for a path.

        Raises:
            DataError: It cannot be stored.
        """

        def upload(fs: Any, path: str) -> None:
            if self.address.startswith(FOLDERS):
                with contextlib.suppress(FileExistsError):  # a file, which opening tells
                    fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            with fs.open(path, "wb") as sink:
                write(sink)

        try:
            self._call("written", upload)
        except FileNotFoundError as error:
            raise DataError(
                f"{self.address}: cannot be written ({excerpt(str(error), 300)}); make what it "
                "lies in, or choose another address"
            ) from None

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Remove the object."""
        try:
            self._call("removed", lambda fs, path: fs.rm_file(path))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def _call(self, verb: str, call: Callable[[Any, str], Result]) -> Result:
        """A call to the store, tried again where it fails, with a limit.

        Raises:
            DataError: It failed each time. What is not there is a FileNotFoundError at once.
        """
        scheme, path = split_address(self.address)
        wait = FIRST_WAIT
        for attempt in range(ATTEMPTS):
            try:
                return call(open_storage(scheme), path)
            except FileNotFoundError:
                raise
            except NotADirectoryError as error:  # a file where a folder is expected
                raise FileNotFoundError(*error.args, error.filename) from None
            except OSError as error:
                why = excerpt(str(error), 300)
                if any(word in why for word in REFUSED):
                    raise DataError(
                        f"{self.address}: cannot be {verb} ({why}); check bucket, credentials and "
                        "what they may do"
                    ) from None
                if attempt == ATTEMPTS - 1:
                    raise DataError(
                        f"{self.address}: cannot be {verb} after {ATTEMPTS} attempts ({why}); "
                        "check address, credentials and network and run the same command again"
                    ) from None
            time.sleep(wait)
            wait *= 2
        raise AssertionError("unreachable")


def _version(item: dict[str, Any]) -> tuple[int, str]:
    changed = next((item[name] for name in TIMES if item.get(name) is not None), "")
    return int(item["size"]), str(changed)


Output: TypeAlias = Path | RemotePath


def open_output(text: str) -> Output:
    """The folder or the store that a setting names; a folder as it is."""
    return RemotePath(text.rstrip("/")) if is_remote(text) else Path(text)
