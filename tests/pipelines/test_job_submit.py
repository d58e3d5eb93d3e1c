"""`ray job submit` runs the code it uploads, in the driver and in Ray's tasks.

The checkout is installed on this "cluster" of one node, which is where a careless setting goes
wrong: the job runs, with the node's code instead of the uploaded one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lapilli.data.text.encode import train_tokenizer
from tests.pipelines.heads import ROOT, Head, ray_head

# Put at the end of the uploaded lapilli.data: every process that imports it leaves a note.
PLANTED = """
import sys as _sys
from pathlib import Path as _Path

_role = "task" if "default_worker.py" in _sys.argv[0] else "driver"
_Path({notes!r}, _role).write_text(__file__, encoding="utf-8")
"""
RECIPE = """
sources:
  - {name: made_up, annotations: made_up.json, images: images}
template: plain
views:
  square32: {size: 32, fill: [122, 116, 104]}
"""


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    with ray_head(tmp_path / "ray", "--num-cpus=2", dashboard=True) as head:
        yield head


@pytest.fixture
def uploaded(tmp_path: Path) -> Path:
    """A copy of the project that says where it is imported, with a recipe of its own."""
    project, notes = tmp_path / "project", tmp_path / "notes"
    notes.mkdir()
    for folder in ("packages", "pipelines"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, project / folder, ignore=ignored)
    with (project / "packages/data/lapilli/data/__init__.py").open("a", encoding="utf-8") as file:
        file.write(PLANTED.format(notes=str(notes)))
    (project / "made_up.yaml").write_text(RECIPE, encoding="utf-8")
    return project


@pytest.fixture
def material(tmp_path: Path) -> Path:
    """Three images with captions, in LLaVA's layout, and a tokenizer."""
    root = tmp_path / "material"
    (root / "images").mkdir(parents=True)
    records: list[dict[str, Any]] = []
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40, 30), colour).save(root / "images" / f"{colour}.png")
        turns = [("human", "<image>"), ("gpt", f"All of it is {colour}.")]
        records.append(
            {
                "id": str(number),
                "image": f"{colour}.png",
                "conversations": [{"from": who, "value": what} for who, what in turns],
            }
        )
    (root / "made_up.json").write_text(json.dumps(records), encoding="utf-8")
    train_tokenizer(["All of it is red."], root / "tokenizer", vocab_size=300)
    return root


@pytest.mark.faults
def test_a_submitted_job_runs_the_uploaded_code(
    head: Head, uploaded: Path, material: Path, tmp_path: Path
) -> None:
    output = tmp_path / "dataset"
    submit = [
        "job", "submit", "--address", head.dashboard, "--working-dir", ".",
        "--runtime-env", "pipelines/cluster/runtime_env.yaml", "--",
    ]  # fmt: skip
    job = [
        "python", "-m", "pipelines.preprocess", "--config", "made_up.yaml", "--root", str(material),
        "--output", str(output), "--tokenizer", str(material / "tokenizer"),
    ]  # fmt: skip
    done = head.ray(*submit, *job, cwd=uploaded)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((output / "manifest.json").read_text())["counts"]["kept"] == 3
    notes = {note.name: note.read_text() for note in (tmp_path / "notes").iterdir()}
    assert notes.keys() == {"driver", "task"}
    for path in notes.values():
        assert "py_modules" in path
        assert not path.startswith((str(ROOT), str(uploaded)))
