"""Change a run's length on resume: more epochs with the same optimizer state."""

from __future__ import annotations

from collections.abc import Callable

from lapilli.train.config import RunConfig
from lapilli.train.errors import TrainError

__all__ = ["LENGTH", "changed_length", "check_length"]

LENGTH = ("epochs", "max_steps")  # settings that may change down to what the run has not passed


def changed_length(before: RunConfig, config: RunConfig) -> list[str]:
    """The settings of a run's length that are others than before."""
    return [key for key in LENGTH if getattr(before, key) != getattr(config, key)]


def check_length(
    before: RunConfig,
    config: RunConfig,
    done: int,
    total: int,
    on_note: Callable[[str], None],
) -> None:
    """Check a changed length, which may not be below the steps done; note what it does to the rate.

    Args:
        before: The settings under which the newest checkpoint was made.
        config: The settings now.
        done: Steps taken.
        total: Steps that the settings now make.
        on_note: Called with a line where they are another number.

    Raises:
        TrainError: Fewer than are taken.
    """
    changed = changed_length(before, config)
    if done > total:
        key = changed[0] if changed else "epochs"
        raise TrainError(
            f"{key}: {getattr(config, key)} makes {total} steps, {config.output} has taken {done}; "
            "raise it, or choose another --output"
        )
    for key in changed:
        old, new = getattr(before, key), getattr(config, key)
        follow = f"steps {done} to {total - 1} follow" if done < total else "none is left to follow"
        on_note(
            f"{key}: {old} before, now {new}: the {done} steps that are "
            f"taken keep their learning rates, and the optimizer its moments; {follow} the "
            f"{config.optim.schedule} schedule of a run of {total} steps"
        )
