"""Messages from workers to the driver: lines appended to `notes.txt`."""

from __future__ import annotations

import contextlib
from pathlib import Path

from lapilli.data.io.whole_file import MOST_LINES, read_whole
from lapilli.train.run_folder.names import NOTES

__all__ = [
    "note",
    "notes_end",
    "notes_from",
]


def note(run: Path, text: str) -> None:
    """Append one line. Lines of several workers do not mix, as each is one write."""
    with contextlib.suppress(OSError), (run / NOTES).open("a", encoding="utf-8") as file:
        file.write(" ".join(text.split()) + "\n")


def notes_end(run: Path) -> int:
    """The byte position of the end of the file."""
    return (run / NOTES).stat().st_size if (run / NOTES).exists() else 0


def notes_from(run: Path, position: int) -> tuple[list[str], int]:
    """Read the whole lines from a byte position on; also returns the next position."""
    try:
        data = read_whole(run / NOTES, MOST_LINES)[position:]
    except FileNotFoundError:
        return [], position
    whole = data[: data.rfind(b"\n") + 1]
    return whole.decode("utf-8", "replace").split("\n")[:-1], position + len(whole)
