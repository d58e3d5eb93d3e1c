"""Save and load checkpoints in a layout independent of world size and ZeRO stage.

`checkpoints/step-00000100/` holds `weights.safetensors` (fp32, what learns), `moments.safetensors`
(fp32, `name/exp_avg`, `name/exp_avg_sq`) and `state.json` with the sizes and checksums of the other
two. `milestones/step-00000100/` has no moments: weights to keep, and no point to go on from.
"""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from lapilli.data.io.access import FULL, cannot_read, exists
from lapilli.data.io.atomic import sha256_file
from lapilli.data.io.printable import bytes_text
from lapilli.model.deepspeed_internals import shape_of
from lapilli.model.errors import ModelError
from lapilli.model.parts.trainable import trainable_parameters
from lapilli.model.parts.weight_files import read_safetensors, save_tensors
from lapilli.train.checkpoint.find import Checkpoint
from lapilli.train.checkpoint.layout import folder_bytes, forget_old, put_in_place
from lapilli.train.engine import deepspeed_engine
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.checkpoint_state import CheckpointFile, CheckpointState, write_state
from lapilli.train.run_folder.names import (
    CONFIG,
    CUT,
    DATA,
    FOLDER,
    MILESTONES,
    MOMENTS,
    WEIGHTS,
    step_name,
)

__all__ = [
    "Copies",
    "Writer",
    "check_disk",
    "load_into",
    "load_weights",
    "save",
    "write_checkpoint",
]


class Writer:
    """Writes checkpoints in the background, one at a time. Leaving the context waits.

    What is written was copied to the host before, so that training may go on.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Write in the background, after the previous write.

        Raises:
            TrainError: The write before failed.
        """
        self.wait()

        def work() -> None:
            try:
                write()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until all is on the disk.

        Raises:
            TrainError: It could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise the error of a finished write, without waiting.

        Raises:
            TrainError: It could not be written.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *raised: object) -> None:
        if raised[0] is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()  # what stopped the training is what is told


class Copies(Protocol):
    """What takes copies of saved folders elsewhere, behind the training."""

    def offer(self, path: Path) -> None:
        """A folder is whole; copy it when there is time."""
        ...

    def held(self) -> Collection[Path]:
        """Folders that are still needed here."""
        ...


def save(
    engine: Any,
    run: Path,
    step: int,
    state: CheckpointState,
    *,
    keep: int,
    is_writer: bool,
    writer: Writer | None = None,
    forms: Collection[str] = (FOLDER,),
    copies: Copies | None = None,
) -> Path:
    """Gather what learns and its moments on every rank; one of them writes.

    Args:
        engine: DeepSpeed's engine.
        run: The run's folder.
        step: Optimizer steps taken.
        state: What `state.json` says beside step and files.
        keep: Newest checkpoints to keep, this one included.
        is_writer: Whether this rank writes.
        writer: Writes behind the training; None writes now.
        forms: `checkpoints` for one to go on from, `milestones` for weights that are kept for ever.
        copies: Takes what is written elsewhere.

    Returns:
        The checkpoint's folder.
    """
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name, parameter in trainable_parameters(engine.module).items():
        weight = deepspeed_engine.read_weight(parameter)
        found = deepspeed_engine.read_moments(engine, parameter) if FOLDER in forms else {}
        if is_writer:
            weights[name] = weight.cpu().clone()
            moments.update({f"{name}/{key}": value.cpu().clone() for key, value in found.items()})
    tensors = {MILESTONES: {WEIGHTS: weights}, FOLDER: {WEIGHTS: weights, MOMENTS: moments}}

    def write() -> None:
        # The milestone first: a run resumes from the checkpoint, and would not come back for it.
        for form, held in tensors.items():
            if form in forms:
                path = run / form / step_name(step)
                write_checkpoint(path, held, replace(state, step=step))
                if copies:
                    copies.offer(path)
        if FOLDER in forms:
            forget_old(run, step, keep, held=copies.held() if copies else ())

    if is_writer and writer:
        writer.start(write)
    elif is_writer:
        write()
    return run / FOLDER / step_name(step)


def write_checkpoint(
    path: Path, tensors: Mapping[str, dict[str, Tensor]], state: CheckpointState
) -> None:
    """Write a checkpoint's folder: it is whole or not there, also after a power cut.

    Args:
        path: The folder; one that is there already is replaced.
        tensors: What each file holds.
        state: What `state.json` says, without the files.

    Raises:
        TrainError: The disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}{CUT}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, values in tensors.items():
            save_tensors(values, temporary / name)
        files = {
            name: CheckpointFile((temporary / name).stat().st_size, sha256_file(temporary / name))
            for name in tensors
        }
        write_state(replace(state, files=files), temporary)
        if MOMENTS not in tensors:  # so that the folder can be named where a run can
            config = json.dumps(state.config, indent=1)
            (temporary / CONFIG).write_text(config, encoding="utf-8")
            if (path.parent.parent / DATA).is_dir():
                shutil.copytree(path.parent.parent / DATA, temporary / DATA)
        put_in_place(temporary, path)
    except OSError as error:
        remedy = "free space" if error.errno in FULL else "see to the folder's rights and its disk"
        raise TrainError(f"{path}: cannot be written ({error}); {remedy} and resume") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _load(file: Path) -> dict[str, Tensor]:
    """Read a file of a verified checkpoint."""
    try:
        return read_safetensors(file)
    except FileNotFoundError:
        raise TrainError(
            f"{file}: was replaced by a newer one while it was read; run the same again"
        ) from None
    except OSError as error:
        raise TrainError(cannot_read(file, error)) from None
    except ModelError as error:
        raise TrainError(str(error)) from None


def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Load a checkpoint's weights into a model without an engine.

    Raises:
        TrainError: Other parameters than the model's trainable ones, or other shapes.
    """
    weights = _load(checkpoint.path / WEIGHTS)
    _check_names(checkpoint, model, weights)
    deepspeed_engine.assign(model, weights)


def load_into(engine: Any, checkpoint: Checkpoint) -> None:
    """Set an engine's weights, moments and step count to a checkpoint's. All ranks call it."""
    weights = _load(checkpoint.path / WEIGHTS)
    flat = _load(checkpoint.path / MOMENTS)
    _check_names(checkpoint, engine.module, weights)
    moments: dict[str, dict[str, Tensor]] = {name: {} for name in weights}
    for key, value in flat.items():
        name, _, moment = key.rpartition("/")
        if name not in moments or value.shape != weights[name].shape:
            raise TrainError(
                f"{checkpoint.path / MOMENTS}: {key} of shape {tuple(value.shape)} is no moment of "
                "its weights; remove this checkpoint, the run resumes from the previous one"
            )
        moments[name][moment] = value
    deepspeed_engine.restore(engine, weights, moments, checkpoint.step)


def _check_names(checkpoint: Checkpoint, model: nn.Module, weights: dict[str, Tensor]) -> None:
    expected = trainable_parameters(model)
    if expected.keys() != weights.keys():
        different = sorted(expected.keys() ^ weights.keys())
        raise TrainError(
            f"{checkpoint.path}: parameters differ from the model's ({different[0]} and "
            f"{len(different) - 1} more); expected the same model config and trainable parts"
        )
    for name, parameter in expected.items():
        shape = shape_of(parameter)
        if not weights[name].is_floating_point():
            raise TrainError(f"{checkpoint.path}: {name} is {weights[name].dtype}; expected floats")
        if shape != tuple(weights[name].shape):
            raise TrainError(
                f"{checkpoint.path}: {name} has shape {tuple(weights[name].shape)}, the model's "
                f"has {shape}; expected the same model config"
            )


def check_disk(run: Path, model: nn.Module, keep: int, milestones: int = 0) -> None:
    """Stop before step 0 if the checkpoints to come do not fit on the disk.

    Args:
        run: The run's folder, absolute; it need not be there yet.
        model: The model, for what learns.
        keep: Checkpoints kept; one more is there while it is written.
        milestones: Milestones of the whole run.

    Raises:
        TrainError: Names the bytes needed and free.
    """
    numbers = sum(math.prod(shape_of(p)) for p in trainable_parameters(model).values())
    needed = 12 * numbers * (keep + 1) + 4 * numbers * milestones  # fp32, with two moments or none
    there = sum(folder_bytes(run / form) for form in (FOLDER, MILESTONES))  # of a resumed run
    existing = next(folder for folder in (run, *run.parents) if exists(folder))
    free = shutil.disk_usage(existing).free
    if needed > free + there:
        beside = f" and {milestones} milestones" if milestones else ""
        raise TrainError(
            f"output: {run} has {bytes_text(free)} free, {keep + 1} checkpoints{beside} need "
            f"{bytes_text(needed)}; free space or lower checkpoint.keep_last"
            + (", or raise checkpoint.archive_every" if milestones else "")
        )
