"""Who may import whom: the contracts in pyproject.toml hold, and would notice if they did not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("data", "model", "train")


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the tree below `root`, even where another copy is installed."""
    paths = [str(root / "packages" / package) for package in PACKAGES]
    return subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*paths, str(root)])},
        capture_output=True,
        text=True,
        check=False,
    )


def copy_tree(target: Path) -> None:
    for folder in ("packages", "pipelines"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, target / folder, ignore=ignored)
    shutil.copy2(ROOT / "pyproject.toml", target)


def test_import_directions_hold() -> None:
    found = lint_imports(ROOT)
    assert found.returncode == 0, found.stdout + found.stderr


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Late imports and those for types alone are imports too."""
    graph = grimp.build_graph("lapilli.data", "lapilli.model", "lapilli.train", "pipelines")
    packages = {m for m in graph.modules if graph.find_children(m)}  # which hand names on
    imports = {m: graph.find_modules_directly_imported_by(m) - packages for m in graph.modules}
    tuple(TopologicalSorter(imports).static_order())  # raises CycleError, with the circle


@pytest.mark.parametrize(
    ("package", "planted", "contract"),
    [
        ("data", "import lapilli.train", "data and model do not know each other"),
        ("data", "import lapilli.model.merging", "data and model do not know each other"),
        ("model", "from lapilli.data import DataError", "data and model do not know each other"),
        ("train", "import pipelines.cli.command", "pipelines are on top"),
        ("model", "import tests.factories", "nothing imports the tests"),
        ("model", "import ray.train", "models know nothing of Ray and DeepSpeed"),
        ("model", "import deepspeed", "models know nothing of Ray and DeepSpeed"),
        ("data", "import lapilli.data.io.access", "rooms of lapilli.data import downwards"),
        ("model", "import lapilli.model.vlm", "rooms of lapilli.model import downwards"),
        ("train", "import lapilli.train.worker.loop", "rooms of lapilli.train import downwards"),
    ],
)
def test_a_planted_import_is_found(
    tmp_path: Path, package: str, planted: str, contract: str
) -> None:
    copy_tree(tmp_path)
    module = tmp_path / "packages" / package / "lapilli" / package / "errors.py"
    # inside a function: a late import is an import too
    module.write_text(module.read_text() + f"\n\ndef planted() -> None:\n    {planted}\n")
    found = lint_imports(tmp_path)
    assert found.returncode == 1, found.stdout + found.stderr
    broken = [line for line in found.stdout.splitlines() if "BROKEN" in line]
    assert any(contract in line for line in broken), found.stdout
