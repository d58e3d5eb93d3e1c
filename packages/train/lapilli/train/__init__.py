"""lapilli.train: vision-language models on Ray Train and DeepSpeed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lapilli.train.config import OptimConfig, RunConfig
    from lapilli.train.driver.launching import launch
    from lapilli.train.driver.preflight import Preflight, preflight
    from lapilli.train.errors import TrainError
    from lapilli.train.inference.evaluate import (
        Trained,
        answer_dataset,
        load_trained,
        open_test,
        score,
    )
    from lapilli.train.steps.step import train_step
    from lapilli.train.worker.loop import fit
    from lapilli.train.worker.setup import setup

__all__ = [
    "OptimConfig",
    "Preflight",
    "RunConfig",
    "TrainError",
    "Trained",
    "answer_dataset",
    "fit",
    "launch",
    "load_trained",
    "open_test",
    "preflight",
    "score",
    "setup",
    "train_step",
]

_MODULES = {
    "OptimConfig": "config",
    "Preflight": "driver.preflight",
    "RunConfig": "config",
    "TrainError": "errors",
    "Trained": "inference.evaluate",
    "answer_dataset": "inference.evaluate",
    "fit": "worker.loop",
    "launch": "driver.launching",
    "load_trained": "inference.evaluate",
    "open_test": "inference.evaluate",
    "preflight": "driver.preflight",
    "score": "inference.evaluate",
    "setup": "worker.setup",
    "train_step": "steps.step",
}


def __getattr__(name: str) -> Any:
    """A public name, whose module is imported when the name is first used: torch takes a second."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
