"""The one error of this package that a user can cause and mend."""

from __future__ import annotations

__all__ = ["TrainError"]


class TrainError(Exception):
    """A run that cannot start or go on: names the value, what was expected and what to do."""
