"""metrics.jsonl: one row per step, across restarts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict, cast

from lapilli.data.io.typed_json import JsonError, Natural, as_type
from lapilli.data.io.whole_file import MOST_LINES, require_plain
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.jsonl import parse_lines
from lapilli.train.run_folder.names import METRICS

__all__ = [
    "MetricsFile",
    "read_metrics",
    "read_new",
    "read_steps",
]


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


def _positive(value: float) -> str:
    return "" if value > 0 else "more than 0"


class _Row(TypedDict):
    """A step; it may have more."""

    step: Natural
    loss: NotRequired[float]
    lr: NotRequired[float]
    grad_norm: NotRequired[float | None]
    grad_norm_by_part: NotRequired[dict[str, float]]
    samples: NotRequired[Natural]
    trained_tokens: NotRequired[Natural]
    seconds: NotRequired[Annotated[float, _positive]]
    wait_seconds: NotRequired[float]
    memory_bytes: NotRequired[float]
    tokens: NotRequired[Natural]
    tokens_per_second: NotRequired[float]
    mfu: NotRequired[float | None]
    hfu: NotRequired[float | None]
    held_out_loss: NotRequired[float]
    held_out_seconds: NotRequired[float]
    generated_seconds: NotRequired[float]
    loss_by_source: NotRequired[dict[str, tuple[float, Natural]]]
    loss_by_modality: NotRequired[dict[str, tuple[float, Natural]]]


class _Whole(TypedDict):
    """What every step of a run has: what reports ask for."""

    loss: float
    samples: Natural
    trained_tokens: Natural
    seconds: Annotated[float, _positive]
    wait_seconds: float


def read_steps(run: Path) -> list[dict[str, Any]]:
    """As `read_metrics`, every row with what a report asks for: it may be somebody else's.

    Raises:
        TrainError: As `read_metrics`, or a step without its loss, samples, tokens or seconds.
    """
    rows = read_metrics(run)
    try:
        as_type(rows, list[_Whole])
    except JsonError as error:
        raise TrainError(f"{run / METRICS}: damaged ({error}); train the run again") from None
    return rows


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All whole lines so far; a last line cut short by a kill is left out.

    Raises:
        TrainError: A line that no run wrote; names it.
    """
    return read_new(run, 0)[0]


def read_new(run: Path, position: int) -> tuple[list[dict[str, Any]], int]:
    """The whole lines from a byte position on, and the position behind them.

    A file that has become shorter (a resumed run forgets steps) is read from its beginning.
    """
    try:
        require_plain(run / METRICS, MOST_LINES)
        with (run / METRICS).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(position if position <= size else 0)
            start = file.tell()
            data = file.read()
    except FileNotFoundError:
        return [], 0
    whole = data[: data.rfind(b"\n") + 1]
    try:
        rows = parse_lines(whole, _Row, run / METRICS)
    except TrainError:
        if not position:
            raise
        return read_new(run, 0)  # rewritten meanwhile: the position is inside a line
    return cast("list[dict[str, Any]]", rows), start + len(whole)
