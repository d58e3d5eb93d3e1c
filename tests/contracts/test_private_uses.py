"""Private names of other libraries are used in the modules `*_internals` and nowhere else."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [path for room in ("packages", "pipelines") for path in (ROOT / room).rglob("*.py")]
LIBRARIES = "accelerate|bitsandbytes|deepspeed|peft|ray|torch|transformers"
PRIVATE_NAME = re.compile(rf"({LIBRARIES})(\.\w+)*\._[a-z]\w*(\.\w+)*")
PRIVATE_WORD = re.compile(r"_[a-zA-Z]\w*|ds_(id|shape|numel|tensor)")
PUBLIC_VARIABLES = {"RAY_ADDRESS", "RAY_TMPDIR"}  # in Ray's manual, as is all of RAY_AUTH
# Python's own, a key of config.json, and what other names end in
NO_NAMES = {
    "_replace", "_exit", "_name_or_path",
    "_vision_model", "_token", "_token_id", "_error", "_time_total",
}  # fmt: skip


def private_uses(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Names of other libraries' internals in a module, with their lines.

    Names that begin with an underscore are ours where this module defines them.
    """
    own = {
        getattr(node, "name", None) or getattr(node, "attr", None) or getattr(node, "id", None)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        or (isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store))
    } | {arg.arg for node in ast.walk(tree) if isinstance(node, ast.arguments) for arg in node.args}
    own |= NO_NAMES
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or ""
            names = [f"{module}.{alias.name}".lstrip(".") for alias in node.names]
            yield from ((line, name) for name in names if is_private(name))
        elif isinstance(node, ast.Attribute):
            is_super = ast.unparse(node.value) == "super()"
            if PRIVATE_WORD.fullmatch(node.attr) and (is_super or node.attr not in own):
                yield line, ast.unparse(node)
        elif isinstance(node, ast.keyword) and (node.arg or "").startswith("_"):
            yield line, f"{node.arg}="
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            is_name = PRIVATE_WORD.fullmatch(node.value) and node.value not in own
            if is_name or PRIVATE_NAME.fullmatch(node.value) or is_hidden_variable(node.value):
                yield line, repr(node.value)


def is_private(name: str) -> bool:
    library, *parts = name.split(".")
    is_known = re.fullmatch(LIBRARIES, library) is not None
    return is_known and any(re.match(r"_[a-zA-Z]", part) for part in parts)


def is_hidden_variable(text: str) -> bool:
    is_rays = re.fullmatch(r"RAY_[A-Z_]+", text) is not None
    return is_rays and text not in PUBLIC_VARIABLES and not text.startswith("RAY_AUTH")


def test_private_names_are_used_in_the_modules_for_them_alone() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in SOURCES
        if not path.name.endswith("_internals.py")
        for line, name in private_uses(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "from ray._private import ray_constants", "import torch._dynamo",
        "from torch._C._distributed_c10d import HashStore", "model._keep_in_fp32_modules",
        "x = import_module('ray.data._internal.execution.resource_manager')",
        "patch('transformers.integrations.moe._can_use_grouped_mm', f)", "p.ds_shape",
        "getattr(model_class, '_supports_sdpa', False)", "hasattr(parameter, 'ds_id')",
        "ray.init(_temp_dir='/tmp')", "super()._create_default_callbacks()", "torch._C.x",
        "os.environ.setdefault('RAY_ENABLE_AUTO_CONNECT', '0')", "torch.cuda._sleep(1)",
    ],
)  # fmt: skip
def test_a_private_name_would_be_found(line: str) -> None:
    assert [*private_uses(ast.parse(line))]


@pytest.mark.parametrize(
    "line",
    [
        "class A:\n    def _own(self): ...\n    def f(self, other): return other._own()",
        "turn._replace(parts=())",
        "os.environ['RAY_ADDRESS']",
        "import ray.data",
        "'_name_or_path'",
        "from lapilli.model.torch_internals import FakeTensorMode",
        "model.config.hidden_size",
    ],
)
def test_ones_own_names_are_left_alone(line: str) -> None:
    assert [*private_uses(ast.parse(line))] == []


def test_the_modules_of_internals_use_some() -> None:
    """One without private names is none; deepspeed's engine has names without an underscore."""
    modules = [path for path in SOURCES if path.name.endswith("_internals.py")]
    assert len(modules) == 8
    for path in modules:
        assert [*private_uses(ast.parse(path.read_text(encoding="utf-8")))], path
