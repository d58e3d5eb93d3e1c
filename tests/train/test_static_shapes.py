"""`max_shapes: 1`: one shape for every batch of a run, whatever is in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lapilli.data.batches.collate import Batch, blank_batches, collate
from lapilli.data.batches.torch_loader import torch_loader
from lapilli.data.config import MixtureConfig
from lapilli.data.dataset.dataset import Dataset, open_dataset
from lapilli.data.errors import DataError
from lapilli.data.shards.schemas import HELD_OUT
from lapilli.model.vlm import build_model
from lapilli.train.config import RunConfig, ValidationConfig
from lapilli.train.driver.context_length import check_context
from lapilli.train.driver.preflight import preflight
from lapilli.train.errors import TrainError
from lapilli.train.metrics.step_metrics import padded_numbers
from lapilli.train.steps.feed import Feed
from lapilli.train.steps.step import to_device
from lapilli.train.validation.validation_loss import HeldOut
from tests.factories import build_dataset, make_mixture, make_tokenizer
from tests.train.small_run import VIEW, small_run

CPU = torch.device("cpu")
LENGTH, IMAGE_TOKENS = 400, 4


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples with and without images, in a number that no global batch divides; some held out."""
    folder = tmp_path_factory.mktemp("static")
    mixture = make_mixture(folder / "raw", images=21, text_only=14)
    tokenizer = make_tokenizer(folder / "tokenizer")
    build_dataset(mixture, folder / "dataset", tokenizer, mixture=MixtureConfig(held_out=6))
    return folder / "dataset"


@pytest.fixture(scope="module")
def parts(path: Path) -> tuple[Dataset, Dataset]:
    def part(**values: Any) -> Dataset:
        return open_dataset(path, view=VIEW, image_tokens=IMAGE_TOKENS, **values)

    return part(), part(split=HELD_OUT)


def config_for(path: Path, **values: Any) -> RunConfig:
    return small_run(path, Path("unused"), max_shapes=1, max_length=LENGTH, **values)


def shape_of(batch: Batch) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in to_device(batch, CPU).inputs.items()}


class Recorder(nn.Module):
    """In the place of a model: the shapes that its forward is given."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(trainable=())
        self.seen: list[dict[str, tuple[int, ...]]] = []

    def forward(self, **inputs: Tensor) -> Tensor:
        self.seen.append({name: tuple(t.shape) for name, t in inputs.items()})
        return torch.zeros(())


@pytest.mark.parametrize(
    ("sampler", "remainder"),
    [
        ("grouped", "pad"), ("grouped", "short"), ("grouped", "drop"), ("random", "pad"),
        ("random", "short"), ("llava", "llava"), ("llava", "pad"),
    ],
)  # fmt: skip
def test_an_epoch_its_warm_up_and_its_validation_have_one_shape(
    path: Path,
    parts: tuple[Dataset, Dataset],
    sampler: str,
    remainder: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset, held_out = parts
    values: dict[str, Any] = {"sampler": sampler, "remainder": remainder, "epochs": 2}
    config = config_for(path, **values, validation=ValidationConfig(every=1, samples=100))
    feeds = [Feed(dataset, config, rank=r, world_size=2, held_out=held_out) for r in (0, 1)]
    steps = [feed.make(number) for feed in feeds for number in range(feed.total_steps)]
    batches = [batch for step in steps for batch in step.batches]
    shapes = [shape_of(batch) for batch in batches]
    shapes += [shape_of(one) for one in blank_batches(feeds[0].shape, dataset.image_size)]
    recorder = Recorder()
    monkeypatch.setattr("lapilli.train.validation.validation_loss.set_modes", lambda module: None)
    place = (0, 1)
    HeldOut(held_out, config, feeds[0].shape, place).loss(SimpleNamespace(module=recorder), CPU)
    assert len(recorder.seen) >= 3
    assert all(shape == shapes[0] for shape in [*shapes, *recorder.seen])
    assert shapes[0]["input_ids"] == (2, LENGTH)
    assert shapes[0]["pixels"][0] == 2
    assert {batch.num_images for batch in batches} > {0}  # text-only ones among them
    assert all(one.padded_length == LENGTH for one in padded_numbers(steps[0], feeds[0]))
    assert {one.padded_images for one in padded_numbers(steps[-1], feeds[0])} == {2}


def test_several_shapes_are_what_others_have(path: Path, parts: tuple[Dataset, Dataset]) -> None:
    """The same run without the setting, so that the counts above can fail."""
    config = replace(config_for(path), max_shapes=4)
    feed = Feed(parts[0], config, rank=0, world_size=2)
    made = [shape_of(b) for step in range(feed.total_steps) for b in feed.make(step).batches]
    assert len({str(shape) for shape in made}) > 1


def test_the_validation_datas_own_numbers_fit(path: Path, parts: tuple[Dataset, Dataset]) -> None:
    """The single number of trained positions is that of the larger of the two datasets."""
    dataset, held_out = parts
    most = int(np.sort(np.concatenate([dataset.num_trained, held_out.num_trained]))[-2:].sum())
    feed = Feed(dataset, config_for(path), rank=0, world_size=2, held_out=held_out)
    assert feed.shape.target_sizes == (most,)


def test_blank_pixels_of_text_change_no_loss(path: Path, parts: tuple[Dataset, Dataset]) -> None:
    dataset = parts[0]
    config = config_for(path)
    model = build_model(config.model).eval()
    static = Feed(dataset, config, rank=0, world_size=2).shape
    text = [dataset.sample(int(i)) for i in np.flatnonzero(~dataset.has_images)[:2]]
    fewest = replace(static, image_slots=0)
    with torch.no_grad():
        one, other = (
            model(**to_device(collate(text, shape, dataset.image_size), CPU).inputs)
            for shape in (static, fewest)
        )
    assert float(one) == pytest.approx(float(other), rel=1e-6)


def test_more_images_than_slots_are_named(parts: tuple[Dataset, Dataset], path: Path) -> None:
    dataset = parts[0]
    shape = replace(Feed(dataset, config_for(path), rank=0, world_size=2).shape, image_slots=1)
    pictured = [dataset.sample(int(i)) for i in np.flatnonzero(dataset.has_images)[:2]]
    with pytest.raises(DataError, match=r"2 images from .* 1 image_slots"):
        collate(pictured, shape, dataset.image_size)


def test_positions_are_checked_for_the_length_of_every_row(
    path: Path, parts: tuple[Dataset, Dataset]
) -> None:
    model = build_model(config_for(path).model)
    model.language.config.model_type = "mpt"  # a bias of one size
    model.language.config.max_seq_len = LENGTH - 1
    with pytest.raises(TrainError, match=f"{LENGTH} as it is padded.*set max_length: {LENGTH - 1}"):
        check_context(model, config_for(path), *parts, lambda line: None)


def test_rows_that_share_images_are_refused_but_packed(path: Path) -> None:
    with pytest.raises(TrainError, match="share_images: true with max_shapes 1"):
        config_for(path, share_images=True)
    assert not config_for(path, share_images=True, pack=True).is_static  # packs have their own


def test_memory_is_estimated_for_the_length_of_every_row(path: Path, tmp_path: Path) -> None:
    def host(max_shapes: int) -> str:
        config = replace(config_for(path, launcher="process", num_workers=1), max_shapes=max_shapes)
        config = replace(config, output=str(tmp_path / f"{max_shapes}"), memory=1.0)
        return preflight(config).memory_policy.note

    assert host(1) != host(16)


def test_a_loop_of_ones_own_has_one_shape(parts: tuple[Dataset, Dataset]) -> None:
    made = torch_loader(parts[0], global_batch_size=4, micro_batch_size=2, max_shapes=1)
    shapes = {str([(k, tuple(v.shape)) for k, v in batch.items()]) for batch in made}
    assert len(shapes) == 1
