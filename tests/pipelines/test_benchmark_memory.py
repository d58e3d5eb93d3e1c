"""The table of what `memory: auto` chooses, for a recipe with tiny shapes on made-up cards."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from pipelines.benchmarks import harness
from pipelines.benchmarks.__main__ import main
from pipelines.benchmarks.step import memory
from pipelines.benchmarks.step.memory import Shapes
from pipelines.benchmarks.step.shapes import SIZES


def test_less_memory_recomputes_more_until_a_card_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vision, language = SIZES["small"]
    recipe = "llava15/finetune"
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(memory, "add_row", lambda topic, row: harness.add_row(topic, row, tmp_path))
    monkeypatch.setattr(memory, "CASES", {recipe: [Shapes("small", vision, "llama", language)]})
    monkeypatch.setattr(memory, "CARDS", {"large": 64.0, "middle": 5.0, "small": 0.5})
    assert main(["memory", f"--recipes=[{recipe}]"]) == 0
    with (tmp_path / "memory.csv").open(encoding="utf-8") as file:
        rows = {row["card"]: row for row in csv.DictReader(file)}
    assert rows["large"]["recomputed"] == "0 of 4 language"
    assert int(rows["middle"]["recomputed"].split()[0]) in range(1, 5)
    assert float(rows["middle"]["estimated_gib"]) <= 5 * 0.9
    assert rows["small"]["recomputed"] == ""
    assert "needs at least" in rows["small"]["said"]
