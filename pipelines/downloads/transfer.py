"""Get one file over HTTP: resumed, bounded, checked, whole or not at all.

The part that is there lies beside the file as `.NAME.part`, with the server's validator (`ETag`, or
`Last-Modified`) in `.NAME.part.json`; the rest is asked for with `Range` and `If-Range` (RFC 9110,
13.1.5 and 14.2), so a file that has changed meanwhile begins anew.
"""

from __future__ import annotations

import email.utils
import hashlib
import http.client
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from lapilli.data.errors import DataError
from lapilli.data.io.access import blame
from lapilli.data.io.file_kinds import SNIFFED, Expected, what_it_is_instead
from lapilli.data.io.whole_file import read_whole
from lapilli.data.record import excerpt

__all__ = ["ATTEMPTS", "Stopped", "Unreachable", "fetch", "part_of", "retry_seconds"]

CHUNK = 1 << 20
TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 6  # in a row without a byte more
BACKOFF = 1.0  # seconds before the second; doubled each time
LONGEST_WAIT = 300.0  # seconds that a server may ask for
BUSY = {408, 425, 429, 500, 502, 503, 504}
AGENT = "lapilli"


class Unreachable(DataError):
    """A file that cannot be got: one line why, and what to do."""


class Stopped(Exception):
    """The user has stopped it."""


def part_of(target: Path) -> Path:
    """The part of a file that is there."""
    return target.with_name(f".{target.name}.part")


class _Again(Exception):
    """What may go away: tried again after `seconds`, or after a wait that grows if None."""

    def __init__(self, why: str, seconds: float | None = None) -> None:
        super().__init__(why)
        self.seconds = seconds


@dataclass
class _Part:
    """A file that is not whole yet.

    Attributes:
        target: Where it goes.
        address: Where it comes from.
        linked: What a redirect of a model hub says of the file: size, and SHA-256 as its ETag.
    """

    target: Path
    address: str
    linked: dict[str, str]

    @property
    def path(self) -> Path:
        return part_of(self.target)

    @property
    def state(self) -> Path:
        return self.target.with_name(f".{self.target.name}.part.json")

    def known(self) -> tuple[int, str]:
        """Bytes that are there, and the validator of the file that they are of."""
        try:
            found: dict[str, Any] = json.loads(read_whole(self.state))
            if found["address"] == self.address and found["validator"]:
                return self.path.stat().st_size, str(found["validator"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return 0, ""

    def begin(self, validator: str) -> None:
        self.path.unlink(missing_ok=True)
        text = json.dumps({"address": self.address, "validator": validator})
        self.state.write_text(text, encoding="utf-8")

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)
        self.state.unlink(missing_ok=True)


def fetch(
    address: str,
    target: Path,
    kind: Expected,
    *,
    sha256: str = "",
    attempts: int = ATTEMPTS,
    on_bytes: Callable[[int, int | None], None] = lambda done, total: None,
    stop: threading.Event | None = None,
) -> int:
    """Get a file; goes on where an earlier call stopped.

    Args:
        address: `http://` or `https://`.
        target: Where it goes; its folder is there.
        kind: What it should be; a web page in its place is refused at once.
        sha256: Of the whole file, where it is known. A model hub's redirect says it too.
        attempts: How often in a row it is tried without a byte more.
        on_bytes: Called with the bytes that are there and, where the server says so, all.
        stop: Set from another thread to end it.

    Returns:
        The file's size.

    Raises:
        Unreachable: The server has no such file, keeps it back, or fails again and again; the file
            is another or of another kind. What was got stays for the next call where it may be
            the file's beginning.
        Stopped: `stop` was set.
        DataError: It cannot be written.
    """
    part = _Part(target, address, {})
    stop = stop or threading.Event()
    failures = 0
    while True:
        before = part.known()[0]
        try:
            _attempt(part, kind, on_bytes, stop)
            break
        except _Again as error:
            failures = failures + 1 if part.known()[0] <= before else 1
            if failures >= attempts:
                raise Unreachable(
                    f"{address}: {error}, {failures} times in a row; run the same command again "
                    "later, it goes on where it stopped"
                ) from None
            seconds = min(BACKOFF * 2 ** (failures - 1), 60.0)
            if error.seconds is not None:
                seconds = error.seconds
            if stop.wait(seconds):
                raise Stopped from None
    size = part.path.stat().st_size
    _check(part, size, kind, sha256 or part.linked.get("sha256", ""))
    with part.path.open("rb") as file:
        os.fsync(file.fileno())
    part.path.replace(target)
    part.state.unlink(missing_ok=True)
    return size


def _attempt(
    part: _Part,
    kind: Expected,
    on_bytes: Callable[[int, int | None], None],
    stop: threading.Event,
) -> None:
    """One request, from the bytes that are there to the end."""
    there, validator = part.known()
    total: int | None = None
    try:
        with _open(part, there, validator) as response:
            if response.status != 206 or _starts_at(response) != there:
                if response.status == 206:
                    part.forget()
                    raise _Again("the server sent another part than was asked for", 0.0)
                there = 0
            total = _total(response, there)
            try:
                if not there:
                    part.begin(_validator(response))
                with part.path.open("ab") as file:
                    there = _receive(response, file, there, total, part, kind, on_bytes, stop)
            except OSError as error:  # of the disk: those of the server are `_Again`
                raise DataError(blame(error, part.target) or str(error)) from None
    except urllib.error.HTTPError as error:
        if error.code == 416 and _size_of_refused(error) == there:
            return  # all of it is there
        _refuse(part, error)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as e:
        reason: object = getattr(e, "reason", e)
        raise _Again(f"no answer ({excerpt(str(reason) or type(e).__name__, 100)})") from None
    if total is not None and there < total:
        raise _Again(f"the connection ended after {there} of {total} bytes", 0.0)


def _receive(
    response: http.client.HTTPResponse,
    file: IO[bytes],
    there: int,
    total: int | None,
    part: _Part,
    kind: Expected,
    on_bytes: Callable[[int, int | None], None],
    stop: threading.Event,
) -> int:
    """Append what comes; the bytes that are there then."""
    is_first = there == 0
    on_bytes(there, total)
    while data := _read(response):
        if is_first and (instead := what_it_is_instead(data[:SNIFFED], kind)):
            part.forget()
            raise Unreachable(
                f"{part.address}: {instead}; get it by hand, or see that the address is still the "
                "one that is published"
            )
        is_first = False
        file.write(data)
        there += len(data)
        on_bytes(there, total)
        if stop.is_set():
            raise Stopped
    return there


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _Again(f"the connection broke ({type(error).__name__})", 0.0) from None


def _open(part: _Part, there: int, validator: str) -> http.client.HTTPResponse:
    headers = {"User-Agent": AGENT, "Accept-Encoding": "identity"}
    if there:
        headers |= {"Range": f"bytes={there}-", "If-Range": validator}
    request = urllib.request.Request(part.address, headers=headers)
    opener = urllib.request.build_opener(_Redirects(part.linked))
    return opener.open(request, timeout=TIMEOUT)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects to the web alone, and keep what they say of the file."""

    def __init__(self, linked: dict[str, str]) -> None:
        self._linked = linked

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """The request at the new address."""
        if urlsplit(newurl).scheme not in ("http", "https") or (
            urlsplit(req.full_url).scheme == "https" and urlsplit(newurl).scheme == "http"
        ):
            raise urllib.error.HTTPError(
                req.full_url, 403, f"redirected to {excerpt(newurl)}", headers, fp
            )
        digest = (headers.get("X-Linked-ETag") or "").strip('"')
        if re.fullmatch(r"[0-9a-f]{64}", digest):
            self._linked["sha256"] = digest
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _refuse(part: _Part, error: urllib.error.HTTPError) -> None:
    """Try again, or say why not."""
    if error.code in BUSY:
        seconds = retry_seconds(error.headers.get("Retry-After"), time.time())
        if seconds is not None and seconds > LONGEST_WAIT:
            raise Unreachable(
                f"{part.address}: the server asks to wait {seconds:.0f} s (HTTP {error.code}); run "
                "the same command again then"
            )
        raise _Again(f"the server is busy (HTTP {error.code})", seconds)
    if error.code == 416:
        part.forget()
        raise _Again("the server has fewer bytes than were got", 0.0)
    if error.code in (401, 403):
        why, remedy = f"not allowed ({excerpt(str(error.reason))})", "get it by hand, signed in"
    elif error.code < 400:
        why = f"a redirect that is not followed ({excerpt(str(error.reason))})"
        remedy = "see where it leads, and get it by hand"
    else:
        why, remedy = "not there", "see whether it has moved, and get it by hand"
    raise Unreachable(f"{part.address}: {why} (HTTP {error.code}); {remedy}")


def retry_seconds(text: str | None, now: float) -> float | None:
    """Seconds of a `Retry-After`, which is a number or a date; None without one or for neither."""
    if text is None:
        return None
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - now)
    except ValueError:
        return None


def _validator(response: http.client.HTTPResponse) -> str:
    """What `If-Range` may compare: a strong ETag, or a date."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def _starts_at(response: http.client.HTTPResponse) -> int | None:
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _total(response: http.client.HTTPResponse, there: int) -> int | None:
    length = response.headers.get("Content-Length", "")
    return there + int(length) if length.isdecimal() else None


def _size_of_refused(error: urllib.error.HTTPError) -> int | None:
    found = re.match(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _check(part: _Part, size: int, kind: Expected, sha256: str) -> None:
    """Look whether the whole file is the one that was meant; else it is removed."""
    wrong = ""
    with part.path.open("rb") as file:
        wrong = what_it_is_instead(file.read(SNIFFED), kind)
        if not wrong and kind == "annotations":
            file.seek(max(0, size - 64))
            if file.read(64).rstrip()[-1:] not in (b"]", b"}"):
                wrong = "this is the beginning of a JSON file: its end is missing"
    if not wrong and kind == "archive":
        try:
            zipfile.ZipFile(part.path).close()
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            wrong = f"this is no whole zip archive ({error})"
    if not wrong and sha256 and (found := _sha256(part.path)) != sha256:
        wrong = f"its SHA-256 is {found}, expected {sha256}"
    if wrong:
        part.forget()
        raise Unreachable(f"{part.address}: {wrong}; it was removed, run the same command again")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
