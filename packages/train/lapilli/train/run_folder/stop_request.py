"""The file that asks a run to save a checkpoint and exit."""

from __future__ import annotations

from pathlib import Path

from lapilli.train.run_folder.names import STOP

__all__ = [
    "forget_stop",
    "is_stop_asked",
]


def is_stop_asked(run: Path) -> bool:
    """Whether the run was asked to save and exit."""
    return (run / STOP).exists()


def forget_stop(run: Path) -> None:
    """Remove a stop request made to an earlier start."""
    (run / STOP).unlink(missing_ok=True)
