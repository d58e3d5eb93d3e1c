"""The Python examples of the packages' READMEs run as they stand, one after the other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
READMES = [ROOT / "packages" / package / "README.md" for package in ("data", "model", "train")]
MOST_WORDS = 1200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_examples_run(readme: Path, folder: Path) -> None:
    """training's begins with the dataset that data's has built"""
    examples = re.findall(r"^```python\n(.*?)^```", readme.read_text(), re.DOTALL | re.MULTILINE)
    assert examples
    for example in examples:
        done = subprocess.run(
            [sys.executable, "-c", example],
            cwd=folder,
            env=os.environ,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "readme",
    [*READMES, *ROOT.glob("packages/*/lapilli/**/README.md")],
    ids=lambda path: str(path.parent.relative_to(ROOT)),
)
def test_a_readme_is_read_in_minutes(readme: Path) -> None:
    assert len(readme.read_text(encoding="utf-8").split()) <= MOST_WORDS
