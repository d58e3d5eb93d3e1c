"""What this package uses of Ray Train without a public way.

`tests/contracts/test_private_internals.py` looks whether the installed Ray has each of it.
"""

from __future__ import annotations

import importlib
from typing import Any

from ray._private.worker import get_dashboard_url
from ray.train.torch import TorchTrainer

__all__ = ["IDLE", "Trainer", "preemption_notice", "raised_by_worker"]

# Helpers that a run does not need: the feed is ours; and without a dashboard one asks for it all
# the same, tries for 40 s, and an ending run waits.
IDLE = {False: {"DatasetsCallback", "PlacementGroupCleanerCallback"}, True: {"DatasetsCallback"}}


class Trainer(TorchTrainer):
    """Ray Train's trainer without the helpers in `IDLE`.

    Used: `_create_default_callbacks`, the class names of what it makes, and
    `ray._private.worker.get_dashboard_url` for whether there is a dashboard. `RunConfig.callbacks`
    adds callbacks and removes none; `ray.init` tells the address, but not where Ray ran already. If
    a name went, a run has these helpers, and ends up to 40 s later.
    """

    def _create_default_callbacks(self) -> list[Any]:
        idle = IDLE[bool(get_dashboard_url())]
        made = super()._create_default_callbacks()
        return [callback for callback in made if type(callback).__name__ not in idle]


def raised_by_worker(failure: Exception) -> bool:
    """Whether one of `TrainingFailedError.worker_failures` was raised by a worker's code.

    Used: the class name `UserExceptionWithTraceback` of `ray.train.v2._internal.exceptions`, which
    stands for the worker's own exception; a worker that was lost has another. `worker_failures`
    does not tell them apart otherwise. If it were renamed, an error of the program would be told as
    workers that were lost.
    """
    return type(failure).__name__.startswith("UserException")


def preemption_notice() -> object:
    """What Ray Train has told this worker of nodes that are to be taken away; None for nothing.

    Used: `preemption_context.preemption_info` of `get_train_context()` in
    `ray.train.v2._internal.execution.context`, which Ray's watcher of drained nodes sets in every
    worker. The public `ray.train.get_preemption_info` reads the same, and makes all workers wait
    for each other through an actor at every call. If a name went, a run would go on from its last
    checkpoint when a node is gone.
    """
    try:
        internal: Any = importlib.import_module("ray.train.v2._internal.execution.context")
        return internal.get_train_context().preemption_context.preemption_info
    except (AttributeError, ImportError, RuntimeError):
        return None
