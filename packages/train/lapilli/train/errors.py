"""The exception for a user's mistake in a run's settings or files."""

from __future__ import annotations

__all__ = ["TrainError"]


class TrainError(Exception):
    """A run that cannot start or go on: names the value, what was expected and what to do."""
