"""Answer samples' first questions greedily."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lapilli.data.dataset.dataset import Dataset, Sample
from lapilli.data.text.questions import FirstQuestion, Frames, find_frames, first_question
from lapilli.data.text.templates import Template
from lapilli.model.config import Decoding
from lapilli.model.generate import Gathering, check_positions, expanded_length, generate
from lapilli.model.parts.positions import positions_of
from lapilli.model.vlm import VisionLanguageModel
from lapilli.train.run_folder.generations import QuestionAnswer
from lapilli.train.validation.answer_text import (
    AnswerReader,
    Decoder,
    expected_text,
    warn_without_end,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["QuestionReader", "ask_first"]


@dataclass(frozen=True)
class QuestionReader:
    """What a dataset's rows are written with, to take them apart."""

    tokenizer: Any
    template: Template
    frames: Frames
    decode: Decoder

    @staticmethod
    def of(dataset: Dataset) -> QuestionReader:
        """For a dataset.

        Raises:
            DataError: Its tokenizer or template is not there any more.
        """
        tokenizer, template = dataset.tokenizer, dataset.template
        frames = find_frames(template, tokenizer)
        warn_without_end(template.name, frames)
        return QuestionReader(tokenizer, template, frames, Decoder(tokenizer))

    def first(self, sample: Sample) -> FirstQuestion:
        """A sample's first question.

        Raises:
            DataError: It cannot be told where the question ends.
        """
        return self._first(sample.input_ids, sample.label_spans)

    def answer_length(self, row: dict[str, Any]) -> int:
        """Tokens of the first answer of a `Dataset.token_row`, its end included."""
        spans = np.array(row["label_spans"], np.int32).reshape(-1, 2)
        return len(self._first(row["input_ids"], spans).answer)

    def _first(
        self, input_ids: Sequence[int] | NDArray[np.int32], label_spans: NDArray[np.int32]
    ) -> FirstQuestion:
        return first_question(input_ids, label_spans, self.tokenizer, self.template, self.frames)


def ask_first(
    model: VisionLanguageModel,
    samples: Sequence[Sample],
    reader: QuestionReader,
    *,
    most_tokens: int,
    pixels: Sequence[NDArray[np.uint8]] = (),
    gathered: Gathering | None = None,
) -> list[QuestionAnswer]:
    """Ask each sample's first question, all in one batch.

    Args:
        model: The model.
        samples: Their first answers are the expected ones.
        reader: Of the samples' dataset.
        most_tokens: Longest answer. Where that goes beyond positions that are learnt, a sample is
            asked by itself, for an answer as long as fits.
        pixels: Images to show, uint8 [images, size, size, 3] each; left out, the samples' own.
        gathered: See `generate`.

    Raises:
        DataError: It cannot be told where a question ends.
        ModelError: A question is longer than the language model can take; names it.
    """
    questions = [reader.first(sample) for sample in samples]
    # later turns may have images too
    shown = [
        images[: int((question.prompt < 0).sum())]
        for images, question in zip(pixels or [s.pixels for s in samples], questions, strict=True)
    ]
    lengths = [expanded_length(model, question.prompt) for question in questions]
    readers = [AnswerReader(reader.decode, reader.frames) for _ in samples]
    for rows, most in _batches(model, lengths, most_tokens):
        names = [(samples[row].sample_id, lengths[row]) for row in rows]
        check_positions(model, names, Decoding(most))
        generate(
            model, [questions[row].prompt for row in rows], [shown[row] for row in rows],
            Decoding(most), gathered=gathered,
            watch=lambda place, newest, rows=rows: readers[rows[place]].take(newest),
        )  # fmt: skip
    return [
        QuestionAnswer(
            sample.sample_id,
            question.question,
            expected_text(question.answer, reader.decode, reader.frames),
            answer.finish(),
        )
        for sample, question, answer in zip(samples, questions, readers, strict=True)
    ]


def _batches(
    model: VisionLanguageModel, lengths: Sequence[int], most: int
) -> list[tuple[list[int], int]]:
    """Rows that are asked together, and the tokens of their longest answer."""
    known = positions_of(model.language)
    limit = known.limit if known and known.is_fixed else None
    together = [row for row, n in enumerate(lengths) if limit is None or n + most <= limit]
    batches = [(together, most)] if together else []
    if limit is not None:
        alone = (row for row in range(len(lengths)) if row not in {*together})
        batches += [([row], max(1, limit - lengths[row])) for row in alone]
    return batches
