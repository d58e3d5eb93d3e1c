"""A page of probes: smooth L1 and cosine by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lapilli.train.inference.probing import ProbePlan, ProbeScores
from pipelines.reports.page import Figure, Page

__all__ = ["write_probe_report"]


def write_probe_report(
    path: Path, name: str, plan: ProbePlan, scores: ProbeScores, teacher: Mapping[str, Any]
) -> None:
    """Write the self-contained page.

    Args:
        path: The file.
        name: Of the model.
        plan: How the probes were trained.
        scores: What they reach.
        teacher: Facts of the target.

    Raises:
        DataError: It cannot be written.
    """
    best = min(scores.layers, key=lambda layer: layer.smooth_l1)
    numbers = [layer.layer for layer in scores.layers]
    mean = [scores.mean_smooth_l1] * len(numbers)
    page = Page(f"Probes of {name}", f"target {plan.target}, {scores.held_out:,} held-out images")
    page.figures([
        Figure("best layer", str(best.layer), f"smooth L1 {best.smooth_l1:.4f}"),
        Figure("mean target", f"{scores.mean_smooth_l1:.4f}", "smooth L1 without the image"),
        Figure("trained on", f"{scores.trained_on:,}", "images"),
    ])  # fmt: skip
    page.section("By layer")
    page.line_chart(
        {
            "held out": (numbers, [layer.smooth_l1 for layer in scores.layers]),
            "trained on": (numbers, [layer.trained_smooth_l1 for layer in scores.layers]),
            "mean target": (numbers, mean),
        },
        x_label="layer", y_label="smooth L1", title="Smooth L1 by layer, lower is better",
    )  # fmt: skip
    page.line_chart(
        {"held out": (numbers, [layer.cosine for layer in scores.layers])},
        x_label="layer", y_label="cosine", title="Cosine similarity by layer",
    )  # fmt: skip
    rows = [[*asdict(layer).values()] for layer in scores.layers]
    page.table(["layer", "smooth L1", "cosine", "smooth L1, trained on"], rows)
    page.section("Settings").key_values({**asdict(plan), **teacher})
    page.write(path)
