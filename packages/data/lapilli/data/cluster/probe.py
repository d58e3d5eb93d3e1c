"""Probe a node: versions, cores, memory, disks, clock, and whether it sees a job's places."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lapilli.data.errors import DataError
from lapilli.data.io.remote_path import RemotePath
from lapilli.data.versions import ABSENT, installed_versions

__all__ = [
    "JobPlaces",
    "NodeReport",
    "Seen",
    "node_versions",
    "probe_node",
    "same_version",
    "seen",
    "store_seconds",
]  # fmt: skip

LIBRARIES = ("ray", "pyarrow", "numpy", "tokenizers", "torch", "transformers", "deepspeed")
PACKAGES = ("data", "model", "train")
TRIED = b"lapilli probes whether this can be written\n"


@dataclass(frozen=True)
class Seen:
    """A path as one machine sees it: bytes of a file, -1 for a folder, None where it is not."""

    path: str
    size: int | None


@dataclass(frozen=True)
class JobPlaces:
    """What a job reads and writes, as its driver sees it.

    Attributes:
        paths: By setting, files and folders that each node must see as the driver does.
        stores: Addresses that are read, by setting.
        written: Addresses that are written, by setting.
    """

    paths: Mapping[str, tuple[Seen, ...]] = field(default_factory=dict[str, tuple[Seen, ...]])
    stores: Mapping[str, str] = field(default_factory=dict[str, str])
    written: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, kw_only=True)
class NodeReport:
    """What a node has.

    Attributes:
        host: Its name.
        versions: `node_versions`.
        cores: That its processes may use.
        memory: Bytes.
        shm: Bytes free in /dev/shm.
        scratch: Bytes free where temporary files go.
        clock: Its time.
        hub: Bytes in the hub's cache; None without one.
        places: By setting, what it sees otherwise than the driver: a path, or a store's error.
        store: Seconds of a call to a store; None where none was named.
    """

    host: str
    versions: Mapping[str, str]
    cores: int
    memory: int
    shm: int
    scratch: int
    clock: float
    hub: int | None
    places: Mapping[str, str]
    store: float | None


def probe_node(places: JobPlaces) -> NodeReport:
    """Probe this machine."""
    wrong: dict[str, str] = {}
    for setting, paths in places.paths.items():
        for there in paths:
            if (here := seen(there.path)) != there:
                wrong.setdefault(setting, _difference(there, here))
    seconds: list[float] = []
    for stores, writes in ((places.stores, False), (places.written, True)):
        for setting, address in stores.items():
            try:
                seconds.append(store_seconds(address, writes=writes))
            except (DataError, OSError) as error:
                wrong.setdefault(setting, str(error))
    return NodeReport(
        host=socket.gethostname(),
        versions=node_versions(),
        cores=len(os.sched_getaffinity(0)),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        shm=_free("/dev/shm"),
        scratch=_free(os.environ.get("LAPILLI_SCRATCH") or tempfile.gettempdir()),
        clock=time.time(),
        hub=_hub_bytes(),
        places=wrong,
        store=max(seconds, default=None),
    )


def seen(path: str) -> Seen:
    """A path as this machine sees it."""
    try:
        found = Path(path)
        return Seen(path, -1 if found.is_dir() else found.stat().st_size)
    except OSError:
        return Seen(path, None)


def _difference(there: Seen, here: Seen) -> str:
    if here.size is None:
        return f"{there.path} is not there, as it is for the driver"
    if -1 in (here.size, there.size):
        return f"{there.path} is a {'folder' if here.size == -1 else 'file'} there and not here"
    return f"{there.path} has {here.size} bytes there, {there.size} here"


def store_seconds(address: str, *, writes: bool) -> float:
    """Seconds of the slowest call to a store: a small object is stored, read and removed.

    One that is read alone is listed.

    Raises:
        DataError: A call failed.
    """
    slowest, path = 0.0, RemotePath(address)
    if not writes:
        start = time.monotonic()
        next(iter(path.files()), None)
        return time.monotonic() - start
    tried = path / f".probe-{uuid.uuid4().hex}"
    with tempfile.NamedTemporaryFile() as file:
        file.write(TRIED)
        file.flush()
        for call in (lambda: tried.put(Path(file.name)), tried.read_bytes, tried.unlink):
            start = time.monotonic()
            try:
                call()
            except FileNotFoundError:
                raise DataError(
                    f"{address}: an object that was just stored is not there; expected a store "
                    "that gives back at once what it took"
                ) from None
            slowest = max(slowest, time.monotonic() - start)
    return slowest


def node_versions() -> dict[str, str]:
    """Versions of `LIBRARIES`, and a digest of the sources of each of lapilli's packages here."""
    return {**installed_versions(*LIBRARIES), **{f"lapilli.{n}": _digest(n) for n in PACKAGES}}


def _digest(package: str) -> str:
    spec = importlib.util.find_spec(f"lapilli.{package}")
    if spec is None or spec.origin is None:
        return ABSENT
    root, digest = Path(spec.origin).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _free(folder: str) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def _hub_bytes() -> int | None:
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    blobs = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    if not blobs.is_dir():
        return None
    return sum(path.stat().st_size for path in blobs.glob("*/blobs/*") if path.is_file())


def same_version(one: str, other: str) -> bool:
    """Whether two versions agree but for a build's tag, or one machine lacks the library."""
    return ABSENT in (one, other) or one.partition("+")[0] == other.partition("+")[0]
