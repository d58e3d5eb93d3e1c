"""`generations.jsonl`: answers to held-out questions during training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lapilli.train.run_folder.jsonl import read_lines, write_lines
from lapilli.train.run_folder.names import GENERATIONS

__all__ = [
    "Generation",
    "QuestionAnswer",
    "forget_generations",
    "read_generations",
    "write_generations",
]


@dataclass(frozen=True)
class QuestionAnswer:
    """A sample's first question with its expected and generated answer.

    Attributes:
        sample_id: The sample.
        question: The user's own words; empty for a template that drops them.
        expected: The sample's own answer.
        given: The model's.
    """

    sample_id: str
    question: str
    expected: str
    given: str


@dataclass(frozen=True)
class Generation(QuestionAnswer):
    """An answer generated after a step.

    Attributes:
        step: The step after which it was asked.
        index: The sample's place among those that are held out.
    """

    step: int
    index: int


def forget_generations(run: Path, start: int) -> None:
    """Remove the answers of a step and of later ones, before they are written again."""
    found = read_generations(run)
    if found and found[-1].step >= start:
        write_generations(run, [one for one in found if one.step < start])


def write_generations(run: Path, generations: Sequence[Generation]) -> None:
    """Replace the file."""
    write_lines(run / GENERATIONS, map(asdict, generations))


def read_generations(run: Path) -> list[Generation]:
    """Read `generations.jsonl` in order of steps; empty without the file."""
    return read_lines(run / GENERATIONS, Generation)
