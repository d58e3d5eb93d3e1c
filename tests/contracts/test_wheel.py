"""One distribution from three folders: the namespace, wheel and source distribution, their data."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("data", "model", "train")

# Imports the packages and says where they came from; reads package data the way the code does.
PROBE = """
import importlib, json
found = {}
for package in ("data", "model", "train"):
    found[package] = importlib.import_module(f"lapilli.{package}").__file__
print(json.dumps(found))
"""


LARGEST = 500_000  # bytes of a file in the source distribution
LARGEST_SDIST = 2_000_000


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    kinds = ["-t", "wheel", "-t", "sdist"]
    command = [sys.executable, "-m", "hatchling", "build", *kinds, "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> zipfile.ZipFile:
    (path,) = dist.glob("lapilli-*-py3-none-any.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def sources(dist: Path) -> dict[str, int]:
    """Bytes of each file of the source distribution, by its path in it."""
    (path,) = dist.glob("lapilli-*.tar.gz")
    assert path.stat().st_size < LARGEST_SDIST
    with tarfile.open(path) as tar:
        return {one.name.partition("/")[2]: one.size for one in tar if one.isfile()}


def test_an_index_would_take_both(dist: Path) -> None:
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, dist.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


def test_the_sources_build_the_same_wheel(
    dist: Path, tmp_path: Path, wheel: zipfile.ZipFile
) -> None:
    (path,) = dist.glob("lapilli-*.tar.gz")
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path, filter="data")
    (root,) = tmp_path.iterdir()
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "made"]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    (again,) = (root / "made").glob("*.whl")
    files = {one.filename: one.CRC for one in zipfile.ZipFile(again).infolist()}
    assert files == {one.filename: one.CRC for one in wheel.infolist()}


def test_the_sources_hold_what_a_reader_needs_and_no_material_of_tests(
    sources: dict[str, int],
) -> None:
    needed = {"README.md", "LICENSE", "CHANGELOG.md", "SECURITY.md", "docs/start.md"}
    assert needed | {"constraints.txt", "pyproject.toml", "docs/assets/report.png"} <= {*sources}
    assert [name for name in sources if name.startswith(("tests/", ".ci/", "outputs/"))] == []
    assert {name: size for name, size in sources.items() if size > LARGEST} == {}


def test_namespace_has_no_init() -> None:
    """One such file hides the other two packages from Python."""
    stray = [str(path.relative_to(ROOT)) for path in ROOT.glob("packages/*/lapilli/__init__.py")]
    assert stray == []


def test_wheel_holds_the_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    sources = {
        str(path.relative_to(ROOT / "packages" / package))
        for package in PACKAGES
        for path in (ROOT / "packages" / package / "lapilli").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    verbs = {
        str(path.relative_to(ROOT)) for path in (ROOT / "pipelines").rglob("*") if path.is_file()
    }
    left_out = ("pipelines/benchmarks/", "__pycache__")
    assert held == sources | {name for name in verbs if not any(part in name for part in left_out)}


def test_wheel_carries_its_licence_and_dependencies(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
    text = wheel.read(metadata).decode()
    assert "Requires-Dist: torch<2.14,>=2.11; extra == 'train'" in text
    base = [
        line for line in text.splitlines() if line.startswith("Requires-Dist") and ";" not in line
    ]
    named = {re.split(r"[<>=\[ ]", line.removeprefix("Requires-Dist: "))[0] for line in base}
    assert named & {"torch", "deepspeed", "transformers", "peft", "ray"} == set()
    assert {"pyarrow", "pillow", "tokenizers"} <= named


def test_wheel_imports_without_the_checkout(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Unpacked, it comes before an editable install, so every path must lie in it."""
    wheel.extractall(tmp_path / "unpacked")
    output = subprocess.check_output(
        [sys.executable, "-c", PROBE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "unpacked")},
        text=True,
    )
    found: dict[str, str] = json.loads(output.splitlines()[-1])
    outside = {k: path for k, path in found.items() if not Path(path).is_relative_to(tmp_path)}
    assert outside == {}


def test_wheel_runs_verbs_and_finds_recipes_from_an_empty_folder(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    wheel.extractall(tmp_path / "unpacked")
    (tmp_path / "empty").mkdir()
    where: dict[str, Any] = {
        "cwd": tmp_path / "empty",
        "env": {**os.environ, "PYTHONPATH": str(tmp_path / "unpacked")},
        "text": True,
        "capture_output": True,
    }
    command = [sys.executable, "-m", "pipelines.cli.main"]
    listed = subprocess.run(command, check=True, **where).stdout
    assert "quickstart" in listed
    settings = ["check", "--config=llava15/finetune_data", f"--root={tmp_path / 'nowhere'}"]
    done = subprocess.run([*command, *settings], check=False, **where)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "nowhere" in line
