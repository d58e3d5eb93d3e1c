"""metrics.jsonl: one row per step, across restarts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from lapilli.data.io.typed_json import JsonError, Natural, as_type
from lapilli.data.io.whole_file import MOST_LINES, require_plain
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.jsonl import parse_lines
from lapilli.train.run_folder.names import METRICS

__all__ = [
    "MetricsFile",
    "StepMetrics",
    "StepResult",
    "read_metrics",
    "read_new",
]

NULLABLE = {"mfu", "hfu"}  # written as null where they are not known; the rest is left out


def _positive(value: float) -> str:
    return "" if value > 0 else "more than 0"


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step computed, over all ranks.

    Attributes:
        step: Its index, from 0 on. What people read counts steps done (`done`), as checkpoints do.
        loss: Mean over the global batch's trained tokens; the losses of predictors are added.
        lr: The learning rate.
        grad_norm: Of the whole gradient, before clipping.
        grad_norm_by_part: The same for each part that learns.
        samples: Of the global batch.
        trained_tokens: Of the global batch.
        batch: Digest of the samples that were taken.
        loss_scale: Of fp16.
        overflows: How often the step was taken again with a lower scale (fp16).
        aux_losses: Of each predictor (`depth.18`), `smooth_l1` and `info_nce`, means over the
            global batch without their weights; None without predictors.
    """

    step: Natural
    loss: float
    lr: float | None = None
    grad_norm: float | None = None
    grad_norm_by_part: dict[str, float] = field(default_factory=dict[str, float])
    samples: Natural
    trained_tokens: Natural
    batch: str | None = None
    loss_scale: float | None = None
    overflows: Natural | None = None
    aux_losses: dict[str, float] | None = None

    @property
    def done(self) -> int:
        """Steps done, this one included."""
        return self.step + 1


@dataclass(frozen=True, kw_only=True)
class StepMetrics(StepResult):
    """A row of metrics.jsonl: its keys, in the order of the fields.

    A run of an older version lacks some; those are None.

    Attributes:
        held_out_loss: After this step, where it was due.
        held_out_aux_losses: `aux_losses` of held-out images, likewise.
        held_out_seconds: What both took.
        generated_seconds: What answering held-out questions took, where it was due.
        seconds: Of the step, with waiting for data.
        wait_seconds: Waiting for data.
        memory_bytes: The most that rank 0 has held so far.
        tokens: Of the global batch, the images' own included; shared ones once.
        rows: Of the global batch, where they hold several samples.
        images: Of the global batch, shared ones once, likewise.
        tokens_per_second: In this step.
        flops: What the mathematics of the real tokens needs.
        mfu: Its share of the devices' peak rate, where that is known.
        hardware_flops: What all ranks execute, padding and recomputation included.
        hfu: Its share of the peak rate.
        loss_by_source: By source, the mean loss over its trained tokens, and their number.
        loss_by_modality: The same by `image` and `text`.
    """

    held_out_loss: float | None = None
    held_out_aux_losses: dict[str, float] | None = None
    held_out_seconds: float | None = None
    generated_seconds: float | None = None
    seconds: Annotated[float, _positive]
    wait_seconds: float
    memory_bytes: float | None = None
    tokens: Natural | None = None
    rows: Natural | None = None
    images: Natural | None = None
    tokens_per_second: float | None = None
    flops: float | None = None
    mfu: float | None = None
    hardware_flops: float | None = None
    hfu: float | None = None
    loss_by_source: dict[str, tuple[float, Natural]] = field(
        default_factory=dict[str, tuple[float, int]]
    )
    loss_by_modality: dict[str, tuple[float, Natural]] = field(
        default_factory=dict[str, tuple[float, int]]
    )

    def row(self) -> dict[str, Any]:
        """The fields that have a value, in order."""
        return {
            name: value
            for name, value in vars(self).items()
            if value is not None or name in NULLABLE
        }


NAMES = {one.name for one in fields(StepMetrics)}


class MetricsFile:
    """Appends rows; on resume it first removes the rows of the steps to be repeated."""

    def __init__(self, run: Path, start: int) -> None:
        self.path = run / METRICS
        data = _whole_lines(run, 0)[0]
        rows = zip(data.split(b"\n")[:-1], _parse(data, self.path), strict=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_bytes(b"".join(line + b"\n" for line, row in rows if row.step < start))
        temporary.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, metrics: StepMetrics) -> None:
        """Append one step, visible to readers at once."""
        self._file.write(json.dumps(metrics.row()) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(run: Path) -> list[StepMetrics]:
    """Read all complete rows; an incomplete last line is skipped.

    Raises:
        TrainError: A line that no run wrote; names it.
    """
    return read_new(run, 0)[0]


def read_new(run: Path, position: int) -> tuple[list[StepMetrics], int]:
    """The whole lines from a byte position on, and the position behind them.

    A file that has become shorter (a resumed run forgets steps) is read from its beginning.
    """
    whole, start = _whole_lines(run, position)
    try:
        return _parse(whole, run / METRICS), start + len(whole)
    except TrainError:
        if not position:
            raise
        return read_new(run, 0)  # rewritten meanwhile: the position is inside a line


def _whole_lines(run: Path, position: int) -> tuple[bytes, int]:
    """The whole lines from a position on, and where they begin; nothing where there is no file."""
    try:
        require_plain(run / METRICS, MOST_LINES)
        with (run / METRICS).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(position if position <= size else 0)
            start = file.tell()
            data = file.read()
    except FileNotFoundError:
        return b"", 0
    return data[: data.rfind(b"\n") + 1], start


def _parse(data: bytes, path: Path) -> list[StepMetrics]:
    """Parse complete lines; unknown fields, written by a later version, are skipped."""
    found: list[StepMetrics] = []
    for number, row in enumerate(parse_lines(data, dict[str, Any], path), 1):
        try:
            known = {name: value for name, value in row.items() if name in NAMES}
            found.append(as_type(known, StepMetrics))
        except JsonError as error:
            raise TrainError(
                f"{path}: damaged, line {number}: {error}; bring it back from a copy of the run, "
                "or train the run again"
            ) from None
    return found
