"""Compare runs: differing settings, loss by steps and by tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from lapilli.data.io.printable import relative_names
from lapilli.train.run_folder.metrics_file import StepMetrics, read_metrics
from lapilli.train.run_folder.settings import plain_settings, read_run_config
from pipelines.reports.page import Page
from pipelines.reports.run_report import curves, flat_settings, smoothed

__all__ = ["Compared", "add_curves", "compare_rows", "differing", "read_compared"]

OWN = {"output"}  # every run has its own


@dataclass(frozen=True)
class Compared:
    """A run as it is compared: its folder, its settings by full name, its metrics."""

    path: Path
    settings: dict[str, object]
    rows: list[StepMetrics]


def read_compared(paths: Sequence[Path]) -> list[Compared]:
    """Read runs."""
    return [
        Compared(p, flat_settings(plain_settings(read_run_config(p))), read_metrics(p))
        for p in paths
    ]


def differing(runs: Sequence[Compared]) -> dict[str, list[str]]:
    """Settings that are not the same in all runs: a value for each."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in OWN)
    values = {name: [str(run.settings.get(name, "—")) for run in runs] for name in names}
    return {name: of_runs for name, of_runs in values.items() if len(set(of_runs)) > 1}


def compare_rows(runs: Sequence[Compared]) -> dict[str, list[str]]:
    """Smoothed loss where the shortest run ends, counted in steps and in trained tokens.

    Returns:
        A text for each run by what it says; nothing where a run has no step.
    """
    if not all(run.rows for run in runs):
        return {}
    step = min(run.rows[-1].step for run in runs)
    tokens = min(sum(row.trained_tokens for row in run.rows) for run in runs)
    return {
        f"loss at step {step + 1:,}": [f"{_loss_at_step(run.rows, step):.4f}" for run in runs],
        f"loss after {tokens:,} trained tokens": [
            f"{_loss_at_step(run.rows, _step_of(run.rows, tokens)):.4f}" for run in runs
        ],
    }


def _loss_at_step(rows: Sequence[StepMetrics], step: int) -> float:
    """The smoothed loss at a step."""
    steps, losses = curves(rows, "loss")
    return float(smoothed(losses)[int(np.searchsorted(steps, step, side="right")) - 1])


def _step_of(rows: Sequence[StepMetrics], tokens: int) -> int:
    """The step at which so many tokens have been trained on."""
    sums = accumulate(row.trained_tokens for row in rows)
    return next(r.step for r, total in zip(rows, sums, strict=True) if total >= tokens)


def add_curves(page: Page, runs: Sequence[Compared]) -> None:
    """One chart a figure with all runs in it."""
    names = _names(runs)
    page.section("Runs compared")
    page.table(
        ["setting", *names],
        [[name, *map(relative_names, values)] for name, values in differing(runs).items()],
        "Settings that differ",
    )
    named = dict(zip(names, runs, strict=True))
    losses = {name: curves(run.rows, "loss") for name, run in named.items() if run.rows}
    shown = {name: (steps, smoothed(values)) for name, (steps, values) in losses.items()}
    page.line_chart(shown, "step", "smoothed loss", "Loss")
    for name, unit, title in (
        ("held_out_loss", "loss", "Held-out loss"),
        ("tokens_per_second", "tokens/s", "Speed"),
        ("mfu", "share", "Model FLOPs utilisation"),
        ("grad_norm", "norm", "Gradient norm"),
    ):
        series = {of: curves(run.rows, name) for of, run in named.items()}
        if any(len(steps) for steps, _ in series.values()):
            page.line_chart(series, "step", unit, title)


def _names(runs: Sequence[Compared]) -> list[str]:
    """The runs by their folders' last names, which leave the machine; equal ones are numbered."""
    names = [relative_names(str(run.path)) for run in runs]
    return [
        name if names.count(name) == 1 else f"{name} ({names[:number].count(name) + 1})"
        for number, name in enumerate(names)
    ]
