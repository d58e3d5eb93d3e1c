"""The topics of teachers: both sides store the same images, and what is calculated is told."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from lapilli.data.config import BuildConfig, TargetConfig
from pipelines.benchmarks.__main__ import main
from pipelines.benchmarks.material.photos import write_photos
from pipelines.benchmarks.sides.teacher_sides import SIZE
from pipelines.benchmarks.step.teachers import storages, teacher_flops
from pipelines.cli.command import parse
from pipelines.cli.recipes import RECIPES

RECIPE = RECIPES / "visper_lm"


@pytest.mark.long
def test_both_sides_store_the_features_of_the_same_images(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    write_photos(tmp_path / "photos", 12, (SIZE, SIZE))
    stored: dict[str, set[bytes]] = {}
    for side in ("bare", "ray"):
        (tmp_path / side).mkdir()
        job = {"photos": str(tmp_path / "photos"), "output": str(tmp_path / side), "count": 12,
               "milliseconds": 1.0, "rows": 4, "width": 6}  # fmt: skip
        command = [sys.executable, "-m", "pipelines.benchmarks.sides.teacher_sides", side]
        done = subprocess.run([*command, json.dumps(job)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["seconds"] > 0.006
        stored[side] = features_in(tmp_path / side)
    assert len(stored["bare"]) == 12
    assert stored["ray"] == stored["bare"]


def features_in(folder: Path) -> set[bytes]:
    """Features and scales of each image."""
    found: set[bytes] = set()
    for path in folder.rglob("*.raw"):
        data = path.read_bytes()
        found |= {data[start : start + 40] for start in range(0, len(data), 40)}
    for path in folder.rglob("*.arrow"):
        table = pa.ipc.open_file(path).read_all()
        pairs = zip(table["features"].to_pylist(), table["scales"].to_pylist(), strict=True)
        found |= {features + scales for features, scales in pairs}
    return found


def test_operations_are_those_of_the_published_models() -> None:
    """By hand: products of 577 tokens with 24 layers of DINOv2-L, and attention."""
    depth = TargetConfig("depth_anything_v2", rows=576, width=1024)
    tokens, size = 577, 1024
    products = 24 * 2 * tokens * 12 * size**2
    attention = 24 * 2 * 2 * tokens**2 * size
    patches = 2 * 576 * 3 * 14**2 * size
    assert teacher_flops(depth) == products + attention + patches


def test_bytes_are_those_that_a_dataset_stores() -> None:
    """In bf16 1.18 MB, 1.77 MB and 2 KB."""
    words = [f"--config={RECIPE / 'pretrain_data.yaml'}", "--root=in", "--output=out"]
    found = storages(parse(BuildConfig, words, "").targets)
    assert found["bf16"] == 2 * (576 * 1024 + 576 * 1536 + 1024)
    assert found["int8, 12 x 12"] == 144 * (1024 + 4) + 144 * (1536 + 4) + 2 * 1024


def test_the_readme_has_what_is_calculated(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets"]) == 0
    said = capsys.readouterr().out
    text = (RECIPE / "README.md").read_text(encoding="utf-8")
    hours = re.findall(r"^ (?:depth|seg|gen) .* ([\d.]+) *$", said, re.MULTILINE)
    assert hours == re.findall(r"^\| (?:depth|seg|gen): .* ([\d.]+) \|$", text, re.MULTILINE)
    rates = re.findall(r"^ (?:bf16|int8).* (\d+) *$", said, re.MULTILINE)
    assert rates == re.findall(r"([\d,]+) MB/s \|$", text, re.MULTILINE)
    assert len(hours) + len(rates) == 7
