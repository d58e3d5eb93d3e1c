"""Clean up a run's folder before it goes on, and say what was not whole."""

from __future__ import annotations

import shutil
from pathlib import Path

from lapilli.data.io.access import subpaths
from lapilli.train.checkpoint.find import damage
from lapilli.train.checkpoint.layout import steps_in
from lapilli.train.run_folder.names import CUT, FOLDER, MILESTONES, step_name

__all__ = ["tidy"]


def tidy(run: Path, step: int) -> list[str]:
    """Remove incomplete folders, and list checkpoints that the run cannot resume from.

    Args:
        run: The run's folder, to which nobody else writes.
        step: The newest whole checkpoint's, or 0.

    Returns:
        One line for each checkpoint that is not what it should be.
    """
    said: list[str] = []
    goes_on = f"the run resumes from step {step}" if step else "the run starts at step 0"
    for folder in (FOLDER, MILESTONES):
        for path in subpaths(run / folder, ".step-"):
            removed = _clear(path)
            if path.name.endswith(CUT):
                name = path.name.removeprefix(".").removesuffix(CUT)
                said.append(f"{folder}/{name}: cut short while it was saved; {removed}, {goes_on}")
    for path in steps_in(run / FOLDER):
        if path.name > step_name(step):
            why = damage(path) or "is later than what the run goes on from"
            said.append(
                f"{FOLDER}/{path.name}: {why}; passed over, {goes_on} and removes it at the next "
                "save"
            )
    milestones = steps_in(run / MILESTONES)
    if milestones and not step:
        said.append(
            f"no checkpoint to go on from, {goes_on}: a milestone has weights and no optimizer "
            f"moments; init_from: {milestones[-1]} starts another run with the newest one's"
        )
    return said


def _clear(path: Path) -> str:
    """Remove an incomplete folder; returns what was done."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        return f"cannot be removed ({error.strerror})"
    return "removed"
