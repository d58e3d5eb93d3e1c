"""`lapilli VERB`, and recipes by name and path."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lapilli.data.config import BuildConfig
from pipelines.cli.command import UsageError, parse
from pipelines.cli.main import BARE, VERBS, main
from pipelines.cli.recipes import RECIPES, RecipeError, find_recipe, read_recipe, recipe_names


def typed(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of a command line."""
    monkeypatch.setattr(sys, "argv", ["lapilli", *words])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_a_module_with_an_entry(verb: str) -> None:
    module = importlib.import_module(f"pipelines.{verb.replace('-', '_')}")
    assert callable(module.main)
    assert module.__doc__


def test_every_module_with_an_entry_is_a_verb() -> None:
    modules = {path.stem for path in RECIPES.parent.glob("*.py")} - {"__init__"}
    assert {verb.replace("-", "_") for verb in VERBS} == modules


def test_without_a_verb_they_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(monkeypatch) == 0
    assert {
        line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:2] == "  "
    } == set(VERBS)


def test_the_version_is_the_packages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"lapilli {importlib.metadata.version('lapilli')}\n"


@pytest.mark.parametrize("verb", ["shwo", "..", "benchmarks", "cli.main"])
def test_what_is_no_verb_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    assert typed(monkeypatch, verb) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {verb!r} is not a verb; expected one of ")


@pytest.mark.parametrize("verb", sorted(set(VERBS) - set(BARE)))
def test_help_names_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    assert typed(monkeypatch, verb, "--help") == 0
    assert f"usage: lapilli {verb}" in capsys.readouterr().out


# ---- recipes -----------------------------------------------------------------------------------


def load(text: str) -> Any:
    return yaml.safe_load(text)


def test_a_recipe_is_found_by_its_name_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in recipe_names():
        assert find_recipe(name) == find_recipe(f"{name}.yaml") == RECIPES / f"{name}.yaml"


def test_a_file_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llava15").mkdir()
    (tmp_path / "llava15" / "finetune").write_text("epochs: 3")
    assert find_recipe("llava15/finetune") == Path("llava15/finetune")


def test_a_name_that_is_spelt_alike_is_proposed() -> None:
    with pytest.raises(RecipeError, match=r"llava15/finetun is no .* llava15/finetune\b"):
        find_recipe("llava15/finetun")


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("llava15/finetune", ["sources", "root"], "a training recipe, for train"),
        ("llava15/finetune_data", ["model", "dataset"], "a data recipe, for preprocess"),
    ],
)
def test_a_recipe_of_the_wrong_kind_is_named(name: str, fields: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        read_recipe(name, load, fields)


@pytest.mark.parametrize("text", ["[1, 2]", "text", ""])
def test_a_file_without_settings_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match="holds no settings"):
        read_recipe(str(tmp_path / "r.yaml"), load, ["root"])


def test_paths_of_a_recipe_are_relative_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "recipes"
    (folder / "tokens").mkdir(parents=True)
    (folder / "mine.yaml").write_text("{system: null}")
    values = {
        "root": "../data",
        "output": "s3://bucket/out",
        "tokenizer": "tokens",
        "template": "mine.yaml",
        "dataset": str(tmp_path / "there"),
        "validation": {"dataset": "val"},
        "model": {"vision": {"pretrained": "openai/clip"}, "language": {"pretrained": "./own"}},
    }
    (folder / "r.yaml").write_text(json.dumps(values))
    monkeypatch.chdir(tmp_path)
    found = read_recipe("recipes/r.yaml", load, ["root", "model"])
    assert found == {
        "root": "recipes/../data",
        "output": "s3://bucket/out",
        "tokenizer": "recipes/tokens",
        "template": "recipes/mine.yaml",
        "dataset": str(tmp_path / "there"),
        "validation": {"dataset": "recipes/val"},
        "model": {
            "vision": {"pretrained": "openai/clip"},
            "language": {"pretrained": "recipes/own"},
        },
    }


def test_recipes_are_layered_and_flags_come_last(tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("max_text_length: 7\ntokenizer: other")
    flags = ["--config=tiny/pretrain_data", "--config", str(tmp_path / "more.yaml")]
    config = parse(BuildConfig, [*flags, "--root=r", "--output=o", "--tokenizer=last"], "")
    assert (config.max_text_length, config.tokenizer) == (7, "last")
    assert config.template == str(RECIPES / "tiny" / "template.yaml")


@pytest.mark.parametrize("flags", [["--config"], ["--config="], ["--config=nowhere.yaml"]])
def test_a_recipe_that_is_not_there_is_a_users_mistake(flags: list[str]) -> None:
    with pytest.raises(UsageError, match="is no file and no recipe"):
        parse(BuildConfig, [*flags, "--root=r", "--output=o"][: len(flags)], "")


@pytest.mark.parametrize(
    ("verb", "flag"),
    [
        ("train", "--estimate"),
        ("train", "--replay=r"),
        ("show", "--verify"),
        ("show", "--repair"),
        ("show", "--report"),
    ],
)
def test_a_flag_that_became_a_verb_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str, flag: str
) -> None:
    needed = ["--config=tiny/pretrain", "--dataset=d", "--output=o"] if verb == "train" else ["d"]
    assert typed(monkeypatch, verb, *needed, flag) == 2
    (line,) = capsys.readouterr().err.splitlines()
    name = flag.partition("=")[0]
    assert f"{name}: now lapilli {name[2:]}" in line
