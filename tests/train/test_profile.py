"""Chosen steps are profiled on chosen ranks, and the report links what was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lapilli.train.config import ProfileConfig
from lapilli.train.driver.launching import launch
from lapilli.train.driver.preflight import preflight
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.messages import notes_from
from pipelines.reports.run_report import write_run_report
from tests.train.small_run import small_dataset, small_run


def test_traces_are_of_the_chosen_steps_and_linked(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path)
    config = small_run(
        dataset, tmp_path / "run", num_workers=1, launcher="process", max_steps=4,
        profile=ProfileConfig(steps=(1, 3, 9), memory=True),
    )  # fmt: skip
    rows = launch(preflight(config))
    assert len(rows) == 4
    names = ["step-00000001-rank-0.json", "step-00000003-rank-0.json"]
    assert sorted(path.name for path in (tmp_path / "run" / "profile").iterdir()) == names
    for name in names:
        trace = json.loads((tmp_path / "run" / "profile" / name).read_text())
        operations = {event.get("name") for event in trace["traceEvents"]}
        assert {"aten::mm", "aten::embedding"} <= operations  # forward and backward are in it
        assert any("AdamW" in str(one) for one in operations)
    said = [line for line in notes_from(tmp_path / "run", 0)[0] if "profile.memory" in line]
    assert len(said) == 2
    assert "on CUDA alone, not on cpu" in said[0]
    page = write_run_report(tmp_path / "run").read_text(encoding="utf-8")
    assert all(f'href="profile/{name}"' in page for name in names)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": (3, -1)}, r"profile.steps: -1; expected 0 or more"),
        ({"steps": (1,), "ranks": (0, 2)}, "profile.ranks: 2 with num_workers 2; expected 0 to 1"),
        ({"memory": True}, "profile.memory: true without profile.steps"),
    ],
)
def test_what_cannot_be_profiled_is_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        small_run(Path("unused"), Path("unused"), profile=ProfileConfig(**values))
