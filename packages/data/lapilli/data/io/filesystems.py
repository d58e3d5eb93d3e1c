"""File systems by address: pyarrow's own for s3:// and gs://, fsspec for the others.

pyarrow is here anyway and brings both clients, so that reading a bucket needs no further package.
Credentials and endpoint come from the environment, as everywhere: AWS_ACCESS_KEY_ID,
AWS_REGION, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from lapilli.data.errors import DataError
from lapilli.data.io.addresses import WEB, refuse_secrets
from lapilli.data.record import excerpt

__all__ = [
    "is_remote",
    "open_storage",
    "split_address",
]

BY_PYARROW = ("s3", "gs", "gcs")


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
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow.fs import GcsFileSystem, S3FileSystem

    if scheme != "s3":
        return ArrowFSWrapper(GcsFileSystem())
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        # The SDK's own checksums come in chunks without a length, which other servers refuse.
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    # Delayed opening makes a small object one PUT instead of the three calls of an upload in parts.
    # Writing in the background was seen to hang with it.
    return ArrowFSWrapper(
        S3FileSystem(endpoint_override=endpoint, allow_delayed_open=True, background_writes=False)
    )


def is_remote(path: str) -> bool:
    """Whether a path is an address such as `s3://bucket/images`."""
    return "://" in path
