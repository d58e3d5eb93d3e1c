"""A trained model that is asked: questions and images in training's form, answers as text.

From a run's folder or from an exported one; template, view and tokenizer are the training data's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lapilli.data.access import exists
from lapilli.data.errors import DataError
from lapilli.data.exported import prompt_ids
from lapilli.data.images import BadImage, ImageSpec, prepare
from lapilli.data.questions import Frames, find_frames
from lapilli.data.record import ImagePart, Record, Turn
from lapilli.data.render import mark_images
from lapilli.data.sources.turns import IMAGE_MARKER, split_markers
from lapilli.data.templates import Template
from lapilli.data.tokenizer_copy import open_copy
from lapilli.data.vocabulary import load_tokenizer
from lapilli.model.generate import Decoding, check_positions, expanded_length, generate
from lapilli.model.interop.hf import FACTS, read_facts, read_hf
from lapilli.model.vlm import VisionLanguageModel
from lapilli.train.answer_text import AnswerReader, Decoder, warn_without_end
from lapilli.train.evaluate import load_trained
from lapilli.train.run_data import read_data

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Assistant", "Question", "bad_image", "open_assistant"]


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        turns: The conversation so far; the last turn is the user's.
        images: Image files' bytes, in the order of the turns' places.
        name: What an error calls it.
    """

    turns: tuple[Turn, ...]
    images: tuple[bytes, ...] = ()
    name: str = "question"

    @staticmethod
    def of(text: str, *images: bytes, name: str = "question", marker: str = "") -> Question:
        """A single turn: each image where `<image>` marks its place; without marks all in front.

        Args:
            text: What is asked.
            images: Image files' bytes.
            name: What an error calls the question.
            marker: What marks an image's place too, as `Template.image_marker` says.

        Raises:
            DataError: There are more or fewer marks than images.
        """
        record = Record("", "", "", (Turn("user", split_markers(text, 0)),))
        parts = mark_images(record, Template("", image_marker=marker)).turns[0].parts
        count = sum(isinstance(part, ImagePart) for part in parts)
        if not count:
            parts = (*(ImagePart(number) for number in range(len(images))), *parts)
        elif count != len(images):
            raise DataError(
                f"{name}: {_counted(count, 'image marker')} for {_counted(len(images), 'image')}; "
                f"mark each image once with {IMAGE_MARKER}, or none of them"
            )
        return Question((Turn("user", parts),), images, name)


@dataclass(frozen=True)
class Assistant:
    """A model with what its training data were like.

    Attributes:
        model: The model.
        tokenizer: transformers' tokenizer.
        template: How conversations were written down.
        spec: How images were made square.
        name: Whose answers these are: the run's folder and step, or the export's folder.
    """

    model: VisionLanguageModel
    tokenizer: Any
    template: Template
    spec: ImageSpec
    name: str = ""

    def prompt(self, turns: Sequence[Turn]) -> NDArray[np.int64]:
        """The ids up to where the answer begins, -200 for each image."""
        return np.array(prompt_ids(turns, self.tokenizer, self.template), np.int64)

    def answer(
        self,
        questions: Sequence[Question],
        decoding: Decoding,
        *,
        on_text: Callable[[str], None] | None = None,
        pixels: Sequence[NDArray[np.uint8]] | None = None,
        is_over: Callable[[], bool] = lambda: False,
    ) -> list[str]:
        """Answer a batch of questions.

        Args:
            questions: What is asked.
            decoding: How answers are written.
            on_text: Called with each new piece of the first answer's text.
            pixels: uint8 [images, size, size, 3] of each question, where they are prepared already.
            is_over: Asked at each token; once True, the answers end there.

        Returns:
            The answers, without the template's end and white space around them.

        Raises:
            DataError: An image that cannot be used; names it.
            ModelError: A question is longer than the language model can take; names it.
        """
        self.check(questions, decoding)
        frames, decode = self._frames()
        readers = [
            AnswerReader(decode, frames, None if number else on_text)
            for number in range(len(questions))
        ]
        generate(
            self.model,
            [self.prompt(question.turns) for question in questions],
            [self._pixels(question) for question in questions] if pixels is None else pixels,
            decoding,
            watch=lambda row, newest: readers[row].take(newest) or is_over(),
        )
        return [reader.finish() for reader in readers]

    def check(
        self, questions: Iterable[Question], decoding: Decoding, *, strict: bool = False
    ) -> None:
        """Find a question that is too long before any is asked.

        Args:
            questions: What is asked.
            decoding: How answers are written.
            strict: Whether a language model that can go beyond its positions may not.

        Raises:
            ModelError: The language model cannot take it; names it.

        Warns:
            UserWarning: Once, if it can, but was not made for so many tokens.
        """
        lengths = (
            (one.name, expanded_length(self.model, self.prompt(one.turns))) for one in questions
        )
        check_positions(self.model, lengths, decoding, strict=strict)

    def _frames(self) -> tuple[Frames, Decoder]:
        frames = find_frames(self.template, self.tokenizer)
        warn_without_end(self.template.name, frames)
        return frames, Decoder(self.tokenizer)

    def _pixels(self, question: Question) -> NDArray[np.uint8]:
        size = self.spec.size
        made = np.zeros((len(question.images), size, size, 3), np.uint8)
        for number, data in enumerate(question.images):
            try:
                made[number] = prepare(data, self.spec)
            except BadImage as error:
                raise bad_image(question.name, number, error) from None
        return made


def bad_image(name: str, number: int, error: BadImage) -> DataError:
    """The line for image `number`, counted from 0, of the question with this name."""
    return DataError(
        f"{name}: image {number + 1} is {error.reason.value} ({error.detail}); expected an image "
        "file"
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def open_assistant(path: Path, device: str | torch.device = "cpu") -> Assistant:
    """The model of a run's folder, or of a folder that `pipelines.export --to hf` wrote.

    Raises:
        TrainError, DataError, ModelError: Neither is there, or what its data were like is not.
    """
    if exists(path / FACTS):
        facts = read_facts(path)
        template = Template(**facts["template"])
        again = "export the run again"
        tokenizer = (
            open_copy(path, facts["tokenizer"], again)
            if "tokenizer" in facts  # an export of before does not say
            else load_tokenizer(path)
        )
        return Assistant(
            read_hf(path).to(device), tokenizer, template, ImageSpec.of(facts["view"]),
            path.resolve().name,
        )  # fmt: skip
    trained = load_trained(path, device)
    data = read_data(path, trained.data)
    name = f"{path.resolve().name}/step-{trained.step}"
    return Assistant(trained.model, data.tokenizer, data.template, data.spec, name)
