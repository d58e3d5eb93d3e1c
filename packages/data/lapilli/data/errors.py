"""The exception for a user's mistake in data, settings or files."""

from __future__ import annotations

__all__ = ["DataError"]


class DataError(Exception):
    """A user's mistake or a damaged input: names the value, what was expected and what to do.

    The pipelines turn it into one line and exit code 2. It carries nothing but its message, so it
    crosses process borders (Ray pickles exceptions) unchanged.
    """
