"""The exception for a user's mistake in a model's settings or files."""

from __future__ import annotations

import errno
from pathlib import Path

__all__ = [
    "ModelError",
    "require_missing",
]


class ModelError(Exception):
    """A model that cannot be put together: names the value, what was expected and what to do."""


def require_missing(path: Path, error: OSError) -> None:
    """Re-raise an error unless it says that the file is missing.

    Raises:
        ModelError: The file is there, or may be, and cannot be read.
    """
    if error.errno not in (errno.ENOENT, errno.ENOTDIR):
        raise ModelError(
            f"{path}: cannot be read ({error.strerror}); give this user permission to read it, or "
            "check the disk"
        ) from None
