"""Save and exit on Ctrl-C or SIGTERM; exit at once on the second.

The driver requests a stop by a file in the run's folder. Rank 0 checks for it at every step and
shares it with the loss, so that all ranks save after the same step.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from lapilli.train.run_folder.names import STOP
from lapilli.train.run_folder.stop_request import is_stop_asked

__all__ = [
    "stops_on_signals",
]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stops_on_signals(run: Path, on_stop: Callable[[], None]) -> Generator[None]:
    """Ask the run to save and end at the first Ctrl-C or SIGTERM; a second one is an exception.

    Outside of the main thread, signal handlers are left unchanged.

    Args:
        run: The run's folder.
        on_stop: Called at the first signal.

    Raises:
        KeyboardInterrupt: From the main thread, at the second signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        del number, frame
        if is_stop_asked(run):
            raise KeyboardInterrupt
        (run / STOP).touch()
        on_stop()

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
