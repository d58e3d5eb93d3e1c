"""A trained model that is asked: questions and images in training's form, answers as text.

From a run's folder or from an exported one; template, view and tokenizer are the training data's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lapilli.data.errors import DataError
from lapilli.data.images import BadImage, ImageSpec, prepare
from lapilli.data.record import ImagePart, Record, TextPart, Turn
from lapilli.data.templates import Template
from lapilli.data.tokenize import encode_batch
from lapilli.data.tokenizer_copy import open_copy
from lapilli.data.vocabulary import load_tokenizer
from lapilli.model.generate import Decoding, generate
from lapilli.model.interop.hf import FACTS, read_facts, read_hf
from lapilli.model.vlm import VisionLanguageModel
from lapilli.train.evaluate import load_trained
from lapilli.train.run_data import read_data, spec_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Assistant", "Question", "open_assistant"]

UNFINISHED = "\ufffd"


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
    def of(text: str, *images: bytes, name: str = "question") -> Question:
        """A single turn: images, then text."""
        places = tuple(ImagePart(number) for number in range(len(images)))
        return Question((Turn("user", (*places, TextPart(text))),), images, name)


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
        ids, spans = self._with_answer(turns)
        return np.array(ids[: spans[-2]], np.int64)

    @property
    def end_id(self) -> int:
        """The id that answers end with."""
        ids, spans = self._with_answer((Turn("user", (TextPart("a"),)),))
        return ids[spans[-1] - 1]

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

        Raises:
            DataError: An image that cannot be used; names it.
        """
        prompts = [self.prompt(question.turns) for question in questions]
        pixels = [self._pixels(question) for question in questions]
        said = _Stream(self._text, self.end_id, on_text) if on_text else None
        produced = generate(
            self.model, prompts, pixels, decoding, end_ids=[self.end_id], on_tokens=said
        )
        if said:
            said.flush()
        return [self._text(ids).strip() for ids in produced]

    def _with_answer(self, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
        answered = (*turns, Turn("assistant", (TextPart("a"),)))
        # one that trains everything has no span that begins with the answer
        template = replace(self.template, trains="answers")
        encoded = encode_batch([Record("", "", "", answered, ())], self.tokenizer, template)[0]
        return encoded.input_ids, encoded.label_spans

    def _pixels(self, question: Question) -> NDArray[np.uint8]:
        size = self.spec.size
        made = np.zeros((len(question.images), size, size, 3), np.uint8)
        for number, data in enumerate(question.images):
            try:
                made[number] = prepare(data, self.spec)
            except BadImage as error:
                raise DataError(
                    f"{question.name}: image {number + 1} is {error.reason.value} "
                    f"({error.detail}); expected an image file"
                ) from None
        return made

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class _Stream:
    """Turns ids into pieces of text; a letter of several tokens waits for its last."""

    def __init__(
        self, decode: Callable[[list[int]], str], end_id: int, on_text: Callable[[str], None]
    ) -> None:
        self._decode, self._end_id, self._on_text = decode, end_id, on_text
        self._ids: list[int] = []
        self._said = 0

    def __call__(self, newest: list[int]) -> None:
        if newest[0] == self._end_id:
            return
        self._ids.append(newest[0])
        if not self._decode(self._ids).endswith(UNFINISHED):
            self.flush()

    def flush(self) -> None:
        """Say what is left, a letter that stayed unfinished included."""
        text = self._decode(self._ids)
        if len(text) > self._said:
            self._on_text(text[self._said :])
            self._said = len(text)


def open_assistant(path: Path, device: str | torch.device = "cpu") -> Assistant:
    """The model of a run's folder, or of a folder that `pipelines.export --to hf` wrote.

    Raises:
        TrainError, DataError, ModelError: Neither is there, or what its data were like is not.
    """
    if (path / FACTS).exists():
        facts = read_facts(path)
        template = Template(**facts["template"])
        again = "export the run again"
        tokenizer = (
            open_copy(path, facts["tokenizer"], again)
            if "tokenizer" in facts  # an export of before does not say
            else load_tokenizer(path)
        )
        return Assistant(
            read_hf(path).to(device), tokenizer, template, spec_of(facts["view"]),
            path.resolve().name,
        )  # fmt: skip
    trained = load_trained(path, device)
    data = read_data(path, trained.data)
    name = f"{path.resolve().name}/step-{trained.step}"
    return Assistant(trained.model, data.tokenizer, data.template, data.spec, name)
