"""Call a progress callback about once a second."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

__all__ = ["paced"]


def paced(on_progress: Callable[[int], None], seconds: float = 1.0) -> Callable[[int], None]:
    """A function to call after every record, which forwards at most one call in `seconds`.

    Args:
        on_progress: Called with the number it is given.
        seconds: Least time between two calls; the first comes so long after this one.
    """
    last = monotonic()

    def told(done: int) -> None:
        nonlocal last
        now = monotonic()
        if now - last >= seconds:
            last = now
            on_progress(done)

    return told
