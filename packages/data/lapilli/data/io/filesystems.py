"""File systems by address: pyarrow's own for s3:// and gs://, fsspec for the others.

pyarrow is here anyway and brings both clients, so that reading a bucket needs no further package.
Credentials and endpoint come from the environment, as everywhere: AWS_ACCESS_KEY_ID,
AWS_REGION, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fsspec.implementations.arrow import ArrowFSWrapper

from lapilli.data.errors import DataError
from lapilli.data.io.addresses import WEB, refuse_secrets
from lapilli.data.record import excerpt

__all__ = [
    "BY_PYARROW",
    "is_remote",
    "list_below",
    "open_storage",
    "split_address",
]

Result = TypeVar("Result")
BY_PYARROW = ("s3", "gs", "gcs")
# What names files of AWS's own programs with credentials, which obstore does not read.
PROFILES = ("AWS_PROFILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE")
# A large image over a slow line takes long, an answer's beginning does not.
CLIENT = {"timeout": "600s", "connect_timeout": "5s", "allow_http": True}
RETRIES = {"max_retries": 2}  # then pyarrow tries


def split_address(address: str) -> tuple[str, str]:
    """`s3://bucket/a/b` to the scheme and the rest, without a slash at the end.

    Raises:
        DataError: It has a user or password in it.
    """
    refuse_secrets("address", address)
    scheme, _, path = address.partition("://")
    return scheme, path.rstrip("/")


@functools.lru_cache(maxsize=8)
def open_storage(scheme: str) -> Any:
    """The fsspec file system of an address's scheme, one a process.

    Raises:
        DataError: No such scheme, or its package is not installed.
    """
    if scheme in BY_PYARROW:
        return _by_pyarrow(scheme)
    if scheme in WEB:
        raise DataError(
            f"{scheme}:// is the web, whose files cannot be listed; download them to a folder, or "
            "name a store (s3://, gs://)"
        )
    import fsspec

    try:
        return fsspec.filesystem(scheme)
    except (ImportError, ValueError) as error:
        raise DataError(
            f"{scheme}:// cannot be read ({excerpt(str(error))}); install the fsspec package for "
            "it, or copy the files to a folder"
        ) from None


def _by_pyarrow(scheme: str) -> Any:
    if scheme == "s3":
        return _S3Files()
    from pyarrow.fs import GcsFileSystem

    return ArrowFSWrapper(GcsFileSystem())


def list_below(files: Any, path: str) -> list[dict[str, Any]]:
    """The objects at any depth below a path of pyarrow's client, by one call for 1,000 of them.

    Raises:
        FileNotFoundError: There is none.
        OSError: They cannot be listed.
    """
    from pyarrow.fs import FileSelector, FileType

    found: Any = files.fs.get_file_info(FileSelector(path, recursive=True))
    return [
        {"name": one.path, "size": one.size, "type": "file", "mtime": one.mtime}
        for one in found
        if one.type is FileType.File
    ]


def is_remote(path: str) -> bool:
    """Whether a path is an address such as `s3://bucket/images`."""
    return "://" in path


class _S3Files(ArrowFSWrapper):
    """pyarrow's client of S3; with obstore an object is read whole, or removed, by one call.

    pyarrow asks for an object's size before it reads or removes it, and stores a mark of the folder
    after that. Where credentials come from the environment or from the machine, obstore sends the
    call alone; what fails there is done by pyarrow, so that errors are said by one client.
    """

    cachable = False  # one for each environment: the caller keeps it

    def __init__(self) -> None:
        from pyarrow.fs import S3FileSystem

        self._buckets: dict[str, Any] = {}
        if _endpoint():
            # The SDK's own checksums come in chunks without a length, which other servers refuse.
            os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        # Delayed opening makes a small object one PUT instead of the three calls of an upload in
        # parts. Writing in the background was seen to hang with it.
        super().__init__(
            S3FileSystem(
                endpoint_override=_endpoint(), allow_delayed_open=True, background_writes=False
            )
        )

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any
    ) -> bytes:
        """An object's bytes, or a part of them.

        Raises:
            FileNotFoundError: There is none.
            OSError: It cannot be read.
        """
        data: Any = None
        if start is None and end is None:
            data = self._one_call(path, lambda store, key: store.get(key).bytes().to_bytes())
        if data is None:
            data = super().cat_file(path, start, end, **kwargs)
        return data

    def cat_bounded(self, path: str, most: int) -> bytes | int:
        """An object's bytes; where it has more than `most`, their number.

        Raises:
            FileNotFoundError, OSError: As `cat_file`.
        """

        def read(store: Any, key: str) -> bytes | int:
            found = store.get(key)
            size: int = found.meta["size"]
            return size if size > most else found.bytes().to_bytes()

        data: bytes | int | None = self._one_call(path, read)
        if data is None:
            size = int(self.info(path)["size"] or 0)
            data = size if size > most else self.cat_file(path)
        return data

    def rm_file(self, path: str) -> None:
        """Remove an object; with obstore one that is not there is no error.

        Raises:
            FileNotFoundError, OSError: It cannot be removed.
        """

        def remove(store: Any, key: str) -> bool:
            store.delete(key)
            return True

        if not self._one_call(path, remove):
            super().rm_file(path)

    def _one_call(self, path: str, call: Callable[[Any, str], Result]) -> Result | None:
        """What obstore gives for an object; None where pyarrow is to be asked.

        Raises:
            FileNotFoundError: There is no such object.
        """
        bucket, _, key = str(path).partition("/")
        if (store := self._bucket(bucket)) is None:
            return None
        from obstore.exceptions import BaseError

        try:
            return call(store, key)
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None
        except (BaseError, OSError, ValueError):
            return None

    def _bucket(self, name: str) -> Any:
        """Give obstore's client of a bucket, or None where pyarrow is to be asked."""
        if name not in self._buckets:
            self._buckets[name] = None if _has_profile() else _client(name, self.fs.region)
        return self._buckets[name]


def _endpoint() -> str | None:
    """The address of the server; None for Amazon's."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _has_profile() -> bool:
    """Whether credentials are looked up in files of AWS's own programs."""
    if "AWS_ACCESS_KEY_ID" in os.environ:
        return False
    files = (Path.home() / ".aws" / name for name in ("credentials", "config"))
    return any(name in os.environ for name in PROFILES) or any(path.exists() for path in files)


def _client(bucket: str, region: str) -> Any:
    try:
        from obstore.exceptions import BaseError
        from obstore.store import S3Store
    except ImportError:
        return None
    settings: Any = {"region": region, "client_options": CLIENT, "retry_config": RETRIES}
    if server := _endpoint():
        settings["endpoint"] = server
    try:
        return S3Store(bucket, **settings)
    except (BaseError, ValueError):  # a name that is no bucket's
        return None
