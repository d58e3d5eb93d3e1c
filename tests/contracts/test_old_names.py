"""An old name of a setting is one line that says the new one, as a flag and as a recipe's key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from lapilli.data.config import BuildConfig
from lapilli.data.renamed import BUILD_NAMES, Renamed
from lapilli.model.config import LanguageConfig, ModelConfig, VisionConfig
from lapilli.train.config import RunConfig
from lapilli.train.renamed import RUN_NAMES
from pipelines.cli.command import parse, run
from tests.pipelines.tiny_recipes import RECIPES
from tests.train.earlier_run import SETTINGS

TRAIN = [f"--config={RECIPES / 'tiny' / 'pretrain.yaml'}", "--dataset=in", "--output=out"]
BUILD = [f"--config={RECIPES / 'llava15' / 'finetune_data.yaml'}", "--root=in", "--output=out"]
TABLES: list[tuple[type[Any], Renamed, list[str]]] = [
    (RunConfig, RUN_NAMES, TRAIN),
    (BuildConfig, BUILD_NAMES, [*BUILD, "--tokenizer=name"]),
]
OLD = [
    pytest.param(kind, base, old, value, said, id=f"{kind.__name__}-{old}-{value}")
    for kind, table, base in TABLES
    for old, new in table.names.items()
    for value, said in {
        "1": f"{old}: renamed to {new}",
        **{v: f"{old}: renamed to {new}, {v} to {w}" for v, w in table.values.get(old, {}).items()},
    }.items()
]


def refused(kind: type[Any], arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    with pytest.raises(SystemExit) as ended:
        run(lambda: parse(kind, arguments, "") and 0)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("form", ["--{}={}", "--{} {}", "recipe", "dotted recipe"])
@pytest.mark.parametrize(("kind", "base", "old", "value", "said"), OLD)
def test_an_old_name_says_the_new_one(
    kind: type[Any],
    base: list[str],
    old: str,
    value: str,
    said: str,
    form: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "recipe" in form:
        nested: Any = {old: value} if form == "dotted recipe" else value
        for name in reversed(old.split(".") if form == "recipe" else []):
            nested = {name: nested}
        (tmp_path / "old.yaml").write_text(yaml.safe_dump(nested), encoding="utf-8")
        given = [f"--config={tmp_path / 'old.yaml'}"]
    else:
        given = form.format(old, value).split()
    assert refused(kind, [*base, *given], capsys) == [f"error: {said}"]


def test_the_table_has_every_name_that_is_gone_and_leads_to_settings() -> None:
    found = {*names(RunConfig("", "", "", ModelConfig(VisionConfig(), LanguageConfig()), 1))}
    before = {*nested_names(SETTINGS)}
    assert RUN_NAMES.names.keys() == before - found
    assert found >= {*RUN_NAMES.names.values()}
    assert not found & RUN_NAMES.names.keys()
    built = {item.name for item in fields(BuildConfig)}
    assert built >= {*BUILD_NAMES.names.values()}
    assert not built & BUILD_NAMES.names.keys()


def nested_names(settings: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in settings.items():
        if isinstance(value, dict) and key not in ("settings", "lrs"):
            yield from nested_names(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def names(config: Any, prefix: str = "") -> Iterator[str]:
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from names(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--optim.lrs.projector=1"], "optim.lrs: renamed to optim.lr_by_part"),
        (["--optim", "{lrs: {projector: 1}}"], "optim.lrs: renamed to optim.lr_by_part"),
        (
            ["--keep=1", "--workers", "2", "--workers=3"],
            "keep: renamed to checkpoint.keep_last; workers: renamed to num_workers",
        ),
    ],
)
def test_deeper_and_several_names_are_one_line(
    given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(RunConfig, [*TRAIN, *given], capsys) == [f"error: {said}"]


@pytest.mark.parametrize("given", [["--offload.to=cpu"], ["--offload={to: cpu}"]])
def test_a_group_with_an_old_name_is_the_group(given: list[str]) -> None:
    assert parse(RunConfig, [*TRAIN, *given], "").offload.to == "cpu"


def test_a_group_with_an_old_name_is_the_group_in_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "layer.yaml").write_text("offload: {to: cpu}\n", encoding="utf-8")
    config = parse(RunConfig, [*TRAIN, f"--config={tmp_path / 'layer.yaml'}"], "")
    assert config.offload.to == "cpu"
