"""`worst.jsonl`: the samples of highest mean loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypedDict

from lapilli.data.io.typed_json import Natural
from lapilli.train.run_folder.jsonl import read_lines, write_lines
from lapilli.train.run_folder.names import WORST

__all__ = ["SampleLoss", "read_worst", "write_worst"]


@dataclass(frozen=True)
class SampleLoss:
    """The loss of one sample in a step.

    Attributes:
        step: The step.
        index: The sample, as the dataset counts them.
        sample_id: Its id, `source/record`.
        has_images: Its modality.
        total: Summed over its trained tokens.
        tokens: Their number.
    """

    step: int
    index: int
    sample_id: str
    has_images: bool
    total: float
    tokens: int

    @property
    def mean(self) -> float:
        """Mean over its trained tokens."""
        return self.total / self.tokens

    @property
    def source(self) -> str:
        """Name of the source."""
        return self.sample_id.partition("/")[0]

    @property
    def modality(self) -> str:
        """`image` or `text`."""
        return "image" if self.has_images else "text"


def write_worst(run: Path, samples: Sequence[SampleLoss]) -> None:
    """Replace the file."""
    rows = (
        {
            "sample_id": s.sample_id,
            "loss": s.mean,
            "step": s.step,
            "trained_tokens": s.tokens,
            "index": s.index,
            "has_images": s.has_images,
        }
        for s in samples
    )
    write_lines(run / WORST, rows)


def read_worst(run: Path) -> list[SampleLoss]:
    """Read `worst.jsonl`, highest loss first; empty without the file."""
    return [
        SampleLoss(
            step=r["step"],
            index=r["index"],
            sample_id=r["sample_id"],
            has_images=r["has_images"],
            total=r["loss"] * r["trained_tokens"],
            tokens=r["trained_tokens"],
        )
        for r in read_lines(run / WORST, _WorstRow)
    ]


class _WorstRow(TypedDict):
    step: Natural
    index: Natural
    sample_id: str
    has_images: bool
    loss: float
    trained_tokens: Annotated[int, lambda value: "" if value > 0 else "1 or more"]
