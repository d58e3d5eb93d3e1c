"""Reuse memory between shards instead of returning it to the system.

Fresh pages have to be cleared, and a virtual machine may have to ask its host for them: up to half
of an image's time.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import resource
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["Room", "keep_freed", "peak_resident"]

# mallopt's settings, from malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BLOCK = 32 << 20  # the most that glibc takes: a photo of 8 megapixels in Pillow's memory
KEPT_BYTES = 128 << 20


class Room:
    """Memory for a shard's pixels that the next shard uses again."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def take(self, size: int) -> NDArray[np.uint8]:
        """uint8 [size], reusing the memory of the previous call."""
        if self._memory.size < size:
            self._memory = np.empty(size, np.uint8)
        return self._memory[:size]


@functools.cache
def keep_freed() -> bool:
    """Make glibc keep freed memory: blocks up to `KEPT_BLOCK`, `KEPT_BYTES` in all.

    By default it may return the canvas of every photo to the system and request it again, 600 pages
    an image of 640x480, in some runs and not in others. Other allocators are left as they are.

    Returns:
        Whether this process has glibc's.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, KEPT_BLOCK) and mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))


def peak_resident() -> int:
    """Peak resident memory of this process in bytes.

    Read from VmHWM on Linux, where getrusage starts from the peak of the parent process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
