"""A run's page with embedding losses: curves by task and layer, targets and predictions."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pipelines.report
import pipelines.train
from lapilli.data.batches.collate import BatchShape, collate
from lapilli.data.dataset.dataset import open_dataset
from lapilli.data.shards.schemas import HELD_OUT
from lapilli.data.trust import Trust
from lapilli.model.config import AuxConfig
from lapilli.train.inference.evaluate import load_trained
from lapilli.train.inference.target_predictions import predict_targets
from lapilli.train.run_folder.settings import read_run_config, write_run_config
from lapilli.train.steps.aux_targets import aux_inputs, open_readers, read_targets
from lapilli.train.steps.step import to_device
from pipelines.cli.command import UsageError
from pipelines.reports.target_pictures import main_directions, nearest, picture
from tests.pipelines.tiny_recipes import SHAPES, make_material
from tests.teaching import block_means


@dataclass(frozen=True)
class Made:
    dataset: Path
    run: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A run of VisPer-LM's first stage with tiny models, on a dataset that holds 2 images out."""
    folder = tmp_path_factory.mktemp("report")
    material = make_material(folder)
    flags = ["--max_steps=2", "--max_length=512"]
    arguments = material.arguments("visper_lm/pretrain", folder / "run", *flags)
    assert pipelines.train.main(arguments) == 0
    return Made(material.dataset, folder / "run")


def test_predictions_are_beside_the_targets_of_their_images(made: Made) -> None:
    model = load_trained(made.run, trust=Trust(pickle=True)).model
    dataset = open_dataset(
        made.dataset, view="clip336_crop", image_tokens=model.image_tokens, split=HELD_OUT
    )
    found = predict_targets(model, dataset, 5, torch.device("cpu"))
    assert len(found) == 2
    for one in found:
        assert {*one.predicted} == {("gen", 1), ("depth", 1), ("seg", 1)}
        for task, (rows, width) in SHAPES.items():
            assert one.predicted[task, 1].shape == (rows, width)
            assert np.isfinite(one.predicted[task, 1]).all()
    # the teacher saw images squared otherwise than the view, so that its features are like these
    seen = [block_means(one.pixels[None], *SHAPES["depth"])[0] for one in found]
    likeness = [[np.abs(one.targets["depth"] - its).mean() for its in seen] for one in found]
    assert np.argmin(likeness, 1).tolist() == [0, 1]


def test_predictions_are_what_the_losses_compare(made: Made) -> None:
    """Smooth L1 of a batch of one image, by the model's own forward."""
    model: Any = load_trained(made.run, trust=Trust(pickle=True)).model
    dataset = open_dataset(
        made.dataset, view="clip336_crop", image_tokens=model.image_tokens, split=HELD_OUT
    )
    (one,) = predict_targets(model, dataset, 1, torch.device("cpu"))
    index = int(np.flatnonzero(dataset.has_images)[0])
    shape = BatchShape(1, (int(dataset.lengths[index]) + 7,), dataset.image_tokens, 4)
    batch = collate([dataset.sample(index)], shape, dataset.image_size)
    rows = open_readers(dataset, model.config.aux)
    step: Any = [[[[np.array([index])]]]]
    own = read_targets(dataset, rows, step, 0, records=1, weight=1.0)
    (given,) = aux_inputs(own, [batch], 3, torch.device("cpu"))
    with torch.no_grad():
        model(**to_device(batch, torch.device("cpu")).inputs, aux=given)
    for (task, layer), found in zip(one.predicted, given.losses[:, 0].tolist(), strict=True):
        predicted, target = (
            torch.from_numpy(each) for each in (one.predicted[task, layer], one.targets[task])
        )
        wanted = torch.nn.functional.smooth_l1_loss(predicted, target).item()
        assert found == pytest.approx(wanted, rel=5e-3)  # bf16


def test_the_page_has_curves_and_pictures_by_task_and_layer(made: Made) -> None:
    assert pipelines.report.main([str(made.run), "--predictions=3", "--allow_pickle"]) == 0
    page = (made.run / "report.html").read_text(encoding="utf-8")
    for title in ("depth: smooth L1, smoothed", "gen: InfoNCE, smoothed", "Last losses, smoothed"):
        assert title in page
    for task in ("depth", "seg"):
        assert len(re.findall(rf">{task}, target<", page)) == 2
    for task in SHAPES:
        assert len(re.findall(rf">{task}, layer 1<", page)) == 2
    assert len(re.findall(r", cosine -?\d\.\d\d<", page)) == 2


def test_a_run_without_predictors_is_told(made: Made, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for path in made.run.iterdir():
        if path.is_file():
            (run / path.name).write_bytes(path.read_bytes())
    config = read_run_config(run)
    plain = replace(config, model=replace(config.model, aux=AuxConfig(), trainable=("projector",)))
    write_run_config(run, plain)
    with pytest.raises(UsageError, match=r"predictions: .* has no predictors; expected a run with"):
        pipelines.report.main([str(run), "--predictions=3"])


def test_a_grid_along_one_direction_is_grey_from_black_to_white() -> None:
    rows = np.outer(np.linspace(-1, 1, 16), [0.0, 2.0, 0.0]).astype(np.float32)
    shown = picture(rows, main_directions([rows], 1))
    assert shown.shape == (96, 96, 1)
    grid = shown[::24, ::24, 0].ravel().astype(int)
    assert (grid[0], grid[-1]) == (0, 255)
    assert (np.diff(grid) >= 0).all()
    constant = picture(rows * 0, main_directions([rows * 0], 3))
    assert constant.shape == (96, 96, 3)


def test_the_nearest_target_is_found_by_direction_and_not_by_length() -> None:
    targets = [np.array([[1.0, 0.0]]), np.array([[0.0, 0.1]]), np.array([[-5.0, 1.0]])]
    row = np.array([[0.5, 9.0]], np.float32)
    assert nearest(row, [one.astype(np.float32) for one in targets])[0] == 1
