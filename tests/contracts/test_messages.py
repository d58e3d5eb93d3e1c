"""What messages advise exists: every `--option`, and every setting that an error begins with."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

ROOT = Path(__file__).parents[2]
CONFIGS = {
    "preprocess": "lapilli.data.config:BuildConfig",
    "tokenizer": "pipelines.tokenizer:TokenizerConfig",
    "train": "lapilli.train.config:RunConfig",
    "estimate": "lapilli.train.config:RunConfig",
    "check": "pipelines.check:CheckConfig",
    "chat": "pipelines.chat:ServeConfig",
    "serve": "pipelines.serve:ServeConfig",
    "evaluate": "pipelines.evaluate:EvaluateConfig",
    "export": "pipelines.export:ExportConfig",
    "generate": "pipelines.generate:GenerateConfig",
    "download": "pipelines.download:DownloadConfig",
    "probe": "pipelines.probe:ProbeConfig",
    "score": "pipelines.score:ScoreConfig",
    "import_flags": "pipelines.import_flags:ImportConfig",
    "quickstart": "pipelines.quickstart:QuickstartConfig",
    "reproduce": "pipelines.reproduce:ReproduceConfig",
}
# Whose message a module's is: the commands that come to it. The longest prefix counts.
OWNERS = {
    "packages/data": {"preprocess"},
    "packages/data/lapilli/data/dataset": {"train", "evaluate"},
    "packages/data/lapilli/data/dataset/export": {"export"},
    "packages/data/lapilli/data/text/export": {"export"},
    "packages/data/lapilli/data/dataset/verify": {"verify"},
    "packages/model": {"train"},
    "packages/model/lapilli/model/interop": {"export"},
    "packages/train": {"train"},
    "packages/train/lapilli/train/inference/assistant": {"generate", "chat", "serve"},
    "packages/train/lapilli/train/inference/evaluate": {"evaluate"},
    "packages/train/lapilli/train/inference/probing": {"probe"},
    "packages/train/lapilli/train/inference/ray_evaluation": {"evaluate"},
    "packages/train/lapilli/train/scoring": {"score"},
    "pipelines/serving": {"serve", "chat"},
    "pipelines/lmms_eval": {"evaluate", "score"},
    "pipelines/downloads": {"download"},
    "pipelines/exports": {"export"},
    "pipelines/launch_scripts": {"import_flags"},
    "pipelines/reproduction": {"reproduce"},
    "pipelines/import_flags": {"import_flags", "train"},
    "pipelines/cli/question_file": {"generate"},
    "pipelines/cli/help_text": {"train"},
}
# Options of other programs.
FOREIGN = {
    "--force-reinstall", "--no-deps", "--no-cache-dir", "--no-binary", "--shm-size",
    "--require-hashes", "--pretrain_mm_mlp_adapter", "--model_max_length", "--help", "--version",
    "--concatenate", "--help_all", "--local-dir", "--include", "--num_gpus", "--exclude",
    "--zero_stage", "--lr_scheduler_type", "--config_file",
}  # fmt: skip
VERB = re.compile(
    r"\b(preprocess|tokenizer|estimate|train|replay|show|verify|repair|report|check|export|chat|serve|generate|evaluate|probe|score|download|reproduce)\b"
)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z_.-]*[a-z]")


def options_of(kind: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of a config dataclass's fields."""
    hints = get_type_hints(kind)
    for field in fields(kind):
        yield prefix + field.name
        for one in (hints[field.name], *get_args(hints[field.name])):
            if is_dataclass(one):
                yield from options_of(one, f"{prefix}{field.name}.")


@cache
def options(verb: str) -> frozenset[str]:
    """What a command takes: its config's fields, and what its module adds by hand."""
    source = (ROOT / "pipelines" / f"{verb}.py").read_text(encoding="utf-8")
    texts = strings(source, names=True)
    found = {text for text in texts if re.fullmatch(r"--[a-z_]+", text)}
    if verb in CONFIGS:
        module, _, name = CONFIGS[verb].partition(":")
        kind = getattr(importlib.import_module(module), name)
        found |= {f"--{option}" for option in options_of(kind)} | {"--config"}
    return frozenset(found)


def strings(source: str, *, names: bool = False) -> Iterator[str]:
    """The texts of a module, f-strings with `{}` for what they fill in, docstrings left out.

    With `names` those alone that are an argument of `add_argument` or a constant of the module.
    """
    tree = ast.parse(source)
    chosen: list[ast.AST] = [tree]
    if names:
        chosen = [n for n in tree.body if isinstance(n, ast.Assign)]
        chosen += [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"
        ]
    inner = {
        id(part)
        for n in ast.walk(tree)
        if isinstance(n, ast.JoinedStr)
        for part in ast.walk(n)
        if part is not n
    }
    docs = {
        id(n.body[0].value)
        for n in ast.walk(tree)
        if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and n.body
        and isinstance(n.body[0], ast.Expr)
    }
    for node in (found for one in chosen for found in ast.walk(one)):
        if id(node) in inner or id(node) in docs:
            continue
        text = text_of(node)
        if text is not None:
            yield text


def text_of(node: ast.AST) -> str | None:
    """A text, with `{}` for what it fills in; None for what is none."""
    if isinstance(node, ast.JoinedStr):
        parts = (str(p.value) if isinstance(p, ast.Constant) else "{}" for p in node.values)
        return "".join(parts)
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return str(node.value) if is_text else None  # type: ignore[attr-defined]


def advised(path: Path) -> Iterator[tuple[str, str, set[str]]]:
    """The options that a module's texts name: option, text, and whose it must be."""
    name = str(path.relative_to(ROOT).with_suffix(""))
    owner = max((prefix for prefix in OWNERS if name.startswith(prefix)), key=len, default="")
    own = OWNERS[owner] if owner else {path.stem}
    for text in strings(path.read_text(encoding="utf-8")):
        if text.startswith("--"):
            continue  # an argument for a command, which that command checks
        for option in {*OPTION.findall(text)} - FOREIGN:
            yield option, text, {*VERB.findall(text)} | own


MODULES = sorted(
    path
    for folder in ("packages", "pipelines")
    for path in (ROOT / folder).rglob("*.py")
    if "benchmarks" not in path.parts
)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_an_advised_option_is_one_of_the_commands_that_say_it(path: Path) -> None:
    for option, text, verbs in advised(path):
        known = {verb for verb in verbs if (ROOT / "pipelines" / f"{verb}.py").exists()}
        assert any(option in options(verb) for verb in known), f"{option}: {text!r}"


def test_a_message_with_an_option_of_another_command_is_found(tmp_path: Path) -> None:
    """`export` has no --template, though `preprocess` has."""
    assert "--template" in options("preprocess")
    assert "--template" not in options("export")
    assert {"--optim.lr", "--dataset"} <= options("train")
    assert {"--root", "--allow_code"} <= options("repair")
    module = tmp_path / "made.py"
    module.write_text('"""--doc"""\nA = f"take --no{1}thing, or name it with --template"\n')
    (text,) = (text for text in strings(module.read_text()) if "take" in text)
    assert OPTION.findall(text) == ["--no", "--template"]


def begun() -> Iterator[tuple[str, str]]:
    """The names that errors begin with, `name: value; expected ...`, and where."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_error = isinstance(node, ast.Call) and getattr(node.func, "id", "") in {
                "DataError",
                "ModelError",
                "TrainError",
            }
            if not is_error or not node.args:  # type: ignore[attr-defined]
                continue
            text = text_of(node.args[0]) or ""  # type: ignore[attr-defined]
            if found := re.match(r"([a-z]+(?:[_.][a-z_]+)+): ", text):
                yield found[1], f"{path.name}: {text!r}"


def test_an_error_begins_with_a_setting_that_exists() -> None:
    known = {option.removeprefix("--") for verb in CONFIGS for option in options(verb)}
    known |= {name.rpartition(".")[2] for name in known}
    known |= {
        f"{a}.{b}" for name in known if name.count(".") > 1 for a, b in [name.split(".")[-2:]]
    }
    known |= {"choose_buckets", "cache_limit", "merge_index", "input_ids"}  # of functions
    found = [*begun()]
    assert len(found) > 30
    assert [where for name, where in found if name not in known] == []
