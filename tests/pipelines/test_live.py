"""The live line counts images as their shards are finished, and the unusable ones among them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lapilli.data.building.driver import build
from lapilli.data.building.runners import run_here
from lapilli.data.planning.plan import plan_build
from pipelines.cli import progress as live
from pipelines.cli.progress import build_line, describe_rate
from tests.factories import build_config, make_mixture, make_tokenizer


def test_rates() -> None:
    assert describe_rate(1000, 2.0, 2, 0) == ["500 images/s", "250 a core"]
    assert describe_rate(3000, 2.0, 1, 7) == ["1,500 images/s", "7 quarantined", "1,500 a core"]


def test_the_line_counts_what_the_build_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    def noted(images: int, seconds: float, cores: int, unusable: int) -> list[str]:
        del seconds, cores
        seen.append((images, unusable))
        return []

    monkeypatch.setattr(live, "describe_rate", noted)
    mixture = make_mixture(tmp_path / "data", defects=True)
    plan = plan_build(build_config(mixture, tmp_path / "out", make_tokenizer(tmp_path / "t")))
    with build_line(run_here) as runner:
        report = build(plan, runner=runner)
    images, unusable = seen[-1]
    assert images == len(plan.image_ids) * len(plan.config.views)
    assert unusable >= report.manifest.counts["reasons"]["image_undecodable"]
