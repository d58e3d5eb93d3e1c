"""Ray Train's trainer without helper processes that a run does not need."""

from __future__ import annotations

from typing import Any

from ray._private.worker import get_dashboard_url
from ray.train.torch import TorchTrainer

__all__ = ["Trainer"]


class Trainer(TorchTrainer):
    """Leaves out two helpers; `tests/train/test_ray_trainer.py` tells when Ray renames them."""

    def _create_default_callbacks(self) -> list[Any]:
        idle = {"DatasetsCallback"}  # the feed is ours
        if not get_dashboard_url():
            # It asks the dashboard, tries for 40 s where there is none, and an ending run waits.
            idle.add("PlacementGroupCleanerCallback")
        made = super()._create_default_callbacks()
        return [callback for callback in made if type(callback).__name__ not in idle]
