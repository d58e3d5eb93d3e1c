"""A run whose settings have the names of an earlier version is of use; it cannot be resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import pipelines.evaluate
import pipelines.export
import pipelines.generate
import pipelines.show
import pipelines.train
from lapilli.model.config import LanguageConfig, ModelConfig, VisionConfig
from lapilli.train.config import (
    CheckpointConfig,
    OffloadConfig,
    OptimConfig,
    RecoveryConfig,
    RunConfig,
    ValidationConfig,
)
from lapilli.train.driver.launching import launch
from lapilli.train.driver.preflight import preflight
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.settings import plain_settings, read_run_config, settings_of
from pipelines.reports.describe import kind_of
from tests.pipelines.test_train import one_line
from tests.train.earlier_run import SETTINGS, make_earlier
from tests.train.small_run import VIEW, small_dataset

OLD_MODEL = SETTINGS["model"]
SAME = RunConfig(
    dataset="in", output="out", view=VIEW, global_batch_size=8, micro_batch_size=4, num_workers=1,
    model=ModelConfig(
        VisionConfig(
            settings=OLD_MODEL["vision"]["settings"], vision_feature_layer=-1,
            vision_feature_select_strategy="full", mean=(0.9, 0.9, 0.9), std=(2.0, 2.0, 2.0),
        ),
        LanguageConfig(settings=OLD_MODEL["language"]["settings"]),
        trainable=("vision", "projector"), head_chunk=128, merge="torch", kernels="torch",
    ),
    optim=OptimConfig(
        0.0015, lr_by_part={"projector": 0.01}, weight_decay=0.01, betas=(0.9, 0.98)
    ),
    epochs=6, max_steps=2, max_length=512, sampler="random", loss_reduction="micro_batch_mean",
    offload=OffloadConfig("cpu"), device="cpu", launcher="process", max_shapes=9,
    checkpoint=CheckpointConfig(every=7, keep_last=3, archive_every=2),
    validation=ValidationConfig(samples=255, dataset="other", answers=7, answer_tokens=127),
    recovery=RecoveryConfig(4, 1, 500.0, 90.0),
)  # fmt: skip


def test_settings_of_an_earlier_version_are_read_under_their_new_names() -> None:
    assert settings_of(json.dumps(SETTINGS).encode(), "config.json") == SAME
    now = plain_settings(SAME)
    assert settings_of(now, "config.json") == SAME


@pytest.mark.parametrize(
    "changes",
    [
        {"keep": "many"}, {"checkpoint": 5}, {"checkpoint": {"every": []}}, {"offload": 3},
        {"loss": {"tokens": 1}}, {"optim": []}, {"model": {"loss": "auto"}}, {"no_such_key": 1},
    ],
)  # fmt: skip
def test_what_is_wrong_in_them_is_one_line(changes: dict[str, Any]) -> None:
    with pytest.raises(TrainError, match=r"^config\.json: no run's settings \(.*\)") as said:
        settings_of({**SETTINGS, **changes}, "config.json")
    assert "\n" not in str(said.value)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data"), images=10, text_only=10)


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, and its settings as the earlier version wrote them."""
    run = tmp_path_factory.mktemp("trained") / "run"
    settings = {
        **SETTINGS,
        "dataset": str(dataset),
        "output": str(run),
        "eval_dataset": "",
        "offload": "none",
    }
    launch(preflight(settings_of(settings, "here")))
    before = read_run_config(run)
    make_earlier(run, settings)
    assert "global_batch" in (run / "config.json").read_text(encoding="utf-8")
    assert read_run_config(run) == before
    return run


def flags(dataset: Path, output: Path, **changes: object) -> list[str]:
    """Today's command for the same settings."""
    config = output.parent / f"{output.name}.yaml"
    values = plain_settings(SAME) | {"offload": {}, "validation": {}}
    config.write_text(json.dumps(values), encoding="utf-8")
    given = {"dataset": dataset, "output": output, **changes}
    return [f"--config={config}", *(f"--{key}={value}" for key, value in given.items())]


def test_it_is_shown_asked_evaluated_and_exported(
    trained: Path, dataset: Path, tmp_path: Path
) -> None:
    assert kind_of(trained) == "run"
    assert pipelines.show.main([str(trained)]) == 0
    question = ["--question=What?", "--device=cpu", "--decoding.max_new_tokens=2"]
    for one in (trained, trained / "milestones" / "step-00000002"):
        assert pipelines.generate.main([str(one), *question]) == 0
    asked = [f"--run={trained}", f"--dataset={dataset}", f"--view={VIEW}", "--device=cpu"]
    assert pipelines.evaluate.main(asked) == 0
    export = tmp_path / "export"
    assert pipelines.export.main([str(trained), "--to=hf", f"--output={export}"]) == 0
    assert (export / "model.safetensors").exists()


def test_a_new_run_starts_from_it(trained: Path, dataset: Path, tmp_path: Path) -> None:
    output = tmp_path / "next"
    assert pipelines.train.main(flags(dataset, output, init_from=trained)) == 0
    assert read_run_config(output).init_from == str(trained)
    third = tmp_path / "third"  # through a run that itself started from it
    assert pipelines.train.main(flags(dataset, third, init_from=output)) == 0


@pytest.mark.parametrize("steps", [2, 4])
def test_it_is_not_resumed_and_the_line_says_how_to_go_on(
    steps: int, trained: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    said = one_line(pipelines.train.main, flags(dataset, run, max_steps=steps), capsys)
    assert f"output: {run} was made by an earlier version and cannot be resumed" in said
    assert f"--init_from {run}" in said
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p in before} == before


def test_nor_from_a_copy_of_it(
    trained: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"file://{trained}"
    command = flags(dataset, tmp_path / "fresh", **{"checkpoint.upload": address})
    said = one_line(pipelines.train.main, command, capsys)
    assert f"checkpoint.upload: the run at {address} was made by an earlier version" in said
