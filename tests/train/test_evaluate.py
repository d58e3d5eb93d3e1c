"""Answers, their scores, and whose images are shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lapilli.data.config import MixtureConfig
from lapilli.data.dataset.dataset import Dataset, open_dataset
from lapilli.model.errors import ModelError
from lapilli.model.generate import generate_greedy
from lapilli.model.vlm import VisionLanguageModel, build_model
from lapilli.train.errors import TrainError
from lapilli.train.inference.evaluate import (
    Answer,
    Trained,
    answer_dataset,
    image_order,
    open_test,
    score,
)
from lapilli.train.run_folder.dataset_files import training_data
from lapilli.train.steps.feed import Feed
from lapilli.train.steps.optim import build_optimizer
from lapilli.train.steps.step import to_device
from tests.factories import build_dataset, make_mixture, make_tokenizer
from tests.train.small_run import VIEW, small_dataset, small_run
from tests.train.tiny import IMAGE_SIZE, model_config

CPU = torch.device("cpu")


def answer(source: str, expected: str, given: str) -> Answer:
    return Answer(f"{source}/1", "?", expected, given, 0, 0, source)


def test_scores_are_shares_over_all_and_by_source() -> None:
    found = score([answer("a", "red", "red"), answer("a", "red", "re"), answer("b", "no", "no")])
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.by_source == {"a": 0.5, "b": 1.0}
    assert found.questions == 3


def test_shuffled_images_are_never_a_records_own_and_as_many() -> None:
    counts = np.array([1, 0, 1, 2, 1, 2, 0, 1])
    order = image_order(counts, seed=0)
    assert sorted(order.tolist()) == list(range(8))
    assert all(order != np.arange(8))
    assert (counts[order] == counts).all()
    assert (order == image_order(counts, seed=0)).all()
    assert (image_order(counts, seed=None) == np.arange(8)).all()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = small_dataset(tmp_path_factory.mktemp("evaluate"), images=4, text_only=4)
    return open_dataset(path, view=VIEW, image_tokens=4)


@pytest.fixture(scope="module")
def model(dataset: Dataset) -> VisionLanguageModel:
    """A model that knows the dataset by heart."""
    config = small_run(
        Path(), Path(), num_workers=1, global_batch_size=8, micro_batch_size=8, epochs=150
    )
    model = build_model(config.model)
    optimizer = build_optimizer(model, replace(config.optim, lr=0.01))
    for step in Feed(dataset, config, rank=0, world_size=1).steps(0):
        optimizer.zero_grad()
        for batch in step.batches:
            (model(**to_device(batch, CPU).inputs) / step.global_tokens).backward()
        optimizer.step()
    return model.eval()


def test_a_model_that_knows_the_answers_gives_them(
    model: VisionLanguageModel, dataset: Dataset
) -> None:
    answers = answer_dataset(model, dataset, batch=3)
    assert [a.sample_id for a in answers] == [dataset.sample(i).sample_id for i in range(8)]
    assert score(answers).accuracy == 1.0
    assert all(a.question and a.expected.startswith("The ") for a in answers)


def test_images_of_later_turns_do_not_move_into_the_next_prompt() -> None:
    model = build_model(model_config()).eval()
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (3, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.uint8)
    prompts = [np.array([1, -200, 5, 7]), np.array([1, -200, 9])]
    alone = generate_greedy(model, prompts[1:], [pixels[2:]], end_id=2, max_new_tokens=6)
    both = generate_greedy(model, prompts, [pixels[:1], pixels[2:]], end_id=2, max_new_tokens=6)
    assert both[1] == alone[0]
    with pytest.raises(ModelError, match="prompt 0: 1 image places for 2 images"):
        generate_greedy(model, prompts, [pixels[:2], pixels[2:]], end_id=2, max_new_tokens=6)


def test_questions_made_with_another_template_are_refused(
    model: VisionLanguageModel, dataset: Dataset, tmp_path: Path
) -> None:
    trained = Trained(model, training_data(dataset))
    assert len(open_test(dataset.path, VIEW, trained)) == 8
    mixture = make_mixture(tmp_path / "raw", images=3, text_only=0)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    build_dataset(mixture, tmp_path / "other", tokenizer, template="plain")
    with pytest.raises(TrainError, match=r"template: .* with plain, the training data with v1"):
        open_test(tmp_path / "other", VIEW, trained)


def test_what_a_mixture_holds_out_is_asked_and_the_rest_is_not(
    model: VisionLanguageModel, dataset: Dataset, tmp_path: Path
) -> None:
    mixture = make_mixture(tmp_path / "raw", images=8, text_only=0)
    blend = MixtureConfig(held_out=2)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    build_dataset(mixture, tmp_path / "held", tokenizer, mixture=blend)
    whole, held_out = (
        open_test(tmp_path / "held", VIEW, Trained(model, training_data(dataset)), split)
        for split in ("train", "held_out")
    )
    names = [{one.sample(i).sample_id for i in range(len(one))} for one in (whole, held_out)]
    assert len(names[1]) == 2
    assert len(names[0]) == 6
    assert not names[0] & names[1]
