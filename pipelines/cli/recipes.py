"""Find and read recipes, and resolve their paths."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from lapilli.data.io.access import cannot_read, exists
from lapilli.data.io.whole_file import read_whole
from lapilli.data.record import excerpt

__all__ = ["RECIPES", "RecipeError", "find_recipe", "read_recipe", "recipe_names", "with_recipes"]

RECIPES = Path(__file__).parents[1] / "recipes"
FLAG = "--config"
ONE_SOURCE = "--sources."
# Settings that name a file or folder, and those that may also name something else.
PATHS = ("root", "output", "dataset", "init_from", "validation.dataset")
PATHS_OR_NAMES = ("tokenizer", "template", "model.vision.pretrained", "model.language.pretrained")
# A key that only one kind of recipe has, what the kind is called, and the verbs that read it.
KINDS = {
    "sources": ("data", "preprocess or check"),
    "model": ("training", "train or estimate"),
}


class RecipeError(Exception):
    """A recipe that is not there, cannot be read, or is for another verb."""


def recipe_names() -> list[str]:
    """The recipes that come with lapilli: `llava15/finetune`, ..."""
    found = (path for path in RECIPES.glob("*/*.yaml") if not path.stem.startswith("template"))
    return sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in found)


def find_recipe(name: str) -> Path:
    """A recipe's file, from its path or its name below `pipelines/recipes`.

    Raises:
        RecipeError: Neither; names the recipes that are spelt alike.
    """
    if (path := Path(name)).is_file():
        return path
    names = recipe_names()
    if (plain := name.removesuffix(".yaml")) in names:
        return RECIPES / f"{plain}.yaml"
    near = get_close_matches(plain, names, 3, 0.5) or names
    raise RecipeError(
        f"config: {excerpt(name)} is no file and no recipe; expected a path, or one of "
        f"{', '.join(near)}"
    )


def read_recipe(name: str, load: Callable[[str], Any], fields: Sequence[str]) -> dict[str, Any]:
    """A recipe's settings, with paths as this process reaches them.

    A relative path is taken from the recipe's folder; `tokenizer`, `template` and `pretrained` may
    be names as well, and are paths where such a file is there or they begin with a dot.

    Args:
        name: Path or name.
        load: Reads YAML.
        fields: The settings that the verb takes.

    Raises:
        RecipeError: Not there, not readable, no mapping, or a recipe for another verb.
    """
    path = find_recipe(name)
    try:
        values = load(read_whole(path).decode())
    except OSError as error:
        raise RecipeError(f"config: {cannot_read(path, error)}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"config: {path} holds no settings; expected lines like `name: value`")
    settings = cast("dict[str, Any]", values)
    for key, (kind, verbs) in KINDS.items():
        if key in settings and key not in fields:
            raise RecipeError(f"config: {path} is a {kind} recipe, for {verbs}")
    for setting in (*PATHS, *PATHS_OR_NAMES):
        _take_from(path.parent, settings, setting)
    return settings


def _take_from(folder: Path, settings: dict[str, Any], setting: str) -> None:
    """Put the path that a setting means in its place."""
    *groups, key = setting.split(".")
    inner: Any = settings
    for group in groups:
        inner = inner.get(group) if isinstance(inner, dict) else None
    value: Any = inner.get(key) if isinstance(inner, dict) else None
    if not isinstance(value, str) or not value or "://" in value or Path(value).is_absolute():
        return
    may_be_name = setting in PATHS_OR_NAMES and not value.startswith(".")
    if not may_be_name or exists(folder / value):
        inner[key] = str(folder / value)


def with_recipes(
    argv: Sequence[str], load: Callable[[str], Any], fields: Sequence[str]
) -> list[str]:
    """Arguments with the settings of each `--config` in the place of its name.

    `--sources.NAME.FIELD VALUE` changes one field of the recipe's source of that name.

    Raises:
        RecipeError: As `read_recipe`, or a source that no recipe has.
    """
    words: list[str] = []
    sources: list[dict[str, Any]] = []
    changes: list[tuple[str, str]] = []
    recipes: list[tuple[int, dict[str, Any]]] = []
    rest = iter(argv)
    for word in rest:
        flag, has_value, value = word.partition("=")
        if flag.startswith(ONE_SOURCE) and "sources" in fields:
            changes.append((flag.removeprefix(ONE_SOURCE), value if has_value else next(rest, "")))
        elif flag == FLAG:
            name = value if has_value else next(rest, "")
            settings = read_recipe(name, load, fields)
            recipes.append((len(words), settings))
            sources = _sources_of(settings) or sources
            words.append("")
        else:
            words.append(word)
    for place, text in changes:
        _change(sources, place, load(text))
    for number, settings in recipes:
        words[number] = f"{FLAG}={json.dumps(settings)}"
    return words


def _sources_of(settings: dict[str, Any]) -> list[dict[str, Any]]:
    found: object = settings.get("sources")
    listed = cast("list[object]", found) if isinstance(found, list) else []
    return [cast("dict[str, Any]", one) for one in listed if isinstance(one, dict)]


def _change(sources: Sequence[dict[str, Any]], place: str, value: Any) -> None:
    """Set a field, `NAME.FIELD` or `NAME.FIELD.KEY`, of one of the sources."""
    for source in sources:
        name = str(source.get("name"))
        field = place.removeprefix(f"{name}.")
        if field == place or not field:
            continue
        *outer, last = field.split(".")
        inner = source
        for key in outer:
            inner = inner.setdefault(key, {})
            if not isinstance(inner, dict):
                break
        else:
            inner[last] = value
            return
        raise RecipeError(f"sources.{excerpt(place)}: {outer[-1]} has no fields; set it whole")
    names = ", ".join(str(source.get("name")) for source in sources) or "none; name a recipe first"
    raise RecipeError(
        f"sources.{excerpt(place)}: expected the name of a source and a field; the sources are "
        f"{names}"
    )
