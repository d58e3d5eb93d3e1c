"""Hold a prefix of a store for one process: a lease that is renewed, and expires with its owner.

No clock of two machines is compared: who finds a lease watches whether it is renewed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import socket
import threading
import time
import uuid
import warnings
from _thread import interrupt_main
from collections.abc import Generator
from dataclasses import asdict, dataclass, replace

from lapilli.data.errors import DataError
from lapilli.data.io.remote_path import RemotePath
from lapilli.data.io.typed_json import JsonError, from_json
from lapilli.data.io.whole_file import read_whole
from lapilli.data.record import excerpt

__all__ = ["EXPIRES", "LEASE", "RENEW_EVERY", "SETTLE", "Lease", "leased"]

LEASE = ".lock"  # the object, named as a folder's lock is
RENEW_EVERY = 5.0  # seconds
EXPIRES = 60.0  # seconds without a renewal after which an owner is dead
LONG_GONE = 3600.0  # seconds by this machine's clock, whatever the other's shows: not watched
SETTLE = 0.5  # seconds between taking a lease and looking whether another did too
_OWN: set[str] = set()  # tokens that this process holds or is about to take
MOST_BYTES = 1 << 16
LOOK_EVERY = 0.5  # seconds between two looks at a lease of somebody else


@dataclass(frozen=True)
class Lease:
    """What the object says.

    Attributes:
        host: The owner's machine.
        pid: The owner's process there.
        token: The owner's own name of this lease.
        renewals: How often it has been renewed.
        time: When, by the owner's clock.
    """

    host: str
    pid: int
    token: str
    renewals: int
    time: float

    @property
    def is_left(self) -> bool:
        """Whether its owner is known to be dead: a process of this machine, or long gone."""
        if self.host == socket.gethostname():
            if self.pid == os.getpid():
                return self.token not in _OWN
            try:
                os.kill(self.pid, 0)
            except ProcessLookupError:
                return True
            except OSError:
                pass
        return time.time() - self.time > LONG_GONE


@contextlib.contextmanager
def leased(prefix: RemotePath, doing: str, setting: str = "output") -> Generator[None]:
    """Hold a prefix from before the first write to the end, and renew it meanwhile.

    At `file://` a free lease is made by a call that fails where there is one. pyarrow's S3 and GCS
    clients have no such call: there, and where a dead owner's is taken over, the object is read
    again after `SETTLE` seconds, so that one of two that took it at once ends. An owner that was
    paused until its lease expired finds that at its next renewal and is interrupted.

    Args:
        prefix: What is written.
        doing: What is done to it, for the line: `built`, `trained`.
        setting: What names it.

    Raises:
        DataError: Another process holds it, or took it over.
    """
    path = prefix / LEASE
    lease = _take(path, f"{setting}: {prefix} is being {doing}")
    stop, lost = threading.Event(), threading.Event()

    def renew() -> None:
        current = lease
        while not stop.wait(RENEW_EVERY):
            try:
                found = _read(path)
                if found is None or found.token != lease.token:
                    lost.set()
                    if not stop.is_set():
                        interrupt_main()
                    return
                current = _renewed(current)
                _write(path, current)
            except DataError:  # the store is away; the next renewal tells
                continue

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if lost.is_set():
            raise _lost(prefix, setting) from None
        raise
    finally:
        stop.set()
        _joined(thread, lost)
        _OWN.discard(lease.token)
        with contextlib.suppress(DataError):  # it expires
            if (found := _read(path)) and found.token == lease.token:
                path.unlink(missing_ok=True)
            else:
                lost.set()
    if lost.is_set():
        raise _lost(prefix, setting)


def _joined(thread: threading.Thread, lost: threading.Event) -> None:
    """Wait for a thread's end, through the interrupt that it may just have sent."""
    try:
        thread.join()
    except KeyboardInterrupt:
        if not lost.is_set():
            raise
        thread.join()


def _lost(prefix: RemotePath, setting: str) -> DataError:
    return DataError(
        f"{setting}: {prefix} was taken over by another process while this one did not answer for "
        f"{EXPIRES:.0f} s; look which of the two is to go on"
    )


def _take(path: RemotePath, line: str) -> Lease:
    """A lease of this process, after one of a dead owner has expired."""
    if (found := _read(path)) and not found.is_left and not _expires(path, found, line):
        found = None
    own = Lease(
        host=socket.gethostname(), pid=os.getpid(), token=uuid.uuid4().hex, renewals=0,
        time=time.time(),
    )  # fmt: skip
    _OWN.add(own.token)
    is_made = path.create(_bytes(own)) if found is None else None
    if is_made is None:  # a dead owner's, or a store that cannot tell
        path.write_bytes(_bytes(own))
        time.sleep(SETTLE)
    now = _read(path)
    if now is not None and now.token != own.token:
        raise _held(now, line)
    return own


def _expires(path: RemotePath, found: Lease, line: str) -> bool:
    """Wait until a lease has expired, or is gone: then False.

    Raises:
        DataError: It is renewed: its owner lives.
    """
    began, is_told = time.monotonic(), False
    while time.monotonic() - began < EXPIRES:
        time.sleep(LOOK_EVERY)
        now = _read(path)
        if now is None:
            return False
        if now != found:
            raise _held(now, line)
        if not is_told and time.monotonic() - began > SETTLE + 2 * RENEW_EVERY:
            is_told = True
            warnings.warn(
                f"{_owned(found, line)}, which does not renew its lease; it expires after "
                f"{EXPIRES:.0f} s",
                stacklevel=2,
            )
    return True


def _owned(lease: Lease, line: str) -> str:
    return f"{line} by process {lease.pid} on {excerpt(lease.host)}"


def _held(lease: Lease, line: str) -> DataError:
    return DataError(f"{_owned(lease, line)}; wait for it or choose another address")


def _read(path: RemotePath, *, again: bool = True) -> Lease | None:
    """The lease that is there, None for none; an object that is none is one of an unknown owner.

    At `file://` one may be seen while it is written, so such an object is read `again`.
    """
    try:
        data = read_whole(path, MOST_BYTES)
    except FileNotFoundError:
        return None
    try:
        return from_json(data, Lease)
    except JsonError:
        if again:
            time.sleep(0.05)
            return _read(path, again=False)
        token = hashlib.sha256(data).hexdigest()
        return Lease(host="an unknown machine", pid=0, token=token, renewals=0, time=math.inf)


def _renewed(lease: Lease) -> Lease:
    return replace(lease, renewals=lease.renewals + 1, time=time.time())


def _write(path: RemotePath, lease: Lease) -> None:
    path.write_bytes(_bytes(lease))


def _bytes(lease: Lease) -> bytes:
    return json.dumps(asdict(lease)).encode()
