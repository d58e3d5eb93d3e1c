"""Answer a dataset's questions greedily and score the answers."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import torch

from lapilli.data.dataset.dataset import Dataset, open_dataset
from lapilli.data.shards.manifest import Manifest, read_manifest
from lapilli.data.shards.schemas import HELD_OUT, TRAIN
from lapilli.data.text.questions import ChoiceTokens, RowQuestion, choice_tokens
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
from lapilli.train.scoring.answer_forms import exact_text
from lapilli.train.scoring.choices import conclude
from lapilli.train.validation.decoding import QuestionReader, ask, ask_choices
from lapilli.train.worker.compatibility import check_model

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Answer",
    "Asking",
    "Scores",
    "Trained",
    "Turns",
    "answer_dataset",
    "chosen_split",
    "image_order",
    "in_order",
    "is_trained_on",
    "load_trained",
    "only_view",
    "open_test",
    "score",
]


Turns: TypeAlias = Literal["first", "last", "all"]


@dataclass(frozen=True)
class Answer(QuestionAnswer):
    """One question of the test data.

    Attributes:
        index: Its place in the dataset.
        image_index: The sample whose images were shown; `index` unless images are shuffled.
        source: The record's source: the kind of the question.
        split: The part of the dataset it is of.
        trained_on: Whether the run was trained on that part of this dataset.
        turn: Which question of its record it is, from 0.
        image: The file that is shown first, as the dataset names it; empty for text alone.
        logits: Of each choice, where the model chose among some.
        score: The share of the first choice; None likewise.
    """

    index: int
    image_index: int
    source: str
    split: str = TRAIN
    trained_on: bool = False
    turn: int = 0
    image: str = ""
    logits: dict[str, float] = field(default_factory=dict[str, float])
    score: float | None = None

    @property
    def right(self) -> bool:
        """Whether it is the expected one, as the scorer `exact` compares them."""
        return exact_text(self.given) == exact_text(self.expected)


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


def open_test(path: str | Path, view: str, trained: Trained, split: str = TRAIN) -> Dataset:
    """Open a dataset of questions, or what a dataset holds out, for a model.

    Raises:
        DataError, TrainError: It cannot be opened or was made otherwise than the training data.
    """
    dataset = open_dataset(path, view=view, image_tokens=trained.model.image_tokens, split=split)
    check_model(trained.model, dataset)
    check_same_data(training_data(dataset), trained.data, str(path))
    return dataset


def answer_dataset(
    model: VisionLanguageModel,
    dataset: Dataset,
    *,
    shuffle_images: int | None = None,
    turns: Turns = "first",
    choices: tuple[str, ...] = (),
    threshold: float = 0.5,
    batch: int = 256,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """Ask records' questions and decode greedily, up to the template's end of answers.

    Args:
        model: The model.
        dataset: The questions; each record's own answers are the expected ones.
        shuffle_images: A seed: show each question the images of another record. None: its own.
        turns: The questions of a record that are asked, each behind the record's own conversation.
        choices: Take the logits of these where an answer begins, and decode nothing.
        threshold: The share from which the first of them is concluded.
        batch: Questions at once.
        on_progress: Called with questions answered and all.

    Returns:
        In the dataset's order.

    Raises:
        DataError: It cannot be told where a question ends, or a choice is not one token.
        ModelError: A question is longer than the language model can take.

    Warns:
        UserWarning: With the number of expected answers that have the end in the middle.
    """
    asking = Asking.of(
        model, dataset, shuffle_images=shuffle_images, turns=turns, choices=choices,
        threshold=threshold, batch=batch,
    )  # fmt: skip
    return asking.answers(on_progress)


@dataclass(frozen=True)
class Asking:
    """A dataset's questions cut into batches, which do not depend on who answers them.

    So the answers are the same, to the last bit of a logit, on however many workers.

    Attributes:
        model: The model.
        dataset: The questions.
        reader: Of the dataset.
        batches: Record and question of each, by the length of the record, longest first.
        most_tokens: Longest answer.
        shown: Whose images each record is shown.
        tokens: Of the choices; None decodes.
        threshold: The share from which the first choice is concluded.
    """

    model: VisionLanguageModel
    dataset: Dataset
    reader: QuestionReader
    batches: list[list[tuple[int, int]]]
    most_tokens: int
    shown: NDArray[np.int64]
    tokens: ChoiceTokens | None
    threshold: float

    @staticmethod
    def of(
        model: VisionLanguageModel,
        dataset: Dataset,
        *,
        shuffle_images: int | None = None,
        turns: Turns = "first",
        choices: tuple[str, ...] = (),
        threshold: float = 0.5,
        batch: int = 256,
    ) -> Asking:
        """Arguments and errors are those of `answer_dataset`."""
        reader = QuestionReader.of(dataset)
        tokens = choice_tokens(choices, reader.tokenizer, reader.template) if choices else None
        lengths = [reader.answer_lengths(dataset.token_row(i)) for i in range(len(dataset))]
        asked = {index: _chosen_turns(len(found), turns) for index, found in enumerate(lengths)}
        order = np.argsort(-dataset.lengths, kind="stable").tolist()
        places = [(index, turn) for index in order for turn in asked[index]]
        return Asking(
            model=model,
            dataset=dataset,
            reader=reader,
            batches=[places[start : start + batch] for start in range(0, len(places), batch)],
            most_tokens=max(lengths[index][turn] for index, turn in places),
            shown=image_order(dataset.num_images, shuffle_images),
            tokens=tokens,
            threshold=threshold,
        )

    def answers(self, on_progress: Callable[[int, int], None]) -> list[Answer]:
        """All answers, in the dataset's order."""
        total = sum(map(len, self.batches))
        found: list[Answer] = []
        for number in range(len(self.batches)):
            found += self.answer(number)
            on_progress(len(found), total)
        return in_order(found, self.reader)

    def answer(self, number: int) -> list[Answer]:
        """The answers of a batch, in its order."""
        places = self.batches[number]
        samples = [self.dataset.sample(index) for index, _ in places]
        pixels = [self.dataset.sample(int(self.shown[index])).pixels for index, _ in places]
        questions = [
            self.reader.questions(sample)[turn]
            for sample, (_, turn) in zip(samples, places, strict=True)
        ]
        if self.tokens is None:
            found = ask(
                self.model, samples, questions, self.reader,
                most_tokens=self.most_tokens, pixels=pixels,
            )  # fmt: skip
            logits = [dict[str, float]()] * len(found)
        else:
            logits = ask_choices(self.model, samples, questions, self.tokens, pixels=pixels)
            found = [
                self._concluded(sample.sample_id, question, row)
                for sample, question, row in zip(samples, questions, logits, strict=True)
            ]
        return [
            self._answer(index, turn, one, row)
            for (index, turn), one, row in zip(places, found, logits, strict=True)
        ]

    def _concluded(
        self, sample_id: str, question: RowQuestion, logits: dict[str, float]
    ) -> QuestionAnswer:
        _, conclusion = conclude(logits, self.threshold)
        return QuestionAnswer(
            sample_id, question.question, self.reader.expected(question), conclusion
        )

    def _answer(
        self, index: int, turn: int, one: QuestionAnswer, logits: dict[str, float]
    ) -> Answer:
        shown = int(self.shown[index])
        images: list[str] = self.dataset.token_row(shown)["image_ids"]
        return Answer(
            **asdict(one),
            index=index,
            image_index=shown,
            source=one.sample_id.partition("/")[0],
            turn=turn,
            image=images[0] if images else "",
            logits=logits,
            score=conclude(logits, self.threshold)[0] if logits else None,
        )


def in_order(answers: Sequence[Answer], reader: QuestionReader) -> list[Answer]:
    """All answers in the dataset's order.

    Warns:
        UserWarning: With the number of expected answers that have the end in the middle.
    """
    found = sorted(answers, key=lambda answer: (answer.index, answer.turn))
    _warn_of_ends(found, reader)
    return found


def _chosen_turns(count: int, turns: Turns) -> Sequence[int]:
    return {"first": range(1), "last": range(count - 1, count), "all": range(count)}[turns]


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


def only_view(dataset: Path) -> str:
    """The view of a dataset that has one.

    Raises:
        TrainError: It has several.
    """
    views = list(read_manifest(dataset).views)
    if len(views) != 1:
        raise TrainError(f"view: {dataset} has {', '.join(views)}; choose one with --view")
    return views[0]


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
