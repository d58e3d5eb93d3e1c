"""Every recipe in the tree parses, and a key it does not know stops it by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from lapilli.data.config import BuildConfig
from lapilli.data.errors import DataError
from lapilli.data.text.templates import Template, get_template
from lapilli.train.config import RunConfig
from lapilli.train.errors import TrainError
from pipelines.cli.command import UsageError, parse

RECIPES = Path(__file__).parents[2] / "pipelines" / "recipes"
PATHS = sorted(RECIPES.rglob("*.yaml"))
# What people and scripts call by name.
FIXED = ["llava15/pretrain_data.yaml", "llava15/finetune_data.yaml"]
TEMPLATE_KEYS = {field.name for field in fields(Template)} | {"base"}
# Settings that the foreign model behind a part defines; any key may stand there.
FREE = {"settings", "aliases", "environment", "layers", "weights", "shapes"}
NAMED = (("views",), ("targets",))  # mappings by names of one's own


@dataclass(frozen=True)
class Recipe:
    """A recipe's kind (a config's class, or Template), the flags a user must add, what it is on."""

    kind: type
    flags: tuple[str, ...] = ()
    base: Path | None = None

    def read(self, path: Path) -> object:
        if self.kind is Template:
            return get_template(path)
        layers = [f"--config={layer}" for layer in (self.base, path) if layer]
        return parse(self.kind, [*layers, *self.flags], "")


def recipe_of(values: dict[str, Any]) -> Recipe:
    """What a YAML file is, by its keys."""
    if "compat" in values and "sources" not in values:
        # a layer on a build's recipe
        base = RECIPES / "llava15" / "finetune_data.yaml"
        return Recipe(BuildConfig, ("--root=in", "--output=out"), base)
    if values.keys() <= {"tokenizer", "template"} and "tokenizer" in values:
        # a layer for another language model, on any build's recipe
        base = RECIPES / "visper_lm" / "pretrain_data.yaml"
        return Recipe(BuildConfig, ("--root=in", "--output=out"), base)
    if "sources" in values:
        # flags win over the file: a recipe may leave the tokenizer to the user
        return Recipe(BuildConfig, ("--root=in", "--output=out", "--tokenizer=name"))
    if "views" in values and "sources" not in values:
        # a layer on a recipe of one's own
        base = RECIPES / "own_data" / "data.yaml"
        return Recipe(BuildConfig, ("--root=in", "--output=out", "--tokenizer=name"), base)
    if "sampler" in values and "model" not in values:
        # a layer on any run's recipe
        base = RECIPES / "tiny" / "pretrain.yaml"
        return Recipe(RunConfig, ("--dataset=in", "--output=out"), base)
    if "model" in values and "global_batch_size" not in values:
        # a second stage, or other models: a layer on the first's
        base = RECIPES / "tiny" / "pretrain.yaml"
        return Recipe(RunConfig, ("--dataset=in", "--output=out"), base)
    if "model" in values:
        return Recipe(RunConfig, ("--dataset=in", "--output=out"))
    if values.keys() <= TEMPLATE_KEYS:
        return Recipe(Template)
    raise AssertionError(
        f"neither a build (sources), a run (model) nor a template: {sorted(values)}; "
        "teach recipe_of this kind of file"
    )


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def with_unknown_key(values: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Copies of `values`, each with one unknown key in one of the mappings it holds."""
    for where in mappings(values, ()):
        planted = copy.deepcopy(values)
        target: Any = planted
        for key in where:
            target = target[key]
        if where[-1:] not in NAMED:  # its keys are names; the mappings below are checked
            target["unknown_key"] = 1
            yield ".".join(map(str, where)) or "top", planted


def mappings(value: Any, where: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    if isinstance(value, dict):
        yield where
        children: Any = value.items()  # pyright: ignore[reportUnknownMemberType]
    elif isinstance(value, list):
        children = enumerate(value)  # pyright: ignore[reportUnknownArgumentType]
    else:
        return
    for key, child in children:
        if key not in FREE:
            yield from mappings(child, (*where, key))


@pytest.mark.parametrize("name", FIXED)
def test_fixed_recipes_exist(name: str) -> None:
    assert (RECIPES / name) in PATHS


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(RECIPES)))
def test_recipe_parses(path: Path) -> None:
    recipe = recipe_of(load(path))
    assert isinstance(recipe.read(path), recipe.kind)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(RECIPES)))
def test_an_unknown_key_is_named(path: Path, tmp_path: Path) -> None:
    values = load(path)
    recipe = recipe_of(values)
    for where, planted in with_unknown_key(values):
        changed = tmp_path / f"{where}.yaml"
        changed.write_text(yaml.safe_dump(planted), encoding="utf-8")
        with pytest.raises((UsageError, DataError, TrainError), match="unknown_key"):
            recipe.read(changed)
