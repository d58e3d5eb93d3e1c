"""Dataclasses of many fields are constructed by keyword: the reader sees which value is which."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_POSITIONAL_FIELDS = 4
PRODUCTION = [*(ROOT / "packages").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")]


def last_name(node: ast.expr) -> str:
    """`b` of `b`, `a.b`, `b(...)` and `a.b(...)`."""
    if isinstance(node, ast.Call):
        return last_name(node.func)
    return getattr(node, "attr", getattr(node, "id", ""))


def large_classes(modules: Iterable[ast.Module]) -> set[str]:
    """Names of dataclasses and named tuples of more than four fields, inherited ones included."""
    found = [node for tree in modules for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    own = {node.name: node for node in found}

    def fields(node: ast.ClassDef) -> int:
        inherited = sum(fields(own[base]) for base in map(last_name, node.bases) if base in own)
        said = [ast.unparse(s.annotation) for s in node.body if isinstance(s, ast.AnnAssign)]
        return inherited + sum("ClassVar" not in annotation for annotation in said)

    return {
        node.name
        for node in found
        if "dataclass" in map(last_name, node.decorator_list)
        or "NamedTuple" in map(last_name, node.bases)
        if fields(node) > MAX_POSITIONAL_FIELDS
    }


def positional_calls(tree: ast.Module, classes: set[str]) -> list[str]:
    """The calls of these classes with positional arguments, as line and name."""
    return [
        f"{node.lineno} {last_name(node.func)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and node.args and last_name(node.func) in classes
    ]


def test_dataclasses_of_many_fields_are_constructed_by_keyword() -> None:
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PRODUCTION}
    classes = large_classes(trees.values())
    assert {"BuildPlan", "RunConfig", "ImageSpec", "Member"} <= classes
    found = {path: positional_calls(tree, classes) for path, tree in trees.items()}
    assert {str(path.relative_to(ROOT)): calls for path, calls in found.items() if calls} == {}


def test_positional_construction_is_found() -> None:
    tree = ast.parse(
        "@dataclass(frozen=True)\n"
        "class Base:\n    a: int\n    b: int\n    c: int\n"
        "@dataclasses.dataclass\n"
        "class Large(Base):\n    d: int\n    e: int\n"
        "class Row(NamedTuple):\n    a: int\n    b: int\n    c: int\n    d: int\n    e: int\n"
        "Base(1, 2, 3)\n"
        "module.Large(1, 2, 3, d=4, e=5)\n"
        "Large(a=1, b=2, c=3, d=4, e=5)\n"
        "Row(*values)\n"
    )
    assert large_classes([tree]) == {"Large", "Row"}
    assert positional_calls(tree, {"Large", "Row"}) == ["17 Large", "19 Row"]
