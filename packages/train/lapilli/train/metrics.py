"""metrics.jsonl: one line a step, whatever happened to the run in between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["METRICS", "MetricsFile", "read_metrics", "read_new"]

METRICS = "metrics.jsonl"


class MetricsFile:
    """Appends steps; opened at a resumed step it first forgets that step and later ones."""

    def __init__(self, run: Path, start: int) -> None:
        self.path = run / METRICS
        kept = [row for row in read_metrics(run) if row["step"] < start]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append one step, visible to readers at once."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All whole lines so far; a last line cut short by a kill is left out."""
    return read_new(run, 0)[0]


def read_new(run: Path, position: int) -> tuple[list[dict[str, Any]], int]:
    """The whole lines from a byte position on, and the position behind them.

    A file that has become shorter (a resumed run forgets steps) is read from its beginning.
    """
    try:
        with (run / METRICS).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(position if position <= size else 0)
            start = file.tell()
            data = file.read()
    except FileNotFoundError:
        return [], 0
    whole = data[: data.rfind(b"\n") + 1]
    try:
        return [json.loads(line) for line in whole.split(b"\n")[:-1]], start + len(whole)
    except ValueError:
        if not position:
            raise
        return read_new(run, 0)  # rewritten meanwhile: the position is inside a line
