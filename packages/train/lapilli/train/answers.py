"""A model's answers to samples' first questions, decoded greedily."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lapilli.data.dataset import Sample
from lapilli.model.generate import Decoding, Gathering, generate
from lapilli.model.vlm import VisionLanguageModel

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Asked", "ask_first", "end_ids"]


@dataclass(frozen=True)
class Asked:
    """A sample's first question and what became of it.

    Attributes:
        sample_id: The sample.
        question: The prompt, decoded, images and special tokens left out.
        expected: The sample's own answer.
        given: The model's.
    """

    sample_id: str
    question: str
    expected: str
    given: str


def ask_first(
    model: VisionLanguageModel,
    samples: Sequence[Sample],
    tokenizer: Any,
    *,
    ends: Sequence[int],
    pixels: Sequence[NDArray[np.uint8]] = (),
    most_tokens: int = 0,
    gathered: Gathering | None = None,
) -> list[Asked]:
    """Ask each sample's first question, all in one batch.

    Args:
        model: The model.
        samples: Their first answers are the expected ones.
        tokenizer: What the samples were made with.
        ends: Ids that end an answer.
        pixels: Images to show, uint8 [images, size, size, 3] each; left out, the samples' own.
        most_tokens: Longest answer; 0 for the longest expected one's length.
        gathered: See `generate`.
    """
    prompts = [s.input_ids[: s.label_spans[0, 0]].astype(np.int64) for s in samples]
    places = [int((ids < 0).sum()) for ids in prompts]  # later turns may have images too
    shown = [
        images[:count]
        for images, count in zip(pixels or [s.pixels for s in samples], places, strict=True)
    ]
    longest = max(int(s.label_spans[0, 1] - s.label_spans[0, 0]) for s in samples)
    decoding = Decoding(min(longest, most_tokens) if most_tokens else longest)
    produced = generate(model, prompts, shown, decoding, end_ids=ends, gathered=gathered)
    return [
        Asked(sample.sample_id, *_texts(sample, given, tokenizer))
        for sample, given in zip(samples, produced, strict=True)
    ]


def _texts(sample: Sample, given: Sequence[int], tokenizer: Any) -> tuple[str, str, str]:
    """Question, expected and given answer."""
    start, end = sample.label_spans[0]
    question, expected, answer = (
        tokenizer.decode([int(i) for i in part if i >= 0], skip_special_tokens=True).strip()
        for part in (sample.input_ids[:start], sample.input_ids[start:end], given)
    )
    return question, expected, answer


def end_ids(samples: Iterable[Sample]) -> list[int]:
    """The ids that the first answers end with: what the template trains a model to stop at."""
    return sorted({int(s.input_ids[s.label_spans[0, 1] - 1]) for s in samples})
