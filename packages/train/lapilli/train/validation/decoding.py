"""Answer samples' questions greedily, or by the logits of a few choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lapilli.data.dataset.dataset import Dataset, Sample
from lapilli.data.text.questions import (
    ChoiceTokens,
    Frames,
    RowQuestion,
    find_frames,
    row_questions,
)
from lapilli.data.text.templates import Template
from lapilli.model.config import Decoding
from lapilli.model.generate import (
    Gathering,
    check_positions,
    expanded_length,
    generate,
    next_logits,
)
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

__all__ = ["QuestionReader", "ask", "ask_choices"]


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

    def questions(self, sample: Sample) -> list[RowQuestion]:
        """A sample's questions, in their order.

        Raises:
            DataError: It cannot be told where a question ends.
        """
        return self._questions(sample.input_ids, sample.label_spans)

    def first(self, sample: Sample) -> RowQuestion:
        """A sample's first question.

        Raises:
            DataError: It cannot be told where the question ends.
        """
        return self.questions(sample)[0]

    def answer_lengths(self, row: dict[str, Any]) -> list[int]:
        """Tokens of each answer of a `Dataset.token_row`, its end included."""
        spans = np.array(row["label_spans"], np.int32).reshape(-1, 2)
        return [len(one.answer) for one in self._questions(row["input_ids"], spans)]

    def expected(self, question: RowQuestion) -> str:
        """The words of a question's own answer."""
        return expected_text(question.answer, self.decode, self.frames)

    def _questions(
        self, input_ids: Sequence[int] | NDArray[np.int32], label_spans: NDArray[np.int32]
    ) -> list[RowQuestion]:
        return row_questions(input_ids, label_spans, self.tokenizer, self.template, self.frames)


def ask(
    model: VisionLanguageModel,
    samples: Sequence[Sample],
    questions: Sequence[RowQuestion],
    reader: QuestionReader,
    *,
    most_tokens: int,
    pixels: Sequence[NDArray[np.uint8]] = (),
    gathered: Gathering | None = None,
) -> list[QuestionAnswer]:
    """Ask a question of each sample, all in one batch.

    Args:
        model: The model.
        samples: Whose questions they are.
        questions: One of each sample; its answer is the expected one.
        reader: Of the samples' dataset.
        most_tokens: Longest answer. Where that goes beyond positions that are learnt, a sample is
            asked by itself, for an answer as long as fits.
        pixels: Images to show, uint8 [images, size, size, 3] each; left out, the samples' own.
        gathered: See `generate`.

    Raises:
        ModelError: A question is longer than the language model can take; names it.
    """
    shown = _shown(samples, questions, pixels)
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
            sample.sample_id, question.question, reader.expected(question), answer.finish()
        )
        for sample, question, answer in zip(samples, questions, readers, strict=True)
    ]


def ask_choices(
    model: VisionLanguageModel,
    samples: Sequence[Sample],
    questions: Sequence[RowQuestion],
    tokens: ChoiceTokens,
    *,
    pixels: Sequence[NDArray[np.uint8]] = (),
) -> list[dict[str, float]]:
    """The logit of each choice where the answer begins, all questions in one forward.

    Args:
        model: The model.
        samples: Whose questions they are.
        questions: One of each sample.
        tokens: Of the choices.
        pixels: As `ask` takes them.

    Raises:
        ModelError: A question is longer than the language model can take.
    """
    prefix = np.array(tokens.prefix, np.int64)
    prompts = [np.concatenate([question.prompt, prefix]) for question in questions]
    found = next_logits(model, prompts, _shown(samples, questions, pixels))
    ids = [*tokens.ids.values()]
    return [dict(zip(tokens.ids, row, strict=True)) for row in found[:, ids].tolist()]


def _shown(
    samples: Sequence[Sample],
    questions: Sequence[RowQuestion],
    pixels: Sequence[NDArray[np.uint8]],
) -> list[NDArray[np.uint8]]:
    """The images up to each question: later turns may have images too."""
    return [
        images[: int((question.prompt < 0).sum())]
        for images, question in zip(pixels or [s.pixels for s in samples], questions, strict=True)
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
