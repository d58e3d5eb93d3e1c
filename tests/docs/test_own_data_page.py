"""What `docs/own_data.md` says of formats, settings, recipes and errors is so."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from lapilli.data.building.driver import build
from lapilli.data.building.runners import run_here
from lapilli.data.config import BuildConfig, SourceConfig
from lapilli.data.dataset.dataset import open_dataset
from lapilli.data.errors import DataError
from lapilli.data.planning.plan import plan_build
from lapilli.data.sources import SOURCES
from lapilli.train.config import RunConfig
from pipelines.check import main as check
from pipelines.cli.command import UsageError, parse
from pipelines.cli.recipes import RECIPES, recipe_names
from pipelines.cli.views import filled_views
from pipelines.preprocess import main as preprocess
from pipelines.tokenizer import main as tokenizer
from pipelines.train import main as train
from tests.docs.pages import blocks, matches, rows, section, sections
from tests.factories import make_tokenizer
from tests.own_photos import own_photos, write_photos

PAGE = "own_data.md"
FORMATS = {name: text for name, text in sections(PAGE, 3).items() if "`check` says" in text}
TINY = "own_data/tiny_data"
OWN = RECIPES / "own_data"


def write_images(folder: Path) -> None:
    for name in ("cat.jpg", "dog.jpg"):
        Image.new("RGB", (40, 30), (200, 90, 20)).save(folder / name)


def built(recipe: Path, root: Path, tokens: Path, output: Path, *layers: str) -> Path:
    """A dataset by a recipe, without Ray."""
    words = [f"--config={name}" for name in (recipe, *layers)]
    words += [f"--root={root}", f"--tokenizer={tokens}", f"--output={output}"]
    config = parse(BuildConfig, [*words, "--mixture.held_out=0"], "")
    build(plan_build(replace(config, views=filled_views(config.views))), runner=run_here)
    return output


def test_every_format_that_check_recognizes_has_an_example() -> None:
    said = {re.findall(r"`check` says `format (\w+)`", text)[0] for text in FORMATS.values()}
    assert said == set(SOURCES) - {"ai_challenger", "basic_vlm"}  # of two published sets alone


@pytest.mark.parametrize("name", FORMATS)
def test_an_example_of_a_format_becomes_a_dataset(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    write_images(photos)
    monkeypatch.chdir(photos)
    for block in blocks(FORMATS[name]):
        if block.language == "python":
            exec(compile(block.text, name, "exec"), {})
        else:
            (photos / block.title).write_text(block.text, encoding="utf-8")
    (said,) = re.findall(r"`check` says `(format \w+)`", FORMATS[name])
    if said == "format text_files":
        (photos / "dog.jpg").unlink()  # it has no text, which is a verdict of its own
    monkeypatch.chdir(tmp_path)
    assert check(["photos"]) == 0
    assert said in capsys.readouterr().out
    (recipe,) = tmp_path.glob("*_data.yaml")
    dataset = open_dataset(
        built(recipe, photos, make_tokenizer(tmp_path / "tokenizer"), tmp_path / "dataset", TINY),
        view="square64",
        image_tokens=16,
    )
    assert dataset.has_images.all()
    assert (dataset.num_trained > 0).all()


@pytest.mark.parametrize(
    "row", rows(section(PAGE, "Settings of a source")), ids=lambda row: row[0].strip("`")
)
def test_an_example_of_a_setting_is_a_setting(row: list[str], tmp_path: Path) -> None:
    name, what, example = row
    values: Any = yaml.safe_load(example.strip("`"))
    found = values
    for key in name.strip("`").split("."):
        found = found[key]  # the example sets what the row is about
    source = {"name": "captions", "annotations": "photos.json", "format": "llava"}
    recipe: dict[str, Any] = {"sources": [source, {**source, "name": "more"}], "template": "v1"}
    recipe["views"] = {"square64": {"size": 64, "fill": "mean", "tower": "clip"}}
    if not values.keys() <= SourceConfig.__dataclass_fields__.keys():
        assert accepted({**recipe, **values}, tmp_path)
        return
    read_by = {kind for kind in re.findall(r"`(\w+)`", what) if kind in SOURCES} or {*SOURCES}
    taken = {
        kind
        for kind in SOURCES
        if accepted({**recipe, "sources": [{**source, "format": kind, **values}]}, tmp_path)
    }
    assert read_by <= taken
    assert taken in (read_by, {*SOURCES})  # a setting that no format refuses is read by some


def accepted(recipe: dict[str, Any], folder: Path) -> bool:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    words = [f"--config={path}", "--root=in", "--output=out", "--tokenizer=name"]
    try:
        parse(BuildConfig, words, "")
    except (DataError, UsageError):
        return False
    return True


def test_the_recipe_that_lies_there_is_what_check_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    photos = tmp_path / "photos"
    photos.mkdir()
    names = [f"IMG_{number:04d}.jpg" for number in range(3)]
    for name in names:
        Image.new("RGB", (8, 6)).save(photos / name)
    lines = ["image,caption", *(f"{name},A mug." for name in names)]
    (photos / "captions.csv").write_text("\n".join(lines))
    assert check(["photos"]) == 0
    written = (tmp_path / "captions_data.yaml").read_text()
    assert written == (OWN / "data.yaml").read_text()


def test_the_recipes_of_the_page_are_there_and_go_together() -> None:
    named = {*re.findall(r"`[^`]*(own_data/\w+)`", section(PAGE, "With pretrained weights"))}
    own = {name for name in recipe_names() if name.startswith("own_data/")}
    assert named == own - {"own_data/data"}
    pairs = {"tiny": "tiny_data", "small": "small_data", "llava_lora": ""}
    for recipe, layer in pairs.items():
        layers = [f"--config={OWN / 'data.yaml'}"]
        layers += [f"--config=own_data/{layer}"] if layer else []
        places = ["--root=in", "--output=out", "--tokenizer=name"]
        data = parse(BuildConfig, [*layers, *places], "")
        run = parse(RunConfig, [f"--config=own_data/{recipe}", "--dataset=d", "--output=r"], "")
        assert run.view in data.views
        assert len(data.views) == 1


def test_the_settings_of_the_recipes_readme_are_settings(tmp_path: Path) -> None:
    text = (OWN / "README.md").read_text(encoding="utf-8")
    table = [row for row in rows(text) if len(row) == 3]
    assert len(table) > 5
    base = ["--config=own_data/llava_lora", "--dataset=d", "--output=r"]
    before = parse(RunConfig, base, "")
    for _, _, example in table:
        layer = tmp_path / "layer.yaml"
        layer.write_text(example.strip("`"))
        assert parse(RunConfig, [base[0], f"--config={layer}", *base[1:]], "") != before


def stops(folder: Path) -> dict[str, Callable[[], Any]]:
    """What makes the first line of a row of `When it stops`, by a word of it."""
    photos = folder / "photos"
    write_photos(photos, own_photos(12))
    broken = folder / "broken"
    broken.mkdir()
    (broken / "a.json").write_text('[{"prompt": "x"}]')
    two = folder / "two"
    two.mkdir()
    for name in ("a.json", "b.csv"):
        (two / name).write_text("[]")
    recipe = folder / "captions_data.yaml"
    tokens = folder / "tokenizer"
    check([str(photos)])
    build_flags = [f"--config={recipe}", f"--root={photos}", f"--output={folder / 'dataset'}"]
    tokenizer([f"--config={recipe}", f"--root={photos}", f"--output={tokens}"])
    built(recipe, photos, tokens, folder / "dataset")

    def lack_photos() -> None:
        (photos / "IMG_0003.jpg").unlink()
        assert check([str(photos)]) == 1

    def differ() -> None:
        recipe.write_text(recipe.read_text() + "\n")
        check([str(photos)])

    run = ["--config=own_data/tiny", f"--dataset={folder / 'dataset'}"]
    return {
        "several annotation files": lambda: check([str(two)]),
        "none of its first": lambda: check([str(broken)]),
        "view:": lambda: train([*run, f"--output={folder / 'run'}"]),
        "holds a tokenizer": lambda: tokenizer(
            [f"--config={recipe}", f"--root={photos}", f"--output={tokens}"]
        ),
        "image_missing": lack_photos,
        "quarantined, over": lambda: preprocess(
            [*build_flags[:2], f"--output={folder / 'other'}", f"--tokenizer={tokens}"]
        ),
        "exists and differs": differ,
    }


def test_what_the_page_says_of_a_stop_is_what_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [row[0].strip("`") for row in rows(section(PAGE, "When it stops"))]
    causes = stops(tmp_path)
    left = {line for line in lines if not any(word in line for word in causes)}
    assert len(left) == 1, "the run that is finished is in the test of the ten commands"
    for word, cause in causes.items():
        (line,) = [line for line in lines if word in line]
        capsys.readouterr()
        try:
            cause()
            said = capsys.readouterr().out
        except Exception as error:
            said = str(error)
        loose = re.sub(r"'\w+'|\d[\d.]*", "...", line.replace("captions_data.yaml", "..."))
        loose = loose.replace("output: tokenizer", "output: ...").replace("in dataset", "in ...")
        assert matches(loose, said), (line, said)
