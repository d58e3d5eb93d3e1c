"""Generate answers to held-out samples during training: `generations.jsonl`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lapilli.data.dataset.dataset import Dataset
from lapilli.data.errors import DataError
from lapilli.model.parts.trainable import set_modes
from lapilli.train.config import RunConfig
from lapilli.train.engine.deepspeed_engine import gathered
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.generations import (
    Generation,
    QuestionAnswer,
    read_generations,
    write_generations,
)
from lapilli.train.validation.decoding import QuestionReader, ask

__all__ = [
    "Generations",
    "choose_questions",
]  # fmt: skip


def choose_questions(dataset: Dataset, count: int) -> list[int]:
    """Places of samples in a dataset, from all over it, whose questions are asked.

    Raises:
        TrainError: It cannot be told where a question ends.
    """
    places = np.linspace(0, len(dataset) - 1, min(count, len(dataset)))
    chosen: list[int] = np.unique(places.astype(np.int64)).tolist()
    try:
        reader = QuestionReader.of(dataset)
        for index in chosen:
            reader.first(dataset.sample(index))
    except DataError as error:
        raise TrainError(
            f"validation.answers_every: {dataset.path}: {error}; or set it to 0"
        ) from None
    return chosen


class Generations:
    """Asks a few held-out samples the same first question each time.

    Every rank asks all of them, since under ZeRO-3 a forward needs every rank; rank 0 writes.

    Args:
        dataset: The samples, of which `config.validation.answers` from all over it are asked.
        config: The run's settings.
        rank: This worker's.
    """

    def __init__(self, dataset: Dataset, config: RunConfig, rank: int) -> None:
        self._dataset = dataset
        self._indices = choose_questions(dataset, config.validation.answers)
        self._reader = QuestionReader.of(dataset)
        self._rows = config.micro_batch_size or max(
            1, config.micro_batch_tokens // config.longest_row
        )
        longest = max(self._reader.answer_lengths(dataset.token_row(i))[0] for i in self._indices)
        self._most_tokens = min(longest, config.validation.answer_tokens)
        self._gathered = gathered if config.zero_stage == 3 else None
        self._run = Path(config.output) if rank == 0 else None

    def ask(self, engine: Any, step: int) -> list[Generation]:
        """Ask after a step, a micro-batch at a time, and write down. Collective at ZeRO stage 3."""
        engine.module.eval()
        asked: list[QuestionAnswer] = []
        for start in range(0, len(self._indices), self._rows):
            chosen = self._indices[start : start + self._rows]
            samples = [self._dataset.sample(index) for index in chosen]
            asked += ask(
                engine.module, samples, [*map(self._reader.first, samples)], self._reader,
                most_tokens=self._most_tokens, gathered=self._gathered,
            )  # fmt: skip
        set_modes(engine.module)
        found = [
            Generation(**asdict(one), step=step, index=index)
            for one, index in zip(asked, self._indices, strict=True)
        ]
        if self._run:
            write_generations(self._run, [*read_generations(self._run), *found])
        return found
