"""A temporary folder that every user may enter, for tests that run as a user without rights."""

from __future__ import annotations

import stat
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["is_open", "open_directory"]


def is_open(folder: Path) -> bool:
    """Whether every user may enter a folder and those above it."""
    return all(path.stat().st_mode & stat.S_IXOTH for path in (folder, *folder.parents))


@contextmanager
def open_directory() -> Generator[Path]:
    """Make a folder below the first temporary place that is open; it is removed at the end."""
    places = [Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")]  # the first may be ours
    above = next((place for place in places if place.is_dir() and is_open(place)), None)
    if above is None:
        pytest.skip("no temporary folder here may be entered by every user")
    with tempfile.TemporaryDirectory(prefix="lapilli-test-", dir=above) as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
