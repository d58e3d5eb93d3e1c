"""Every command of a page is one that its program takes, on files that are there.

A verb's own parser reads its arguments, recipes included, and nothing runs. Of other programs
(make, pip, ray) targets, files and extras are looked up.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipelines.benchmarks.__main__ import COMMANDS
from pipelines.cli.command import UsageError
from pipelines.cli.main import VERBS
from tests.contracts.pages import PAGES, ROOT, blocks, name_of

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
# Programs whose arguments say nothing about this project.
FOREIGN = {
    "cd",
    "export",
    "git",
    "mkdir",
    "unzip",
    "wget",
    ".",
    "source",
    "pre-commit",
    "twine",
    "docker",
    "kubectl",
    "cp",
    "hf",
}


class Parsed(Exception):
    """The arguments were read; the command would begin."""


def commands(text: str) -> list[list[str]]:
    """The commands of a block of bash as words, without comments, variables and what joins them."""
    found: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"\s(?:&&|\||;)\s", re.sub(r"(^|\s)#.*", "", line)):
            words = shlex.split(part)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words:
                found.append(words)
    return found


def read_by_its_parser(verb: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a verb up to the point where its arguments are read."""
    module = importlib.import_module(f"pipelines.{verb}")

    def then_stop(read: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            read(*given, **named)
            raise Parsed

        return call

    reader = next((name for name in ("parse", "read_arguments") if hasattr(module, name)), None)
    if reader:
        monkeypatch.setattr(module, reader, then_stop(getattr(module, reader)))
    else:
        parser = argparse.ArgumentParser
        monkeypatch.setattr(parser, "parse_args", then_stop(parser.parse_args))
    monkeypatch.chdir(ROOT)
    with pytest.raises(Parsed):
        module.main(words)


def checked(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise where a command names a verb, option, file, target or extra that does not exist."""
    program, rest = Path(words[0]).name, words[1:]
    if program == "lapilli":
        if rest and rest[0] not in ("--help", "--version"):
            assert rest[0] in VERBS, f"{rest[0]} is no verb"
            if rest[0] != "simd":
                read_by_its_parser(rest[0], rest[1:], monkeypatch)
    elif program.startswith("python") and rest[:1] == ["-m"] and "pipelines." in rest[1]:
        verb = rest[1].removeprefix("pipelines.")
        if verb in VERBS:
            checked(["lapilli", verb, *rest[2:]], monkeypatch)
        else:
            assert verb == "benchmarks", verb
            assert {*rest[2:3]} <= {*COMMANDS, "TOPIC"}, rest[2]
    elif program.startswith("python"):
        files = [word for word in rest if word.endswith(".py")]
        assert [file for file in files if not (ROOT / file).exists()] == []
    elif program == "make":
        names = [word for word in rest if "=" not in word and not word.startswith("-")]
        assert [name for name in names if name not in TARGETS] == []
    elif program == "pip":
        files = [file for flag, file in pairwise(rest) if flag == "-r"]
        assert [file for file in files if not (ROOT / file).exists()] == []
        named = [extra for word in rest for extra in re.findall(r"lapilli\[([\w,-]+)\]", word)]
        named += [extra for word in rest for extra in re.findall(r"^\.\[([\w,-]+)\]", word)]
        assert {one for names in named for one in names.split(",")} <= {*EXTRAS}
    elif program == "sbatch":
        after = next(place for place, word in enumerate(rest) if word.endswith(".sh"))
        assert (ROOT / rest[after]).exists(), rest[after]
        checked(rest[after + 1 :], monkeypatch)
    elif program == "ray" and rest[0] in ("up", "down"):
        assert (ROOT / rest[1]).exists(), rest[1]
    elif program == "ray":
        after = rest.index("--")
        files = [f for flag, f in pairwise(rest) if flag == "--runtime-env"]
        assert [file for file in files if not (ROOT / file).exists()] == []
        checked(rest[after + 1 :], monkeypatch)
    else:
        assert program in FOREIGN or (ROOT / words[0]).exists(), f"{program} is not known here"


CASES = [
    pytest.param(words, id=f"{name_of(page)}-{' '.join(words)[:60]}")
    for page in PAGES
    for block in blocks(page, "bash")
    for words in commands(block)
]


@pytest.mark.parametrize("words", CASES)
def test_a_command_is_one_that_its_program_takes(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked(words, monkeypatch)


def test_a_page_whose_commands_are_run_has_a_test() -> None:
    """`sh` says so: they go on from each other, on files that the page makes."""
    tests = {path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    for page in PAGES:
        if any(blocks(page, "sh")):
            assert any(page.name in test for test in tests), name_of(page)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("lapilli trane --config llava15/finetune", AssertionError),
        ("lapilli train --config llava15/nothing --dataset a --output b", UsageError),
        ("lapilli train --config llava15/finetune --dataset a --output b --lr 1", UsageError),
        ("lapilli export run --form hf --output b", UsageError),
        ("make everything", AssertionError),
        ("pip install 'lapilli[everything]'", AssertionError),
        ("pip install -r requirements.txt", AssertionError),
        ("ray job submit -- python -m pipelines.show --simple 3 a", UsageError),
        ("lapili doctor", AssertionError),
    ],
)
def test_a_wrong_command_is_found(
    line: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    (words,) = commands(line)
    with pytest.raises(error):
        checked(words, monkeypatch)
