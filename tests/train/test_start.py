"""A second stage starts from the first's weights, and from nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lapilli.model.config import LoraConfig, Part
from lapilli.model.vlm import build_model
from lapilli.train.checkpoint.find import latest_checkpoint
from lapilli.train.config import OptimConfig, RunConfig
from lapilli.train.driver.launching import launch
from lapilli.train.driver.preflight import finished_steps, preflight
from lapilli.train.errors import TrainError
from lapilli.train.inference.evaluate import load_trained
from lapilli.train.worker.compatibility import build_start
from tests.factories import build_dataset, make_mixture, make_tokenizer
from tests.train.saved import saved_weights
from tests.train.small_run import small_dataset, small_run

pytestmark = pytest.mark.usefixtures("ray_local")


def with_trainable(config: RunConfig, *parts: Part) -> RunConfig:
    return replace(config, model=replace(config.model, trainable=parts))


def weights_of(run: str) -> dict[str, torch.Tensor]:
    found = latest_checkpoint(Path(run))
    assert found is not None
    return saved_weights(found.path)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("start"), images=8, text_only=0)


@pytest.fixture(scope="module")
def stages(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, RunConfig]:
    """Tower and projector first, then projector and language model."""
    folder = tmp_path_factory.mktemp("stages")
    one = small_run(dataset, folder / "one", max_steps=2, num_workers=1, micro_batch_size=4)
    first = with_trainable(one, "vision", "projector")
    launch(preflight(first))
    two = replace(one, output=str(folder / "two"), init_from=first.output)
    second = with_trainable(two, "projector", "language")
    launch(preflight(second))
    return first, second


def test_the_second_begins_with_what_the_first_ended_with(
    stages: tuple[RunConfig, RunConfig],
) -> None:
    first, second = stages
    began, start = build_start(second)
    assert start is not None
    assert start.step == 2
    random = build_model(second.model).state_dict()
    for name, value in weights_of(first.output).items():
        assert torch.equal(began.state_dict()[name], value), name
    assert not torch.equal(
        began.state_dict()["vision.clip.embeddings.patch_embedding.weight"],
        random["vision.clip.embeddings.patch_embedding.weight"],
    )


def test_a_trained_model_has_the_first_stages_tower_and_the_seconds_language_model(
    stages: tuple[RunConfig, RunConfig],
) -> None:
    first, second = stages
    found = load_trained(Path(second.output)).model.state_dict()
    ours = weights_of(second.output)
    assert not any(name.startswith("vision.") for name in ours)
    for name, value in {**weights_of(first.output), **ours}.items():
        assert torch.equal(found[name], value), name


def test_a_third_stage_starts_from_the_second_with_the_tower_of_the_first(
    stages: tuple[RunConfig, RunConfig], tmp_path: Path
) -> None:
    first, second = stages
    third = replace(second, init_from=second.output, output=str(tmp_path / "three"))
    began, _ = build_start(third)
    for name, value in {**weights_of(first.output), **weights_of(second.output)}.items():
        assert torch.equal(began.state_dict()[name], value), name


def test_it_is_finished_only_with_its_own_settings_and_data(
    stages: tuple[RunConfig, RunConfig], tmp_path: Path
) -> None:
    first, second = stages
    assert finished_steps(first) == finished_steps(second) == 2
    assert finished_steps(replace(first, output=str(tmp_path / "new"))) is None
    with pytest.raises(TrainError, match=r"init_from: .* was started with"):
        finished_steps(replace(second, init_from=""))
    other = small_dataset(tmp_path / "other", images=9, text_only=0)
    with pytest.raises(TrainError, match="was saved with another dataset"):
        finished_steps(replace(first, dataset=str(other)))


def with_other_seed(config: RunConfig) -> RunConfig:
    return replace(config, model=replace(config.model, seed=4))


def with_other_width(config: RunConfig) -> RunConfig:
    vision = config.model.vision
    wider = replace(vision, settings={**vision.settings, "intermediate_size": 32})
    return replace(config, model=replace(config.model, vision=wider))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda c: replace(c, init_from="nowhere"),
            "nowhere is no folder or file on this machine",
        ),
        (with_other_width, r"of shape \(24,\), this model \(32,\)"),
        (with_other_seed, "beside other frozen weights"),
    ],
)
def test_a_start_that_does_not_fit_is_named(
    change: Callable[[RunConfig], RunConfig],
    words: str,
    stages: tuple[RunConfig, RunConfig],
    tmp_path: Path,
) -> None:
    config = change(replace(stages[1], output=str(tmp_path / "run")))
    with pytest.raises(TrainError, match=f"init_from: .*{words}"):
        preflight(config)
    assert not (tmp_path / "run").exists()


def test_a_start_with_another_tokenizer_is_named(
    stages: tuple[RunConfig, RunConfig], tmp_path: Path
) -> None:
    mixture = make_mixture(tmp_path / "raw", images=4, text_only=0)
    tokenizer = make_tokenizer(tmp_path / "tokenizer", vocab_size=300)
    build_dataset(mixture, tmp_path / "dataset", tokenizer)
    config = replace(stages[1], output=str(tmp_path / "run"), dataset=str(tmp_path / "dataset"))
    with pytest.raises(TrainError, match="was trained with another tokenizer"):
        preflight(config)


@pytest.mark.long
def test_a_start_that_changed_meanwhile_ends_the_resumed_run_in_one_line(
    stages: tuple[RunConfig, RunConfig], tmp_path: Path
) -> None:
    first, second = stages
    shutil.copytree(first.output, tmp_path / "one", ignore=shutil.ignore_patterns("ray"))
    started = replace(
        second,
        init_from=str(tmp_path / "one"),
        output=str(tmp_path / "two"),
        checkpoint=replace(second.checkpoint, every=1),
    )
    launch(preflight(started))
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-00000002")
    shutil.rmtree(tmp_path / "one")
    launch(preflight(replace(first, output=str(tmp_path / "one"), optim=OptimConfig(lr=0.02))))
    with pytest.raises(TrainError, match=r"started from weights of .*has others now \(step 2\)"):
        launch(preflight(started))


def test_adapters_start_from_a_run_without_them_and_are_all_that_is_saved(
    stages: tuple[RunConfig, RunConfig], tmp_path: Path
) -> None:
    _, second = stages
    lora = LoraConfig(target="q_proj", rank=2)
    third = replace(
        second,
        output=str(tmp_path / "three"),
        init_from=second.output,
        model=replace(second.model, lora=lora),
        optim=OptimConfig(lr_by_part={"adapters": 1e-4}),
    )
    base = "language.model.layers.0.self_attn.q_proj.base_layer.weight"
    began, _ = build_start(third)
    expected = weights_of(second.output)[base.replace(".base_layer", "")]
    assert torch.equal(began.state_dict()[base], expected)
    launch(preflight(third))
    ours = weights_of(third.output)
    assert {n.partition(".")[0] for n in ours if ".lora_" not in n} == {"projector"}
    found = load_trained(Path(third.output)).model.state_dict()
    assert torch.equal(found[base], expected)
    for name, value in ours.items():
        assert torch.equal(found[name], value), name
