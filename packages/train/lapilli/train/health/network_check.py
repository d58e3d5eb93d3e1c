"""Measure the workers' network, disks and clocks before step 0."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from lapilli.data.io.atomic import write_json
from lapilli.train.device import synchronize
from lapilli.train.run_folder.messages import note
from lapilli.train.run_folder.names import WORKERS

__all__ = [
    "Worker",
    "probe_line",
    "probe_warnings",
    "probe_workers",
    "save_warning",
]

SIZES = (1 << 16, 1 << 20, 1 << 24)  # bytes reduced
REPEATS = 3
WRITTEN = 64 << 20  # bytes
CHUNK = 4 << 20
PATIENCE = 1.0  # seconds that writing may take; a slow disk is known after less
FAR = 0.5  # of the median link: what is slower is named
SKEW = 1.0  # seconds


@dataclass(frozen=True)
class Worker:
    """What one worker measured.

    Attributes:
        rank: Its number.
        host: Its machine's name.
        clock: Seconds its clock is ahead of rank 0's, to about a millisecond.
        reduced: Bytes a second of an all-reduce's largest size, as bus bandwidth: times
            2 (n - 1) / n, what each link carries (NCCL tests' formula); 0 for one worker.
        link: Bytes a second it receives from the rank before it, all ranks at once; 0 for one.
        written: Bytes a second written to the run's folder and flushed; rank 0 alone, else 0.
    """

    rank: int
    host: str
    clock: float
    reduced: float
    link: float
    written: float


def probe_workers(run: Path, device: torch.device, rank: int, world_size: int) -> list[Worker]:
    """Measure; rank 0 writes `workers.json` and says it in a line. Collective.

    Returns:
        All workers, on every rank.
    """
    is_alone = world_size == 1
    mine = Worker(
        rank=rank,
        host=platform.node(),
        clock=0.0 if is_alone else _clock(device, rank, world_size),
        reduced=0.0 if is_alone else _reduce(device, world_size),
        link=0.0 if is_alone else _receive(device, rank, world_size),
        written=_write(run) if rank == 0 else 0.0,
    )
    workers: list[Any] = [mine]
    if not is_alone:
        workers = [None] * world_size
        dist.all_gather_object(workers, mine)
    if rank == 0:
        write_json(run / WORKERS, {"workers": [asdict(worker) for worker in workers]})
        for line in (probe_line(workers), *probe_warnings(workers)):
            note(run, line)
    return workers


def _clock(device: torch.device, rank: int, world_size: int) -> float:
    """This clock's lead over rank 0's: both are read after an all-reduce, the median of five."""
    leads: list[float] = []
    for _ in range(5):
        dist.all_reduce(torch.zeros(1, device=device))
        synchronize(device)
        times: list[Any] = [None] * world_size
        dist.all_gather_object(times, time.time())
        leads.append(times[rank] - times[0])
    return median(leads)


def _reduce(device: torch.device, world_size: int) -> float:
    best = 0.0
    for size in SIZES:
        values = torch.zeros(size // 4, device=device)
        for _ in range(REPEATS):
            synchronize(device)
            start = time.monotonic()
            dist.all_reduce(values)
            synchronize(device)
            seconds = time.monotonic() - start
            best = max(best, size * 2 * (world_size - 1) / world_size / seconds)
    return best


def _receive(device: torch.device, rank: int, world_size: int) -> float:
    """Everybody sends to the next rank at once; a slow link is slow for its two ends alone."""
    best = 0.0
    sent = torch.zeros(SIZES[1] // 4, device=device)
    received = torch.empty_like(sent)
    after, before = (rank + 1) % world_size, (rank - 1) % world_size
    for _ in range(REPEATS):
        synchronize(device)
        start = time.monotonic()
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, sent, after), dist.P2POp(dist.irecv, received, before)]
        )
        for work in works:
            work.wait()
        synchronize(device)
        best = max(best, SIZES[1] / (time.monotonic() - start))
    return best


def _write(run: Path) -> float:
    """Bytes a second written and flushed, for at most about `PATIENCE` seconds."""
    path = run / f".probe-{os.getpid()}"
    chunk = os.urandom(CHUNK)
    written = 0
    start = time.monotonic()
    try:
        with path.open("wb", buffering=0) as file:
            while written < WRITTEN and time.monotonic() - start < PATIENCE:
                written += file.write(chunk)
                os.fsync(file.fileno())
        return written / (time.monotonic() - start)
    except OSError:
        return 0.0  # a full disk; reported where it stops something
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def probe_line(workers: Sequence[Worker]) -> str:
    """What was measured, in a line."""
    hosts = len({worker.host for worker in workers})
    disk = f"disk {workers[0].written / 1e6:,.0f} MB/s"
    if len(workers) == 1:
        return f"1 worker: {disk}"
    slowest = min(worker.reduced for worker in workers)
    apart = max(abs(worker.clock) for worker in workers)
    return (
        f"{len(workers)} workers on {hosts} host{'s' if hosts > 1 else ''}: all-reduce "
        f"{slowest / 1e9:.2f} GB/s, {disk}, clocks within {apart * 1e3:.1f} ms"
    )


def probe_warnings(workers: Sequence[Worker]) -> list[str]:
    """One line for each rank that is far off, with what to do."""
    found = [
        f"rank {worker.rank} on {worker.host}: its clock is {abs(worker.clock):.1f} s "
        f"{'ahead of' if worker.clock > 0 else 'behind'} rank 0's; start chrony or ntp there, or "
        "times in logs and files mislead"
        for worker in workers
        if abs(worker.clock) > SKEW
    ]
    usual = median(worker.link for worker in workers)
    found += [
        f"rank {worker.rank} on {worker.host} receives {worker.link / 1e9:.2f} GB/s from rank "
        f"{(worker.rank - 1) % len(workers)}, the usual is {usual / 1e9:.2f}; look at the network "
        "between the two machines (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME choose the interface)"
        for worker in workers
        if worker.link < FAR * usual
    ]
    return found


def save_warning(
    workers: Sequence[Worker], size: int, step_seconds: float, every: int
) -> str | None:
    """A line if a checkpoint takes longer to write than the steps between two; else None.

    Args:
        workers: What was measured; rank 0 writes.
        size: Bytes of a checkpoint.
        step_seconds: Seconds of a step.
        every: Steps between checkpoints.
    """
    speed = workers[0].written
    if not speed or size / speed <= every * step_seconds:
        return None
    fits = int(size / speed / step_seconds) + 1
    return (
        f"a checkpoint of {size / 1e9:.1f} GB takes {size / speed:.0f} s to write at "
        f"{speed / 1e6:,.0f} MB/s, {every} steps take {every * step_seconds:.0f} s: "
        f"training will wait for the disk; set checkpoint.every to {fits} or more"
    )
