"""Find the whole checkpoints of a run, without loading a weight."""

from __future__ import annotations

import platform
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from lapilli.data.io.access import cannot_read, is_denied, is_file, is_folder
from lapilli.data.io.atomic import sha256_file
from lapilli.data.io.typed_json import JsonError
from lapilli.train.checkpoint.layout import steps_in
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.checkpoint_state import CheckpointState, read_state
from lapilli.train.run_folder.names import FILES, FOLDER, STATE, WEIGHTS, step_name

__all__ = [
    "Checkpoint",
    "at_step",
    "find_checkpoints",
    "is_run",
    "latest_checkpoint",
    "newest_weights",
]


@dataclass(frozen=True)
class Checkpoint:
    """A whole, verified checkpoint.

    Attributes:
        path: Its folder.
        step: Optimizer steps taken.
        state: Everything else.
    """

    path: Path
    step: int
    state: CheckpointState


def is_run(run: Path) -> bool:
    """Whether a folder is a run with checkpoints, or a checkpoint."""
    return is_folder(run / FOLDER) or is_file(run / STATE)


def find_checkpoints(run: Path, *, hashed: bool = True) -> list[Checkpoint]:
    """The whole checkpoints of a run, oldest first; one cut short or changed is left out.

    Without `hashed` only sizes are compared: a look from outside need not read every weight.

    Raises:
        TrainError: One cannot be read: it may be whole.
    """
    found = [_read(path, hashed=hashed) for path in steps_in(run / FOLDER)]
    return [checkpoint for checkpoint in found if checkpoint is not None]


def latest_checkpoint(run: Path) -> Checkpoint | None:
    """The newest whole checkpoint, or None.

    Raises:
        TrainError: One that is newer than it cannot be read: it may be whole.
    """
    listed = steps_in(run / FOLDER)
    while True:
        for path in reversed(listed):
            if checkpoint := _read(path):
                return checkpoint
        # A run that goes on may have replaced all that was listed.
        listed, before = steps_in(run / FOLDER), listed
        if listed == before:
            return None


def newest_weights(path: Path) -> Checkpoint | None:
    """The newest checkpoint of a run to load weights from, or None.

    `path` may also be the folder of one checkpoint or milestone.
    """
    if is_file(path / STATE):
        return _read(path, needed=(WEIGHTS,))
    return latest_checkpoint(path)


def at_step(run: Path, step: int) -> Checkpoint:
    """The checkpoint of a step that rank 0 has verified.

    Raises:
        TrainError: It is not here: the run's folder is not shared by all nodes.
    """
    path = run / FOLDER / step_name(step)
    try:
        state = read_state(path)
    except (OSError, JsonError) as error:
        if is_denied(error):
            raise TrainError(f"{platform.node()}: {cannot_read(path / STATE, error)}") from None
        raise TrainError(
            f"output: {path} is not visible on {platform.node()}; expected a folder on a file "
            "system that all nodes share"
        ) from None
    return Checkpoint(path, step, state)


def _read(path: Path, *, hashed: bool = True, needed: Collection[str] = FILES) -> Checkpoint | None:
    try:
        state = read_state(path)
        if not {*needed} <= {*state.files}:
            return None
        for name, file in state.files.items():
            if (path / name).stat().st_size != file.bytes:
                return None
            if hashed and sha256_file(path / name) != file.sha256:
                return None
        return Checkpoint(path, state.step, state)
    except (OSError, JsonError) as error:
        if is_denied(error):  # it may be whole: nothing is removed and nothing begun anew
            raise TrainError(cannot_read(error.filename or path, error)) from None
        return None
