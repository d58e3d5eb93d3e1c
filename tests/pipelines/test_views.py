"""A view with `fill: mean`: a tower's own colour, from a recipe through training to an export."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import CLIPVisionConfig

import pipelines.check
import pipelines.export
import pipelines.preprocess
from lapilli.data.building.runners import Runner, run_here
from lapilli.data.errors import DataError
from lapilli.data.images.view import ImageSpec
from lapilli.data.shards.manifest import read_manifest
from lapilli.model.errors import ModelError
from lapilli.train.inference.assistant import open_assistant
from pipelines.cli.views import filled_views
from tests.factories import make_mixture, make_tokenizer
from tests.pipelines.test_ask_published import of_others
from tests.pipelines.test_export_runs import Runs

RECIPE = """
sources:
  - {name: made_up, annotations: mixture.json, images: images}
template: v1
views: {view: VIEW}
"""


@contextmanager
def here(runner: Runner) -> Generator[Runner]:
    """Builds in this process."""
    del runner
    yield run_here


def built(folder: Path, name: str, view: str) -> Path:
    """A dataset of one view, by the command."""
    if not (folder / "root").exists():
        make_mixture(folder / "root", images=6, text_only=1)
        make_tokenizer(folder / "tokenizer")
    recipe = folder / f"{name}.yaml"
    recipe.write_text(RECIPE.replace("VIEW", view))
    arguments = [f"--config={recipe}", f"--root={folder / 'root'}", f"--output={folder / name}"]
    arguments += [f"--tokenizer={folder / 'tokenizer'}", "--num_workers=1"]
    assert pipelines.preprocess.main(arguments) == 0
    assert pipelines.check.main([f"--config={recipe}", f"--root={folder / 'root'}"]) == 0
    return folder / name


def hashes(dataset: Path) -> dict[str, str]:
    return {
        str(path.relative_to(dataset)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(dataset.rglob("*.arrow"))
    }


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    """A published vision model that was trained with a mean of its own."""
    folder = tmp_path / "tower"
    CLIPVisionConfig().save_pretrained(folder)
    settings = {"image_processor_type": "CLIPImageProcessor", "image_mean": [0.1, 0.2, 0.9]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def test_a_towers_mean_is_its_numbers(
    tmp_path: Path, tower: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte the dataset of a recipe that spells them."""
    monkeypatch.setattr("pipelines.preprocess.build_line", here)
    meant = built(tmp_path, "meant", f"{{size: 32, fill: mean, tower: {tower}}}")
    spelt = built(tmp_path, "spelt", "{size: 32, fill: [25, 51, 229]}")
    other = built(tmp_path, "other", "{size: 32, fill: mean, tower: clip}")
    assert hashes(meant) == hashes(spelt)
    assert read_manifest(meant).fingerprint == read_manifest(spelt).fingerprint
    assert read_manifest(other).views["view"].spec["fill"] == [122, 116, 104]
    assert hashes(other) != hashes(spelt)


@pytest.mark.parametrize(
    ("family", "colour"),
    [
        ("clip", (122, 116, 104)),
        ("clip_convnext", (122, 116, 104)),
        ("siglip", (127, 127, 127)),
        ("dinov2", (123, 116, 103)),
    ],
)
def test_a_family_has_the_mean_it_was_published_with(
    family: str, colour: tuple[int, int, int]
) -> None:
    view = ImageSpec(32, "mean", tower=family, alpha="mean")
    assert filled_views({"a": view}) == {"a": ImageSpec(32, colour, alpha="mean")}


def test_a_tower_without_a_processor_has_its_familys_mean(tower: Path) -> None:
    (tower / "preprocessor_config.json").unlink()
    view = ImageSpec(32, "mean", tower=str(tower))
    assert filled_views({"a": view})["a"].fill == (122, 116, 104)


def test_a_mean_that_nothing_says_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fill: mean without a tower; set tower beside it"):
        ImageSpec(32, "mean")
    with pytest.raises(DataError, match="tower: 'clip' is for fill: mean alone"):
        ImageSpec(32, (1, 2, 3), tower="clip")
    with pytest.raises(DataError, match="fill: mean of clip; expected its numbers"):
        ImageSpec(32, "mean", tower="clip").facts()
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    for name in (str(tmp_path), str(tmp_path / "none"), "clop"):
        with pytest.raises(ModelError, match="cannot be read; expected clip, siglip") as found:
            filled_views({"a": ImageSpec(32, "mean", tower=name)})
        assert str(found.value).startswith(f"tower: {name!r}")
        assert "\n" not in str(found.value)


def test_a_run_with_the_mean_exports_without_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another colour is a note, and no way is closed."""
    run = Runs(tmp_path).train("run")
    data = tmp_path / "run/data/view.json"
    assert json.loads(data.read_text())["fill"] == [122, 116, 104]
    for form in ("hf", "llava"):
        assert pipelines.export.main([str(run), f"--to={form}", f"--output={tmp_path / form}"]) == 0
        assert "padded with" not in capsys.readouterr().out
    folder = of_others(tmp_path / "hf", tmp_path / "published")
    asked = open_assistant(folder, template="v1", view="{aspect: pad, fill: mean}")
    assert asked.spec.fill == (122, 116, 104)
