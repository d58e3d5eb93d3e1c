"""The Python blocks of pages run as they stand, those of a page one after the other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contracts.pages import PAGES, ROOT, blocks, name_of

READMES = [ROOT / "packages" / package / "README.md" for package in ("data", "model", "train")]
OTHERS = [page for page in PAGES if page not in READMES and any(blocks(page, "python"))]
# A page whose blocks need more than an empty folder names the test that runs them.
RUN_BY = re.compile(r"<!-- python run by (\S+) -->")


def run_blocks(page: Path, folder: Path) -> None:
    for block in blocks(page, "python"):
        done = subprocess.run(
            [sys.executable, "-c", block],
            cwd=folder,
            env=os.environ,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_examples_run(readme: Path, folder: Path) -> None:
    """training's begins with the dataset that data's has built"""
    assert any(blocks(readme, "python"))
    run_blocks(readme, folder)


def test_blocks_of_other_pages_run(tmp_path: Path) -> None:
    for page in OTHERS:
        if named := RUN_BY.search(page.read_text(encoding="utf-8")):
            test = (ROOT / named[1]).read_text(encoding="utf-8")
            assert page.name in test, f"{named[1]} does not run {name_of(page)}"
            continue
        (tmp_path / page.stem).mkdir()
        run_blocks(page, tmp_path / page.stem)


def test_a_block_that_fails_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nraise SystemExit(3)\n```\n")
    with pytest.raises(AssertionError):
        run_blocks(page, tmp_path)
