"""What this package uses of Ray Train without a public way.

`tests/contracts/test_private_internals.py` looks whether the installed Ray has each of it.
"""

from __future__ import annotations

from typing import Any

from ray._private.worker import get_dashboard_url
from ray.train.torch import TorchTrainer

__all__ = ["IDLE", "Trainer", "raised_by_worker"]

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
