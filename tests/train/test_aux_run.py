"""Runs that train with embedding losses: the same whatever the workers, and resumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lapilli.data.batches.collate import blank_batches, collate
from lapilli.data.config import TargetConfig
from lapilli.data.dataset.dataset import Dataset, open_dataset
from lapilli.data.dataset.targets import open_targets
from lapilli.data.errors import DataError
from lapilli.data.shards.target_rows import decode_rows
from lapilli.model.config import AuxConfig
from lapilli.model.vlm import VisionLanguageModel, build_model
from lapilli.train.checkpoint.find import Checkpoint
from lapilli.train.config import (
    CheckpointConfig,
    OptimConfig,
    RecoveryConfig,
    RunConfig,
    ValidationConfig,
)
from lapilli.train.driver.launching import launch
from lapilli.train.driver.preflight import preflight
from lapilli.train.driver.replay import rerun
from lapilli.train.errors import TrainError
from lapilli.train.health.step_dump import read_kept
from lapilli.train.run_folder.checkpoint_state import CheckpointState
from lapilli.train.run_folder.dataset_files import training_data
from lapilli.train.run_folder.metrics_file import StepMetrics, read_metrics
from lapilli.train.steps.aux_targets import aux_inputs, open_readers, read_targets
from lapilli.train.steps.feed import Feed
from lapilli.train.steps.step import to_device, warm_up
from lapilli.train.validation.validation_loss import HeldOut, check_same_tokenizer
from lapilli.train.worker.compatibility import check_start, open_for
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
        "checkpoint": CheckpointConfig(every=50),
        "validation": ValidationConfig(every=2, samples=13, dataset=str(dataset)), **values,
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
    assert alone[0].held_out_aux_losses is None  # not due
    assert alone[1].held_out_aux_losses is not None
    assert found[1].held_out_aux_losses == pytest.approx(alone[1].held_out_aux_losses, rel=1e-4)
    assert found[1].held_out_loss == pytest.approx(alone[1].held_out_loss, rel=1e-4)


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


def stored(dataset: Dataset, task: str, index: int) -> NDArray[np.float64] | None:
    """A sample's target as one vector; None where the teacher refused its image."""
    (slot,) = dataset.image_slots(index).tolist()
    found = open_targets(dataset, task).read(slot)
    return None if found is None else decode_rows(*found).astype(np.float64).ravel()


def predicted(
    model: VisionLanguageModel, dataset: Dataset, config: RunConfig, index: int
) -> dict[str, NDArray[np.float64]]:
    """What each predictor says of a sample that is alone in its batch, as one vector."""
    kept: dict[str, NDArray[np.float64]] = {}
    layers = config.model.aux.layers
    heads = {
        f"{task}.{layer}": f"predictors.image_{task}_heads.{layers[task].index(layer)}"
        for task, layer in config.model.aux.heads
    }

    def keep(name: str) -> Any:
        return lambda module, given, output: kept.update({name: output[0].double().numpy().ravel()})

    hooks = [
        model.get_submodule(path).register_forward_hook(keep(name)) for name, path in heads.items()
    ]
    shape = Feed(dataset, config, rank=0, world_size=1).shape
    batch = collate([dataset.sample(index)], shape, dataset.image_size)
    rows = [[[[np.array([index])]]]]
    readers = open_readers(dataset, config.model.aux)
    own = read_targets(dataset, readers, rows, 0, records=1, weight=1.0)
    (aux,) = aux_inputs(own, [batch], len(heads), torch.device("cpu"))
    with torch.no_grad():
        model(**to_device(batch, torch.device("cpu")).inputs, aux=aux)
    for hook in hooks:
        hook.remove()
    return kept


@pytest.mark.parametrize("over", ["images", "records"])
def test_held_out_embedding_losses_are_those_of_a_loop_over_images(
    dataset: Path, tmp_path: Path, over: Any
) -> None:
    config = aux_run(dataset, tmp_path / "run", num_workers=1, micro_batch_size=2)
    aux = replace(config.model.aux, mean_over=over)
    config = replace(config, global_batch_size=6, model=replace(config.model, aux=aux))
    model = build_model(config.model)
    opened = open_for(model, config)
    shape = Feed(opened, config, rank=0, world_size=1).shape
    place, cpu = (0, 1), torch.device("cpu")
    found = HeldOut(opened, config, shape, place).loss(SimpleNamespace(module=model), cpu)
    assert found.aux is not None

    chosen = np.unique(np.linspace(0, len(opened) - 1, 13).astype(np.int64))
    images = [int(i) for i in chosen if opened.has_images[i]]
    images.sort(key=lambda i: -int(opened.lengths[i]))
    assert 6 < len(images) < 13
    model.eval()
    said = {i: predicted(model, opened, config, i) for i in images}
    for task, layer in aux.heads:
        targets = {i: row for i in images if (row := stored(opened, task, i)) is not None}
        there = list(targets)
        scale = float(model.predictors.get_parameter(f"{task}_logit_scale").detach().exp())
        smooth, info = 0.0, 0.0
        for i in there:
            group = images[images.index(i) // 6 * 6 :][:6]
            others = {j: targets[j] for j in group if j in targets}
            one, own = said[i][f"{task}.{layer}"], targets[i]
            gap = np.abs(one - own)
            smooth += np.where(gap < 1, gap**2 / 2, gap - 0.5).mean()
            unit = one / np.linalg.norm(one)
            alike = {j: scale * unit @ v / np.linalg.norm(v) for j, v in others.items()}
            info += np.log(sum(np.exp(v) for v in alike.values())) - alike[i]
        count = len(there) if over == "images" else 13
        assert found.aux[f"{task}.{layer}.smooth_l1"] == pytest.approx(smooth / count, rel=1e-4)
        assert found.aux[f"{task}.{layer}.info_nce"] == pytest.approx(info / count, rel=1e-4)
    plain = build_model(replace(config.model, aux=replace(aux, layers={}), trainable=("language",)))
    plain.load_state_dict(model.state_dict(), strict=False)
    without = replace(config, model=plain.config)
    text = HeldOut(opened, without, shape, place).loss(SimpleNamespace(module=plain), cpu)
    assert text.aux is None
    assert text.text == found.text  # to the last bit


def test_a_replay_computes_the_losses_of_predictors_again(dataset: Path, tmp_path: Path) -> None:
    config = aux_run(
        dataset, tmp_path / "run", num_workers=1, micro_batch_size=4, zero_stage=0, max_steps=0,
        epochs=4, launcher="process", validation=ValidationConfig(),
        optim=OptimConfig(lr=1.0, schedule="constant", grad_clip=0.0),  # the loss jumps
        recovery=RecoveryConfig(loss_spike_factor=1.0001),
    )  # fmt: skip
    with pytest.raises(TrainError, match=r"more than recovery\.loss_spike_factor"):
        launch(preflight(config))
    (path,) = (tmp_path / "run" / "replay").iterdir()
    kept = read_kept(path)
    assert kept.step > 0  # steps before it are taken again, with their predictors
    found = rerun(config, kept)
    assert found.loss == pytest.approx(kept.loss, rel=1e-5)
    assert not found.leaves_predictors_out
    text = sum(loss for _, loss in found.samples) / len(found.samples)
    assert found.loss > text + 0.1  # and no sample's loss has them in it


def test_warming_up_runs_the_predictors(dataset: Path, tmp_path: Path) -> None:
    config = aux_run(dataset, tmp_path / "run", num_workers=1, micro_batch_size=2)
    model = build_model(config.model)
    opened = open_for(model, config)
    feed = Feed(opened, config, rank=0, world_size=1)
    ran: list[str] = []
    model.predictors.register_forward_hook(lambda *_: ran.append("forward"))
    weight = next(model.predictors.parameters())
    weight.register_hook(lambda gradient: ran.append("backward"))
    cpu = torch.device("cpu")
    blank = [*blank_batches(feed.shape, opened.image_size)]
    assert {len(batch.pixels) > 0 for batch in blank} == {True, False}
    warm_up(
        SimpleNamespace(module=model),
        ((to_device(batch, cpu), feed.blank_aux(batch, cpu)) for batch in blank),
    )
    assert ran == ["forward", "backward"] * len(blank)
    assert weight.grad is None


def test_another_teacher_is_one_line(dataset: Path, tmp_path: Path) -> None:
    """Of the same name and shape: weights and settings tell them apart."""
    opened = open_dataset(dataset, view=VIEW, image_tokens=8)
    mine = training_data(opened)
    assert mine.teachers.keys() == TARGETS.keys()
    assert mine.teachers["gen"].startswith("tests.teaching:blocks (weights none, settings ")
    other = replace(TARGETS["depth"], settings={"least": 100})
    mixture = make_mixture(tmp_path / "raw", images=20, text_only=8, asked=2)
    build_dataset(
        mixture, tmp_path / "dataset", make_tokenizer(tmp_path / "tokenizer"),
        targets=TARGETS | {"depth": other, "gen": replace(TARGETS["gen"], storage="int8")},
    )  # fmt: skip
    theirs = open_dataset(tmp_path / "dataset", view=VIEW, image_tokens=8)
    with pytest.raises(TrainError, match=r"validation.dataset: .* has targets depth of tests.*odd"):
        check_same_tokenizer(opened, theirs, ["depth"])
    check_same_tokenizer(opened, theirs, ["gen"])  # stored otherwise, of the same teacher
    check_same_tokenizer(opened, theirs)
    config = aux_run(dataset, tmp_path / "run")
    state = CheckpointState(config=asdict(config), data=mine, files={})
    start = Checkpoint(path=tmp_path / "before", step=1, state=state)
    said: list[str] = []
    check_start(start, theirs, said.append)
    (line,) = said
    assert line.startswith(f"init_from: {tmp_path / 'dataset'} has targets depth of tests.teaching")
    assert f"{tmp_path / 'before'} has learnt to predict" in line
    check_start(start, opened, said.append)
    assert len(said) == 1
