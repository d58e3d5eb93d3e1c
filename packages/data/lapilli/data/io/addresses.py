"""Addresses of stores: their root marked, and those with a user name or password rejected."""

from __future__ import annotations

import re

from lapilli.data.errors import DataError

__all__ = [
    "ROOT_MARK",
    "WEB",
    "hide_secrets",
    "plain_address",
    "refuse_address",
    "refuse_secrets",
    "refuse_web",
    "split_root",
]

# In the address of a source's files it stands behind the dataset's root, as in rsync --relative.
ROOT_MARK = "/./"

WEB = ("http", "https", "ftp")  # pages, which cannot be listed
# A user and a password, which may hold any letter, or a user alone, in front of the host; with one
# slash too, as `Path` leaves an address. Digits behind a colon are a port, unless an @, a host and
# a path follow. A key, token or signature behind a question mark.
_USER = (
    r"(?P<user>[a-z][a-z0-9+.-]*:/{1,2})"
    r"(?:[^/\s@?#'\":]*:(?!\d+(?:/(?![^\s'\"]*@[^\s'\"/@]+/)|$))[^\s'\"]*"
    r"|[^/\s@?#'\"]*)@"
)
_QUERY = (
    r"(?P<query>[?&](?:[\w-]*(?:token|secret|password|signature|credential|key)|sig)=)[^&\s'\"]*"
)
_SECRET = re.compile(f"{_USER}|{_QUERY}", re.IGNORECASE)


def split_root(address: str) -> tuple[str, str] | None:
    """Root and path below it of `s3://bucket/root/./images`; None where no root is marked."""
    root, mark, below = address.partition(ROOT_MARK)
    return (root, below.rstrip("/")) if mark else None


def plain_address(address: str) -> str:
    """An address without the mark of a root."""
    parts = split_root(address)
    return address if parts is None else "/".join(parts).rstrip("/")


def refuse_secrets(setting: str, value: str) -> None:
    """Refuse an address that holds a user, a password or a key: settings are written down.

    Raises:
        DataError: Names the setting and does not repeat the address.
    """
    if re.match(r"[a-z][a-z0-9+.-]*:/", value, re.IGNORECASE) and _SECRET.search(value):
        raise DataError(
            f"{setting}: an address with a user, password or key in it; take them out and put them "
            "into the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3://)"
        )


def hide_secrets(text: str) -> str:
    """A line in which addresses stand without their users, passwords and keys."""
    return _SECRET.sub(_starred, text)


def _starred(found: re.Match[str]) -> str:
    return f"{found['user']}***@" if found["user"] else f"{found['query']}***"


def refuse_web(setting: str, value: str) -> None:
    """Refuse an address of the web where files are listed or read by name.

    Raises:
        DataError: Names both.
    """
    if value.partition("://")[0].lower() in WEB and "://" in value:
        raise DataError(
            f"{setting}: {value!r} is on the web; download it and name the file or folder, or name "
            "a store (s3://, gs://)"
        )


def refuse_address(setting: str, value: str) -> None:
    """Refuse an address where a path of this machine is read or written.

    Raises:
        DataError: Names both.
    """
    if "://" in value:
        raise DataError(
            f"{setting}: {value!r} is an address; expected a path of this machine; copy what is "
            "there to a folder, or mount it"
        )
