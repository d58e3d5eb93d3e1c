"""A step that went wrong is kept, and looking into it finds what was planted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lapilli.model.vlm import build_model
from lapilli.train.config import CheckpointConfig, OptimConfig, RecoveryConfig, RunConfig
from lapilli.train.driver.launching import launch
from lapilli.train.driver.preflight import preflight
from lapilli.train.driver.replay import examine
from lapilli.train.errors import TrainError
from lapilli.train.health.step_dump import is_wrong, read_kept
from pipelines.replay import main, replay
from tests.train.small_run import small_dataset, small_run
from tests.train.tiny import model_config, random_steps


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("replay"))


def alone(dataset: Path, output: Path, **values: object) -> RunConfig:
    return small_run(dataset, output, num_workers=1, launcher="process", **values)


def test_a_loss_is_wrong_when_it_is_no_number_or_far_above_the_median() -> None:
    recent = [2.0, 1.0, 3.0] * 4
    assert is_wrong(float("nan"), 1.0, recent, 0.0)
    assert is_wrong(1.0, float("inf"), recent, 0.0)
    assert is_wrong(1.0, None, recent, 0.0) is None
    assert is_wrong(9.9, 1.0, recent, 5.0) is None
    assert "5 times 2" in str(is_wrong(10.1, 1.0, recent, 5.0))
    assert is_wrong(1e9, 1.0, recent, 0.0) is None
    assert is_wrong(1e9, 1.0, recent[:9], 5.0) is None  # too few to tell


@pytest.mark.parametrize("broken", ["projector.0", "language.model.layers.1.mlp.up_proj"])
def test_the_first_module_that_breaks_is_found(broken: str) -> None:
    model = build_model(model_config())
    ranks = random_steps(1, seed=4)[0]
    whole = examine(model, ranks, torch.device("cpu"), 0, 0)
    assert (whole.weight, whole.output, whole.gradient, whole.operation) == ("", "", "", "")
    with torch.no_grad():
        model.get_submodule(broken).weight[0, 0] = float("inf")  # type: ignore[index]
    found = examine(model, ranks, torch.device("cpu"), 0, 0)
    assert found.weight == f"{broken}.weight"
    assert found.output == broken
    assert found.loss != found.loss
    assert found.operation


def test_a_gradient_that_is_no_number_is_found_where_the_loss_is_one() -> None:
    model = build_model(model_config())

    class Root(torch.nn.Module):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            """0 times the root of 0: a number, and its derivative is none."""
            return values + 0.0 * torch.sqrt(values - values)

    model.projector.append(Root())  # type: ignore[operator]
    ranks = random_steps(1, seed=4)[0]
    found = examine(model, ranks, torch.device("cpu"), 0, 0)
    assert found.loss == found.loss
    assert (found.weight, found.output) == ("", "")
    assert "SqrtBackward" in found.operation


def test_a_run_away_learning_rate_is_kept_and_seen_again(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optim = OptimConfig(lr=1e30, grad_clip=0.0)
    config = alone(dataset, tmp_path / "run", checkpoint=CheckpointConfig(every=100), optim=optim)
    with pytest.raises(
        TrainError, match=r"step \d+: loss .*lower optim.lr.*lapilli replay"
    ) as raised:
        launch(preflight(config))
    path = Path(str(raised.value).partition("lapilli replay ")[2].split()[0])
    kept = read_kept(path)
    names = [name for rank in kept.batches() for batch in rank for name in batch.sample_ids]
    assert names == [name for rank in kept.sample_ids for micro in rank for name in micro]
    assert len(names) == sum(index >= 0 for index in kept.sample_indices)
    found = replay(path)
    assert found.start == 0
    assert found.loss != found.loss or found.loss == float("inf")
    assert {name for name, _ in found.samples} == set(names)
    assert found.weight or found.output
    assert main([str(path)]) == 0
    assert f"step {kept.step + 1}: loss" in capsys.readouterr().out


def test_a_spike_stops_the_run_and_its_replay_has_the_same_loss(
    dataset: Path, tmp_path: Path
) -> None:
    optim = OptimConfig(lr=1.0, schedule="constant", grad_clip=0.0)  # too high: the loss jumps
    config = alone(
        dataset,
        tmp_path / "run",
        epochs=4,
        zero_stage=0,
        optim=optim,
        recovery=RecoveryConfig(loss_spike_factor=1.0001),
    )
    with pytest.raises(TrainError, match=r"more than recovery\.loss_spike_factor = 1\.0001 times"):
        launch(preflight(config))
    (path,) = (tmp_path / "run" / "replay").iterdir()
    found = replay(path)
    assert found.loss == pytest.approx(read_kept(path).loss, abs=1e-5)
    assert (found.weight, found.output, found.gradient, found.operation) == ("", "", "", "")
    assert [loss for _, loss in found.samples] == sorted(
        (loss for _, loss in found.samples), reverse=True
    )


def test_a_folder_without_a_step_and_settings_that_say_nothing_are_named(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"replay: .* holds no kept step"):
        main([str(tmp_path)])
    config = small_run(tmp_path, tmp_path / "run")
    with pytest.raises(TrainError, match=r"loss_spike_factor: 0\.5; expected 0, or more than 1"):
        replace(config, recovery=RecoveryConfig(loss_spike_factor=0.5))
    with pytest.raises(TrainError, match="min_workers: 3 with num_workers 2"):
        replace(config, recovery=RecoveryConfig(min_workers=3))
    with pytest.raises(TrainError, match=r"of these 2, 4 would"):
        replace(config, num_workers=4, recovery=RecoveryConfig(min_workers=2))
