"""metrics.jsonl: one line a step, whatever happened to the run in between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["METRICS", "MetricsFile", "read_metrics"]

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
    try:
        lines = (run / METRICS).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines[:-1] if line]
