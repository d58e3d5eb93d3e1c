"""Cores and memory that control groups leave a process. Needs Python alone."""

from __future__ import annotations

from pathlib import Path

__all__ = ["cgroup_limits", "words_of"]


def cgroup_limits(mounted: Path, listing: str) -> tuple[float | None, int | None]:
    """Cores and bytes that control groups leave this process, None where they set no limit.

    Args:
        mounted: Where they are mounted, `/sys/fs/cgroup`.
        listing: `/proc/self/cgroup`; lines of number, controllers (none in version 2) and path.
    """
    cores: list[float] = []
    memory: list[int] = []
    for line in listing.splitlines():
        _, controllers, path = line.split(":", 2)
        base = mounted / controllers if controllers else mounted
        own = base / path.strip("/")
        for folder in (own, *own.parents):
            if not folder.is_relative_to(base):
                break
            quota = words_of(folder / "cpu.max") or (
                words_of(folder / "cpu.cfs_quota_us") + words_of(folder / "cpu.cfs_period_us")
            )
            if len(quota) == 2 and quota[0] not in ("max", "-1"):
                cores.append(int(quota[0]) / int(quota[1]))
            limits = words_of(folder / "memory.max") or words_of(folder / "memory.limit_in_bytes")
            memory += [int(limit) for limit in limits if limit != "max"]
    return min(cores, default=None), min(memory, default=None)


def words_of(file: Path) -> list[str]:
    """The words of a small file of the kernel's; none where it cannot be read."""
    try:
        return file.read_text().split()
    except OSError:
        return []
