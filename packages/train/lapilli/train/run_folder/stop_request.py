"""The file that asks a run to save a checkpoint and exit."""

from __future__ import annotations

from pathlib import Path

from lapilli.train.run_folder.names import STOP

__all__ = [
    "forget_stop",
    "is_stop_asked",
]


def is_stop_asked(run: Path) -> bool:
    """Whether somebody wants the run to save and end."""
    return (run / STOP).exists()


def forget_stop(run: Path) -> None:
    """What an earlier start was asked does not hold for this one."""
    (run / STOP).unlink(missing_ok=True)
