"""The rules of the house that a machine can check."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60

PACKAGED = sorted((ROOT / "packages").rglob("*.py"))
ALL = [
    *PACKAGED,
    *sorted((ROOT / "pipelines").rglob("*.py")),
    *sorted((ROOT / "tests").rglob("*.py")),
]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def folders_to_explain() -> list[Path]:
    """The packages, the pipelines and every folder below that holds code or recipes."""
    packages = [folder for folder in (ROOT / "packages").iterdir() if folder.is_dir()]
    pipelines = ROOT / "pipelines"
    held = {path.parent for kind in ("*.py", "*.yaml", "*.sh") for path in pipelines.rglob(kind)}
    return sorted({*packages, pipelines, *held})


@pytest.mark.parametrize("path", PACKAGED, ids=name_of)
def test_module_says_what_it_is_and_what_is_public(path: Path) -> None:
    module = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(module), "the module needs a docstring"
    assigned = {
        target.id
        for statement in module.body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
    assert "__all__" in assigned, "the module needs __all__"


def test_files_are_short() -> None:
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in ALL}
    assert {name: n for name, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    long: dict[str, int] = {}
    for path in ALL:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long[f"{name_of(path)}:{node.lineno} {node.name}"] = lines
    assert long == {}


def test_nothing_is_called_utils() -> None:
    vague = {"utils.py", "util.py", "helpers.py", "misc.py", "common.py"}
    assert [name_of(path) for path in ALL if path.name in vague] == []


@pytest.mark.parametrize("folder", folders_to_explain(), ids=name_of)
def test_folder_has_a_readme(folder: Path) -> None:
    assert (folder / "README.md").is_file()


def test_every_requirement_has_a_pin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(text for extra in extras.values() for text in extra)]
    names = {canonicalize_name(Requirement(text).name) for text in wanted} - {project["name"]}
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert names <= {canonicalize_name(name) for name in pins}


def test_make_constraints_installs_every_extra_and_no_target_is_taken_for_a_file() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    _, _, recipe = makefile.partition("\nconstraints:")
    named = re.findall(r'-e "\.\[(.+?)\]"', recipe)[0].split(",")
    below = [Requirement(text) for text in extras["dev"]]
    inside = {extra for it in below if it.name == project["name"] for extra in it.extras}
    assert {*named, *inside} == set(extras)
    targets = re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE)
    phony = re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[0].split()
    assert sorted(phony) == sorted(targets)
