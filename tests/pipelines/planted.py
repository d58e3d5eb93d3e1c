"""Written as `sitecustomize.py` before a build: an image format whose decoding ends the process.

A file is 8 bytes of magic, 8 of what is to happen, and the pixels of 8 x 8 in RGB.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile

__all__ = ["planted_image"]

MAGIC = b"PLANTED:"
FIRED = Path(__file__).with_name("fired")


def planted_image(what: str) -> bytes:
    """A file that does this when it is decoded."""
    return MAGIC + what.encode().ljust(8) + bytes(range(192))


tile: Any = vars(ImageFile)["_Tile"]  # a bare tuple is deprecated


class Planted(ImageFile.ImageFile):
    format = "PLANTED"
    format_description = "ends its process"

    def _open(self) -> None:
        assert self.fp is not None
        happen(self.fp.read(16)[8:].decode().strip())
        self._size, self._mode = (8, 8), "RGB"
        self.tile = [tile("raw", (0, 0, 8, 8), 16, ("RGB", 0, 1))]


def happen(what: str) -> None:
    """End this process, in one of the ways that there are, or take a moment."""
    if what == "segv":
        ctypes.string_at(0)
    elif what == "exit":
        os._exit(1)
    elif what == "hang":
        signal.setitimer(signal.ITIMER_REAL, 0.3)  # five minutes have passed
        while True:
            pass
    elif what == "slow":
        time.sleep(0.2)
    elif what == "kill" or (what == "once" and not FIRED.exists()):
        FIRED.touch()  # as the system does where memory is short
        os.kill(os.getpid(), signal.SIGKILL)


def _is_planted(prefix: bytes) -> bool:
    return prefix.startswith(MAGIC)


Image.register_open("PLANTED", Planted, _is_planted)
