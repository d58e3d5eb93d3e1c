"""The live line at 80 columns and in a log; tables on narrow terminals; sizes."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console
from rich.table import Table

from lapilli.data.io.printable import bytes_text
from lapilli.train.run_folder.metrics_file import StepMetrics
from pipelines.cli import command, terminal
from pipelines.train import live_fields, log_line

ROWS = [
    StepMetrics(
        step=step,
        loss=1.23456,
        samples=128,
        trained_tokens=9000,
        seconds=2.0,
        wait_seconds=0.1,
        tokens=80_000,
        mfu=0.41,
        memory_bytes=71.5e9,
    )
    for step in range(12_340, 12_345)
]


def drawn(width: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """The last state of a training's live line in a terminal of so many columns."""
    screen = io.StringIO()
    console = Console(file=screen, width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(command, "console", console)
    with command.progress_bar(fields=True) as bar:
        task = bar.add_task("steps", total=20_784, fields=[])
        bar.update(task, completed=12_345, fields=live_fields(ROWS))
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue().split("\r")[-1]).split("\n")[0]


@pytest.mark.parametrize("width", [50, 60, 80, 100, 120, 200])
def test_step_total_and_eta_stay_and_the_least_important_fields_go(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = drawn(width, monkeypatch)
    assert len(line) <= width
    assert "12345/20784" in line
    assert re.search(r"ETA (--:--|\d+:\d\d)", line)
    fields = live_fields(ROWS)
    assert fields[:2] == ["loss 1.2346", "64 samples/s"]
    shown = [field in line for field in fields]
    assert shown == sorted(shown, reverse=True), line  # those shown come first
    assert "…" not in line
    assert shown[0] is (width >= 60)
    assert all(shown) is (width >= 120)


def test_a_log_has_step_total_and_eta_first() -> None:
    line = log_line(12_345, 20_784, ROWS, live_fields(ROWS))
    assert line.startswith("  step 12,345 of 20,784, ETA 4.7 h, loss 1.2346, 64 samples/s")
    assert line.endswith("71.5 GB")


def test_the_memory_of_a_small_run_is_in_megabytes() -> None:
    assert bytes_text(640e6) == "640.0 MB"
    assert bytes_text(71.5e9) == "71.5 GB"


@pytest.mark.parametrize("width", [20, 40, 80])
def test_no_number_of_a_table_is_cut(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=screen, width=width))
    table = Table()
    table.add_column("part")
    for name in ("parameters", "trained", "weights", "gradients"):
        table.add_column(name, justify="right")
    numbers = ["7,062,902,784", "6,738,415,616", "14.1 GB", "28.3 GB"]
    table.add_row("a language model of a long name", *numbers)
    terminal.print_table(table)
    assert all(number in screen.getvalue() for number in numbers)
    assert "…" not in screen.getvalue()
