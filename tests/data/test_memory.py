"""Memory that is used again: the system is not asked for the same pages twice."""

from __future__ import annotations

import platform
import subprocess
import sys

import numpy as np
import pytest

from lapilli.data.images.buffers import Room

FAULTS = """
import resource, sys
import numpy as np
from lapilli.data.images.buffers import keep_freed
if sys.argv[1] == "keep":
    assert keep_freed()
def work():
    for _ in range(20):  # a decoded photo, its canvas, and what is left of both
        photo, canvas = np.ones(900_000, np.uint8), np.ones(1_600_000, np.uint8)
        del photo, canvas
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")
def test_freed_blocks_are_taken_again_without_fresh_pages() -> None:
    def faults(mode: str) -> int:
        environment = {"MALLOC_MMAP_THRESHOLD_": "131072"} if mode == "plain" else None
        command = [sys.executable, "-c", FAULTS, mode]
        return int(subprocess.check_output(command, env=environment, text=True))

    assert faults("plain") > 1000
    assert faults("keep") < 100


def test_a_room_gives_the_same_memory_as_long_as_it_is_large_enough() -> None:
    room = Room()
    first = room.take(1000)
    assert np.shares_memory(first, room.take(600))
    assert room.take(2000).size == 2000
