"""Ray's helpers that a run leaves out are those that Ray has."""

from __future__ import annotations

from typing import Any

import pytest
from ray.train.torch import TorchTrainer

from lapilli.train.driver import ray_trainer


def helpers(trainer: Any) -> set[str]:
    return {type(callback).__name__ for callback in trainer._create_default_callbacks()}


@pytest.mark.parametrize("dashboard", ["", "127.0.0.1:8265"])
def test_rays_helpers_are_left_out_by_their_names(
    dashboard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_trainer, "get_dashboard_url", lambda: dashboard)
    gone = {"DatasetsCallback"} | (set() if dashboard else {"PlacementGroupCleanerCallback"})
    assert helpers(TorchTrainer(print)) - helpers(ray_trainer.Trainer(print)) == gone
