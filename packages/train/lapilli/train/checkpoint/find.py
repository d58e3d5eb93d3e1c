"""Find the whole checkpoints of a run, without loading a weight."""

from __future__ import annotations

import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lapilli.data.io.access import cannot_read, is_denied, is_file, is_folder
from lapilli.data.io.atomic import sha256_file
from lapilli.data.io.typed_json import JsonError
from lapilli.train.checkpoint.layout import steps_in
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.checkpoint_state import LAYOUT, CheckpointState, read_state
from lapilli.train.run_folder.names import FOLDER, STATE, WEIGHTS, step_name

__all__ = [
    "Checkpoint",
    "at_step",
    "damage",
    "find_checkpoints",
    "is_run",
    "latest_checkpoint",
    "newest_weights",
    "require_layout",
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
        return _read(path, resumable=False)
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


def require_layout(checkpoint: Checkpoint) -> None:
    """Refuse to go on from a checkpoint of another layout than this version writes.

    Raises:
        TrainError: Names both layouts.
    """
    if (found := checkpoint.state.layout) != LAYOUT:
        run = checkpoint.path.parent.parent
        raise TrainError(
            f"{checkpoint.path}: has layout {found}, this version resumes from layout {LAYOUT}; "
            f"--init_from={run} starts another run with its weights, or resume with the version "
            "that wrote it"
        )


def damage(path: Path, *, hashed: bool = True, resumable: bool = True) -> str:
    """What a checkpoint is not whole for; empty where it is.

    Args:
        path: Its folder.
        hashed: Compare checksums and not sizes alone.
        resumable: Whether weights alone are not enough.

    Raises:
        TrainError: It cannot be read: it may be whole.
    """
    found = _look(path, hashed=hashed, resumable=resumable)
    return found if isinstance(found, str) else ""


def _read(path: Path, *, hashed: bool = True, resumable: bool = True) -> Checkpoint | None:
    found = _look(path, hashed=hashed, resumable=resumable)
    return found if isinstance(found, Checkpoint) else None


def _look(path: Path, *, hashed: bool, resumable: bool) -> Checkpoint | str:
    """A checkpoint, or what is wrong with it."""
    try:
        state = read_state(path)
        if not state.files or (resumable and {*state.files} == {WEIGHTS}):
            return "has no optimizer moments"
        for name, file in state.files.items():
            if (size := (path / name).stat().st_size) != file.bytes:
                return f"{name} has {size} bytes of {file.bytes}"
        if hashed:
            with ThreadPoolExecutor() as pool:
                found = pool.map(sha256_file, [path / name for name in state.files])
            for (name, file), sha256 in zip(state.files.items(), found, strict=True):
                if sha256 != file.sha256:
                    return f"{name} has changed since it was written (SHA-256 {sha256[:12]})"
        return Checkpoint(path, state.step, state)
    except (OSError, JsonError) as error:
        if is_denied(error):  # it may be whole: nothing is removed and nothing begun anew
            raise TrainError(cannot_read(error.filename or path, error)) from None
        if isinstance(error, FileNotFoundError):
            return f"{Path(error.filename or STATE).name} is missing"
        return f"{STATE} is damaged" if isinstance(error, JsonError) else str(error)
