"""Answer questions about images with a trained model, formatted as in training.

From a run's folder, an exported or a published one; template, view and tokenizer are the training
data's, or what the user says they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lapilli.data.dataset.tokenizer_copy import open_copy
from lapilli.data.errors import DataError
from lapilli.data.images.view import BadImage, ImageSpec, prepare
from lapilli.data.io.access import exists, is_folder
from lapilli.data.record import ImagePart, Record, Turn
from lapilli.data.shards.manifest import TOKENIZER, read_manifest, template_fingerprint
from lapilli.data.sources.turns import IMAGE_MARKER, split_markers
from lapilli.data.text.encode import bind_template
from lapilli.data.text.export_template import prompt_ids
from lapilli.data.text.questions import Frames, find_frames
from lapilli.data.text.rendering import mark_images
from lapilli.data.text.templates import TEMPLATES, Template
from lapilli.data.trust import NOTHING, Trust
from lapilli.model.config import Decoding
from lapilli.model.generate import check_positions, expanded_length, generate
from lapilli.model.vlm import VisionLanguageModel
from lapilli.train.checkpoint.token_ids import extends
from lapilli.train.errors import TrainError
from lapilli.train.inference.evaluate import Trained, load_trained
from lapilli.train.inference.published import is_published, published_data, read_published
from lapilli.train.run_folder.dataset_files import check_data, read_data
from lapilli.train.validation.answer_text import AnswerReader, Decoder, warn_without_end

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Assistant", "Question", "bad_image", "open_assistant", "open_trained"]


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
        record = Record(
            record_id="", sample_id="", source="", turns=(Turn("user", split_markers(text, 0)),)
        )
        parts = mark_images(record, Template(name="", image_marker=marker)).turns[0].parts
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
    """A model with the properties of its training data.

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
    ) -> list[str]:
        """Answer a batch of questions.

        Args:
            questions: What is asked.
            decoding: How answers are written.
            on_text: Called with each new piece of the first answer's text.

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
            [self._pixels(question) for question in questions],
            decoding,
            watch=lambda row, newest: readers[row].take(newest),
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

    def reader(self, on_text: Callable[[str], None] | None = None) -> AnswerReader:
        """Reads an answer's ids as they come, for who continues a prompt by himself."""
        frames, decode = self._frames()
        return AnswerReader(decode, frames, on_text)

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


def open_assistant(
    path: Path,
    device: str | torch.device = "cpu",
    trust: Trust = NOTHING,
    *,
    template: str = "",
    view: str = "",
) -> Assistant:
    """The model of a run's folder, of an export, or of a published folder (`train.published`).

    Args:
        path: The folder.
        device: Where the model computes.
        trust: What the command allows of what a run's own files ask for.
        template: Name or file of a template, for a published folder that does not say.
        view: How images are made square, likewise: `pad`, `crop`, `stretch`, or fields as YAML.

    Raises:
        TrainError, DataError, ModelError: It is none of these, or what its data were like is not
            known; names the flag that says it.
    """
    _check_folder(path)
    if is_published(path):
        found = read_published(path, template=template, view=view)
        if found.template is None or found.spec is None:
            flag, what = ("template", "conversations are written down")
            if found.template is not None:
                flag, what = ("view", "images are made square")
            choices = ", ".join(sorted(TEMPLATES)) if flag == "template" else "pad, crop, stretch"
            raise DataError(
                f"{flag}: {path} does not say how {what}; pass --{flag}, one of {choices}"
            )
        return Assistant(
            model=found.model.to(device),
            tokenizer=found.tokenizer,
            template=found.template,
            spec=found.spec,
            name=path.resolve().name,
        )
    _refuse_flags(path, template=template, view=view)
    trained = load_trained(path, device, trust)
    data = read_data(path, trained.data)
    name = f"{path.resolve().name}/step-{trained.step}"
    return Assistant(
        model=trained.model,
        tokenizer=data.tokenizer,
        template=data.template,
        spec=data.spec,
        name=name,
    )


def open_trained(
    path: Path,
    dataset: Path,
    device: str | torch.device = "cpu",
    trust: Trust = NOTHING,
    *,
    template: str = "",
) -> Trained:
    """A model with what is known of its data, to be compared with those of a dataset.

    A published folder says which tokenizer it has, which may be the dataset's with tokens added;
    template and view are then the dataset's, but for exports, which say them.

    Args:
        path: The model's folder.
        dataset: The dataset's folder.
        device: Where the model computes.
        trust: What the command allows of what a run's own files ask for.
        template: Name or file of the template that a published folder was trained with, where it
            does not say; empty takes the dataset's.

    Raises:
        TrainError, DataError, ModelError: As `open_assistant`.
    """
    _check_folder(path)
    if not is_published(path):
        _refuse_flags(path, template=template)
        trained = load_trained(path, device, trust)
        check_data(path, trained.data)
        return trained
    manifest = read_manifest(dataset)
    found = read_published(path, template=template)
    data = published_data(found)
    if template and found.template is not None:
        bound = bind_template(found.template, found.tokenizer)
        data = replace(data, template=template_fingerprint(bound), template_name=bound.name)
    if extends(found.tokenizer, open_copy(dataset / TOKENIZER, manifest.tokenizer)):
        # the dataset's ids have the special ones already
        data = replace(data, tokenizer=manifest.tokenizer["fingerprint"], special_ids=[])
    return Trained(found.model.to(device), data)


def _refuse_flags(path: Path, **given: str) -> None:
    for flag, value in given.items():
        if value:
            raise DataError(f"{flag}: {path} is a run, which has its own; leave --{flag} out")


def _check_folder(path: Path) -> None:
    if exists(path) and not is_folder(path):
        raise TrainError(f"{path}: a file; expected the folder of a run, an export or a model")
    if not exists(path):
        raise TrainError(
            f"{path}: no such folder; expected a run, an export or a published model, which is "
            "downloaded first where that is the name of one"
        )
