"""`show RUN RUN`: what differs, and losses where the shorter run ends."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from pipelines.reports.compare import Compared, compare_rows, differing, read_compared
from pipelines.show import main
from tests.browser import Chromium
from tests.train.small_run import small_run


def made_run(folder: Path, losses: list[float], tokens: int, seed: int) -> Path:
    folder.mkdir(parents=True)
    config = small_run(Path("somewhere"), folder, seed=seed)
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    row = {"samples": 8, "seconds": 0.5, "wait_seconds": 0.1, "trained_tokens": tokens}
    rows = [{"step": step, "loss": loss, **row} for step, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [
        made_run(tmp_path / "long", [4.0] * 5 + [1.0] * 5, tokens=10, seed=1),
        made_run(tmp_path / "short", [3.0] * 4, tokens=20, seed=2),
    ]


def test_only_what_differs_is_named_and_no_folder(runs: list[Path]) -> None:
    assert differing(read_compared(runs)) == {"seed": ["1", "2"]}


def test_losses_are_those_where_the_shorter_run_ends(runs: list[Path]) -> None:
    found = compare_rows(read_compared(runs))
    assert found["loss at step 4"] == ["4.0000", "3.0000"]  # constant so far: smoothing keeps it
    after = found["loss after 80 trained tokens"]  # the long run's step 7, the short one's last
    assert 1.0 < float(after[0]) < 4.0
    assert after[1] == "3.0000"


def test_a_run_without_a_step_is_not_compared(runs: list[Path]) -> None:
    (runs[1] / "metrics.jsonl").unlink()
    assert compare_rows(read_compared(runs)) == {}
    assert compare_rows([Compared(runs[0], {}, [])]) == {}


def test_the_page_of_two_runs_is_fit_to_be_read(
    runs: list[Path], tmp_path: Path, chromium: Chromium, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert main([*map(str, runs), f"--html={page}"]) == 0
    assert "loss at step 4" in capsys.readouterr().out
    assert chromium.problems(page) == []
    assert "Settings that differ" in page.read_text(encoding="utf-8")
