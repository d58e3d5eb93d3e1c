"""Runs that train with embedding losses: the same whatever the workers, and resumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lapilli.data.config import TargetConfig
from lapilli.data.dataset.dataset import open_dataset
from lapilli.data.errors import DataError
from lapilli.model.config import AuxConfig
from lapilli.train.config import CheckpointConfig, OptimConfig, RunConfig
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.metrics_file import StepMetrics, read_metrics
from lapilli.train.steps.aux_targets import open_readers
from tests.factories import build_dataset, make_mixture, make_tokenizer
from tests.train.gang import train_together
from tests.train.small_run import VIEW, small_run

SHAPES = {"depth": (16, 8), "gen": (1, 6)}
AUX = AuxConfig(
    mode="gen-depth", num_task_tokens=2, layers={"depth": (1, 2), "gen": (2,)}, shapes=SHAPES
)
TARGETS = {
    "depth": TargetConfig("tests.teaching:odd", rows=16, width=8, size=32, settings={"least": 128}),
    "gen": TargetConfig("tests.teaching:blocks", rows=1, width=6, size=32, storage="bf16"),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, one of which the depth's teacher refuses, and text."""
    folder = tmp_path_factory.mktemp("targets")
    mixture = make_mixture(folder / "raw", images=20, text_only=8, asked=2)
    report = build_dataset(
        mixture, folder / "dataset", make_tokenizer(folder / "tokenizer"), targets=TARGETS
    )
    assert report.manifest.targets["depth"].statuses.keys() == {"ok", "refused"}
    return folder / "dataset"


def aux_run(dataset: Path, output: Path, **values: Any) -> RunConfig:
    """A run of two steps in which everything but the tower learns."""
    settings: dict[str, Any] = {
        "max_steps": 2, "epochs": 1, "optim": OptimConfig(lr=1e-4),
        "checkpoint": CheckpointConfig(every=50), **values,
    }  # fmt: skip
    config = small_run(dataset, output, **settings)
    parts = ("projector", "language", "task_tokens", "predictors")
    return replace(config, model=replace(config.model, aux=AUX, trainable=parts))


def trained(config: RunConfig) -> Sequence[StepMetrics]:
    """The rows of a run to its end."""
    ends = train_together(config, cuts_all=config.zero_stage == 3)
    assert ends == [0] * config.num_workers
    return read_metrics(Path(config.output))


@pytest.fixture(scope="module")
def alone(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Sequence[StepMetrics]:
    """One worker, the whole global batch at once."""
    output = tmp_path_factory.mktemp("alone") / "run"
    return trained(aux_run(dataset, output, num_workers=1, micro_batch_size=8, zero_stage=0))


def test_every_predictor_has_losses_and_every_part_a_gradient(alone: Sequence[StepMetrics]) -> None:
    first = alone[0]
    heads = ("gen.2", "depth.1", "depth.2")
    assert first.aux_losses is not None
    assert list(first.aux_losses) == [
        f"{head}.{kind}" for head in heads for kind in ("smooth_l1", "info_nce")
    ]
    assert all(value > 0 for value in first.aux_losses.values())
    assert first.grad_norm_by_part.keys() == {"projector", "language", "task_tokens", "predictors"}
    assert all(norm > 0 for norm in first.grad_norm_by_part.values())


@pytest.mark.parametrize(("workers", "micro", "stage"), [(4, 1, 2), (2, 2, 3)])
def test_losses_and_gradients_do_not_depend_on_the_machine(
    dataset: Path,
    tmp_path: Path,
    alone: Sequence[StepMetrics],
    workers: int,
    micro: int,
    stage: Any,
) -> None:  # fmt: skip
    found = trained(
        aux_run(dataset, tmp_path / "run", num_workers=workers, micro_batch_size=micro,
                zero_stage=stage)
    )  # fmt: skip
    for one, other in zip(alone, found, strict=True):
        assert one.batch == other.batch
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert other.aux_losses == pytest.approx(one.aux_losses, rel=1e-5)
        assert other.grad_norm_by_part == pytest.approx(one.grad_norm_by_part, rel=2e-5)


def test_targets_that_are_missing_or_of_another_shape_are_one_line(dataset: Path) -> None:
    opened = open_dataset(dataset, view=VIEW, image_tokens=8)
    other = replace(AUX, shapes={**SHAPES, "depth": (16, 9)})
    with pytest.raises(TrainError, match=r"aux.shapes.depth: \[16, 9\], and the targets .* 16 x 8"):
        open_readers(opened, other)
    seg = AuxConfig(mode="seg", layers={"seg": (1,)})
    with pytest.raises(DataError, match=r"targets: 'seg' is not in .*, which has depth, gen"):
        open_readers(opened, seg)
    with pytest.raises(TrainError, match=r"loss_reduction: micro_batch_mean with model.aux"):
        aux_run(dataset, dataset.parent / "run", loss_reduction="micro_batch_mean")


def test_a_run_is_resumed_by_another_number_of_workers(
    dataset: Path, tmp_path: Path, alone: Sequence[StepMetrics]
) -> None:
    config = aux_run(dataset, tmp_path / "run", checkpoint=CheckpointConfig(every=1))
    assert trained(replace(config, max_steps=1))[0].loss == pytest.approx(alone[0].loss, rel=1e-5)
    again = trained(replace(config, num_workers=1, micro_batch_size=4, zero_stage=1))
    assert [row.step for row in again] == [0, 1]
    assert again[1].aux_losses == pytest.approx(alone[1].aux_losses, rel=1e-4)
    assert again[1].loss == pytest.approx(alone[1].loss, rel=1e-4)
