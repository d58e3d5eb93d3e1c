"""Answer a dataset's questions greedily and score the answers."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from lapilli.data.dataset.dataset import Dataset, open_dataset
from lapilli.data.shards.manifest import Manifest
from lapilli.data.shards.schemas import HELD_OUT, TRAIN
from lapilli.data.trust import NOTHING, Trust
from lapilli.model.vlm import VisionLanguageModel
from lapilli.train.checkpoint import save_load as checkpoint
from lapilli.train.checkpoint.find import newest_weights
from lapilli.train.checkpoint.frozen import check_frozen
from lapilli.train.checkpoint.init_from import build_on, find_chain
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.checkpoint_state import TrainingData
from lapilli.train.run_folder.dataset_files import check_same_data, training_data
from lapilli.train.run_folder.generations import QuestionAnswer
from lapilli.train.run_folder.names import CONFIG
from lapilli.train.run_folder.settings import read_run_config, require_trust
from lapilli.train.validation.decoding import QuestionReader, ask_first
from lapilli.train.worker.compatibility import check_model

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Answer",
    "Scores",
    "Trained",
    "answer_dataset",
    "chosen_split",
    "image_order",
    "is_trained_on",
    "load_trained",
    "open_test",
    "score",
]


@dataclass(frozen=True)
class Answer(QuestionAnswer):
    """One question of the test data.

    Attributes:
        index: Its place in the dataset.
        image_index: The sample whose images were shown; `index` unless images are shuffled.
        source: The record's source: the kind of the question.
        split: The part of the dataset it is of.
        trained_on: Whether the run was trained on that part of this dataset.
    """

    index: int
    image_index: int
    source: str
    split: str = TRAIN
    trained_on: bool = False

    @property
    def right(self) -> bool:
        """Exact match; spaces around an answer, special tokens and its end do not count."""
        return self.given == self.expected


@dataclass(frozen=True)
class Scores:
    """Share of correct answers, in total and by source, and the number of questions."""

    accuracy: float
    by_source: dict[str, float]
    questions: int
    split: str = TRAIN
    trained_on: bool = False


@dataclass(frozen=True)
class Trained:
    """A model with its step and the properties of its training data."""

    model: VisionLanguageModel
    data: TrainingData
    step: int = 0


def load_trained(run: Path, device: str | torch.device = "cpu", trust: Trust = NOTHING) -> Trained:
    """The model of a run with its newest checkpoint's weights, or a milestone's.

    Args:
        run: The folder of the run or milestone.
        device: Where the model goes.
        trust: What the command allows of what the run's own settings ask for.

    Raises:
        TrainError: No run here, none of its checkpoints is whole, it asks for code that `trust`
            does not allow, or what it was trained beside has changed: its base weights, or a run
            that it started from.
    """
    config = read_run_config(run)
    require_trust(config.model, trust, run / CONFIG)
    found = newest_weights(run)
    if found is None:
        raise TrainError(f"{run}: no whole checkpoint; run train again to resume")
    chain = find_chain(config.init_from, found.state.start, by=run)
    built = build_on(config.model, chain)
    check_frozen(found.state, built.frozen, run=run)
    checkpoint.load_weights(found, built.model)
    return Trained(built.model.eval().to(device), found.state.data, found.step)


def open_test(path: Path, view: str, trained: Trained, split: str = TRAIN) -> Dataset:
    """Open a dataset of questions, or what a dataset holds out, for a model.

    Raises:
        DataError, TrainError: It cannot be opened or was made otherwise than the training data.
    """
    dataset = open_dataset(
        path, view=view, image_tokens=trained.model.vision.num_tokens, split=split
    )
    check_model(trained.model, dataset)
    check_same_data(training_data(dataset), trained.data, str(path))
    return dataset


def answer_dataset(
    model: VisionLanguageModel,
    dataset: Dataset,
    *,
    shuffle_images: int | None = None,
    batch: int = 256,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """Ask every record's first question and decode greedily, up to the template's end of answers.

    Args:
        model: The model.
        dataset: The questions; each record's first answer is the expected one.
        shuffle_images: A seed: show each question the images of another record. None: its own.
        batch: Questions at once.
        on_progress: Called with questions answered and all.

    Returns:
        One answer a record, in the dataset's order.

    Raises:
        DataError: It cannot be told where a question ends.
        ModelError: A question is longer than the language model can take.

    Warns:
        UserWarning: With the number of expected answers that have the end in the middle.
    """
    reader = QuestionReader.of(dataset)
    longest = max(reader.answer_length(dataset.token_row(i)) for i in range(len(dataset)))
    shown = image_order(dataset.num_images, shuffle_images)
    answers: list[Answer | None] = [None] * len(dataset)
    done = 0
    for indices in _batches(dataset.lengths, batch):
        samples = [dataset.sample(int(i)) for i in indices]
        pixels = [dataset.sample(int(shown[i])).pixels for i in indices]
        asked = ask_first(model, samples, reader, most_tokens=longest, pixels=pixels)
        for index, one in zip(indices, asked, strict=True):
            source = one.sample_id.partition("/")[0]
            answers[index] = Answer(
                **asdict(one), index=int(index), image_index=int(shown[index]), source=source
            )
        done += len(indices)
        on_progress(done, len(dataset))
    found = [answer for answer in answers if answer is not None]
    _warn_of_ends(found, reader)
    return found


def _warn_of_ends(answers: list[Answer], reader: QuestionReader) -> None:
    """No model can give an answer beyond a text that ends answers."""
    end = reader.frames.end_text if reader.frames.end_id is None else ""
    count = sum(end in answer.expected for answer in answers) if end else 0
    if count:
        warnings.warn(
            f"{count} of {len(answers)} expected answers have {end!r} in them, which ends an "
            f"answer of template {reader.template.name}; they cannot be given",
            stacklevel=3,
        )


def chosen_split(manifest: Manifest, asked: Literal["auto", "train", "held_out"]) -> str:
    """The split that is asked: `auto` is what the dataset holds out, if it does, else the rest."""
    if asked != "auto":
        return asked
    return HELD_OUT if manifest.mixture.get("held_out") else TRAIN


def is_trained_on(run: Path, manifest: Manifest, split: str) -> bool:
    """Whether a run's newest weights were trained on this split of this very dataset."""
    found = newest_weights(run)
    return split == TRAIN and found is not None and found.state.dataset == manifest.fingerprint


def image_order(num_images: NDArray[np.int64], seed: int | None) -> NDArray[np.int64]:
    """Whose images each record is shown: random cycles among records with as many images."""
    order = np.arange(len(num_images))
    if seed is not None:
        generator = np.random.default_rng(seed)
        for count in np.unique(num_images):
            cycle = generator.permutation(np.flatnonzero(num_images == count))
            order[cycle] = np.roll(cycle, 1)
    return order


def _batches(lengths: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    """Indices by length, longest first: little padding, and the most memory at once."""
    order = np.argsort(-lengths, kind="stable")
    for start in range(0, len(order), size):
        yield order[start : start + size]


def score(answers: list[Answer]) -> Scores:
    """Count correct answers."""
    by_source: dict[str, list[bool]] = defaultdict(list)
    for answer in answers:
        by_source[answer.source].append(answer.right)
    shares = {name: float(np.mean(right)) for name, right in sorted(by_source.items())}
    accuracy = float(np.mean([a.right for a in answers]))
    first = answers[0]
    return Scores(
        accuracy=accuracy,
        by_source=shares,
        questions=len(answers),
        split=first.split,
        trained_on=first.trained_on,
    )
