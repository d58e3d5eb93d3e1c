"""What can be known without weights is checked before any are read."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lapilli.data.errors import DataError
from lapilli.model.config import LanguageConfig, VisionConfig
from lapilli.model.errors import ModelError
from lapilli.model.parts.language import build_language
from lapilli.train.config import RunConfig, ValidationConfig
from lapilli.train.driver import preflight as preflight_module
from lapilli.train.driver.preflight import preflight
from lapilli.train.errors import TrainError
from tests.train.small_run import small_dataset, small_run


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, and folders of a tower and a language model."""
    folder = tmp_path_factory.mktemp("material")
    dataset = small_dataset(folder, images=6, text_only=2)
    model = small_run(dataset, folder / "run").model
    vision: Any = transformers.CLIPVisionConfig(**model.vision.settings)
    transformers.CLIPVisionModel(vision).save_pretrained(folder / "tower")
    build_language(model.language).save_pretrained(folder / "language")
    return folder


def run_of(material: Path, output: Path, **changes: Any) -> RunConfig:
    config = small_run(
        material / "dataset",
        output,
        num_workers=1,
        launcher="process",
        micro_batch_size=4,
        global_batch_size=4,
    )
    model = replace(
        config.model,
        vision=VisionConfig(pretrained=str(material / "tower")),
        language=LanguageConfig(pretrained=str(material / "language")),
    )
    return replace(config, model=model, **changes)


@pytest.fixture(params=["missing", "damaged"])
def no_weights(request: pytest.FixtureRequest, material: Path, tmp_path: Path) -> Path:
    """The same folders with configs alone: whatever reads weights fails."""
    (tmp_path / "dataset").symlink_to(material / "dataset")
    for part in ("tower", "language"):
        shutil.copytree(material / part, tmp_path / part)
        weights = tmp_path / part / "model.safetensors"
        weights.unlink() if request.param == "missing" else weights.write_bytes(b"cut off")
    return tmp_path


def test_the_material_is_good_but_for_its_weights(no_weights: Path, material: Path) -> None:
    assert preflight(run_of(material, no_weights / "run")).image_tokens == 4
    with pytest.raises(ModelError, match=r"vision\.pretrained: .*tower' cannot be loaded"):
        preflight(run_of(no_weights, no_weights / "run"))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_driver_reads_no_weight_of_a_large_model(
    no_weights: Path, stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folders' weights are missing or cut: the workers will find that, not the driver."""
    monkeypatch.setattr(preflight_module, "MEASURED", 1)  # what is large
    found = preflight(run_of(no_weights, no_weights / "run", zero_stage=stage))
    assert found.step_seconds is None
    assert found.parameters["language"][0] > 1000


class _Real(TorchDispatchMode):
    """The most numbers of a tensor that has them, while a model of fake tensors has none."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, Tensor) and not is_fake(one) and one.device.type != "meta":
                self.largest = max(self.largest, one.numel())
        return made


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_driver_holds_no_weight_of_a_large_model(
    material: Path, tmp_path: Path, stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedding = 512 * 24
    with _Real() as seen:
        preflight(run_of(material, tmp_path / "run", zero_stage=stage))
    assert seen.largest >= embedding, "a small one is built, and seen"
    monkeypatch.setattr(preflight_module, "MEASURED", 1)  # what is large
    with _Real() as seen:
        preflight(run_of(material, tmp_path / "run", zero_stage=stage))
    assert seen.largest < embedding


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"view": "square"}, DataError, "view: 'square' is not in"),
        ({"view": "crop24"}, TrainError, "images of 24 px, the tower takes 32"),
        ({"dataset": "nowhere"}, DataError, "no dataset"),
        ({"max_length": 3}, DataError, "max_length: 3"),
        ({"validation": ValidationConfig(every=1, dataset="nowhere")}, DataError, "no dataset"),
        ({"validation": ValidationConfig(every=1)}, Exception, "held"),
    ],
)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_mistake_is_found_first(
    changes: dict[str, Any], error: type[Exception], words: str, stage: int, no_weights: Path
) -> None:
    config = run_of(no_weights, no_weights / "run", zero_stage=stage, **changes)
    with pytest.raises(error, match=words):
        preflight(config)
    assert not (no_weights / "run").exists()


def test_so_are_the_models_own_sizes(no_weights: Path) -> None:
    config = run_of(no_weights, no_weights / "run")
    vision, language = config.model.vision, config.model.language
    for model, words in (
        (replace(config.model, vision=replace(vision, image_size=48)), "the tower takes 48"),
        (replace(config.model, vision=replace(vision, image_size=30)), "no multiple of .* 16"),
        (replace(config.model, vision=replace(vision, vision_feature_layer=-9)), "layer: -9"),
        (replace(config.model, language=replace(language, attention="x")), "language.attention"),
    ):
        with pytest.raises((ModelError, TrainError), match=words):
            preflight(replace(config, model=model))


def test_so_is_an_output_that_belongs_to_another_run(no_weights: Path) -> None:
    (no_weights / "run").mkdir()
    (no_weights / "run" / "notes.txt").write_text("mine")
    with pytest.raises(TrainError, match="is not empty and no run"):
        preflight(run_of(no_weights, no_weights / "run"))


def test_ids_that_the_model_does_not_know_are_found_first(material: Path, no_weights: Path) -> None:
    path = no_weights / "language" / "config.json"
    path.write_text(path.read_text().replace('"vocab_size": 512', '"vocab_size": 100'))
    with pytest.raises(TrainError, match="the language model knows 100"):
        preflight(run_of(no_weights, no_weights / "run"))
    del material
