"""Which files a source's annotations are, and what a file is that is not what it should be."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from lapilli.data.access import exists, is_denied, subpaths
from lapilli.data.config import SourceConfig
from lapilli.data.errors import DataError

__all__ = ["annotation_files", "file_error", "what_it_is_instead"]

# What lies under an annotation file's name when a download went wrong, and the way out.
MISTAKEN = {
    b"<": "this is a web page: download the raw file (/resolve/ in its address, not /blob/)",
    b"version https://git-lfs": "this is a pointer to the file: fetch it with `git lfs pull`",
}


def annotation_files(config: SourceConfig, root: Path) -> list[Path]:
    """The files of a source in order: those named, and of a glob all that match, sorted.

    Raises:
        DataError: A glob matches nothing, or a file is named twice.
    """
    found: list[Path] = []
    for pattern in config.patterns:
        if not glob.has_magic(pattern) or exists(root / pattern):
            found.append(root / pattern)
            continue
        _require_listable(root / pattern)
        # Path.glob takes no absolute pattern.
        names = sorted(glob.glob(pattern, root_dir=root, recursive=True))  # noqa: PTH207
        if not names:
            raise DataError(
                f"annotations: no file matches {pattern!r} below {root}; check --root and the "
                f"`annotations` of source {config.name}"
            )
        found += [root / name for name in names]
    twice = next((path for path in found if found.count(path) > 1), None)
    if twice is not None:
        raise DataError(
            f"annotations: {twice} is named twice in source {config.name}; name it once "
            "(`mixture.epochs` repeats a source)"
        )
    return found


def _require_listable(pattern: Path) -> None:
    """Stop at a folder that may not be listed: `glob` would find nothing in it and say nothing.

    Raises:
        DataError: Names the folder.
    """
    parts = pattern.parts
    first = next(n for n, part in enumerate(parts) if glob.has_magic(part))
    start = Path(*parts[:first])
    if first == len(parts) - 1:
        subpaths(start)
        return

    def stop(error: OSError) -> None:
        if is_denied(error):
            raise file_error(Path(error.filename or start), error) from None

    deepest = None if "**" in parts else len(parts) - 1 - first
    for folder, below, _ in os.walk(start, onerror=stop):
        if deepest is not None and len(Path(folder).relative_to(start).parts) >= deepest:
            below.clear()


def what_it_is_instead(path: Path) -> str:
    """What a file obviously is that should be annotations, with what to do; "" if unknown.

    Raises:
        DataError: The file cannot be opened.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError as error:
        raise file_error(path, error) from None
    return next((text for begin, text in MISTAKEN.items() if start.startswith(begin)), "")


def file_error(path: Path, error: OSError) -> DataError:
    """One line for an annotation file that cannot be opened."""
    return DataError(
        f"annotations: {path}: {error.strerror}; check --root and the recipe's `annotations`"
    )
