"""Checkpoints in a layout that knows neither world size nor ZeRO stage.

`checkpoints/step-00000100/` holds `weights.safetensors` (fp32, what learns), `moments.safetensors`
(fp32, `name/exp_avg`, `name/exp_avg_sq`) and `state.json`, written last, with the sizes and
checksums of the other two. A folder is filled under a temporary name and renamed.
`milestones/step-00000100/` has no moments: weights to keep, and no point to go on from.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import platform
import shutil
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lapilli.data.shards import sha256_file
from lapilli.model.interop.foreign import load_foreign
from lapilli.model.trainable import base_name, group_of, shape_of, trainable_parameters
from lapilli.model.vlm import VisionLanguageModel
from lapilli.train import engine as deepspeed_engine
from lapilli.train.errors import TrainError

__all__ = [
    "WEIGHTS",
    "Checkpoint",
    "Writer",
    "at_step",
    "check_disk",
    "find_checkpoints",
    "forget_old",
    "frozen_fingerprint",
    "is_run",
    "latest_checkpoint",
    "load_into",
    "load_start",
    "load_weights",
    "save",
    "tidy",
    "write_checkpoint",
]

FOLDER, MILESTONES = "checkpoints", "milestones"
WEIGHTS, MOMENTS = FILES = ("weights.safetensors", "moments.safetensors")
STATE, CONFIG = "state.json", "config.json"
CUT, GONE = ".tmp", ".old"  # ends of a folder's name while it is filled, and while it is removed


@dataclass(frozen=True)
class Checkpoint:
    """A whole, verified checkpoint.

    Attributes:
        path: Its folder.
        step: Optimizer steps taken.
        state: Everything else: dataset and frozen fingerprints, versions.
    """

    path: Path
    step: int
    state: dict[str, Any]


class Writer:
    """Writes one checkpoint at a time behind the training. A context: its end waits for the last.

    What is written was copied to the host before, so that training may go on.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Write behind the caller's back, after waiting for the write before.

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
        """Raise at once what a write has met, without waiting for one.

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


def save(
    engine: Any,
    run: Path,
    step: int,
    state: dict[str, Any],
    *,
    keep: int,
    is_writer: bool,
    writer: Writer | None = None,
) -> Path:
    """Gather what learns and its moments on every rank; one of them writes.

    Args:
        engine: DeepSpeed's engine.
        run: The run's folder.
        step: Optimizer steps taken.
        state: JSON values kept with it.
        keep: Newest checkpoints to keep, this one included.
        is_writer: Whether this rank writes.
        writer: Writes behind the training; None writes now.

    Returns:
        The checkpoint's folder.
    """
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name, parameter in trainable_parameters(engine.module).items():
        weight = deepspeed_engine.read_weight(parameter)
        found = deepspeed_engine.read_moments(engine, parameter)
        if is_writer:
            weights[name] = weight.cpu().clone()
            moments.update({f"{name}/{key}": value.cpu().clone() for key, value in found.items()})
    path = run / FOLDER / f"step-{step:08d}"

    def write() -> None:
        write_checkpoint(path, {WEIGHTS: weights, MOMENTS: moments}, {"step": step, **state})
        forget_old(run, step, keep)

    if is_writer and writer:
        writer.start(write)
    elif is_writer:
        write()
    return path


def write_checkpoint(
    path: Path, tensors: Mapping[str, dict[str, Tensor]], state: dict[str, Any]
) -> None:
    """Write a checkpoint's folder: it is whole or not there, also after a power cut.

    Args:
        path: The folder; one that is there already is replaced.
        tensors: What each file holds.
        state: JSON values kept with them.

    Raises:
        TrainError: The disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}{CUT}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, values in tensors.items():
            save_file(values, temporary / name)
        files = {
            name: {
                "bytes": (temporary / name).stat().st_size,
                "sha256": sha256_file(temporary / name),
            }
            for name in tensors
        }
        text = json.dumps({**state, "files": files}, indent=1)
        (temporary / STATE).write_text(text, encoding="utf-8")
        put_in_place(temporary, path)
    except OSError as error:
        raise TrainError(f"{path}: cannot be written ({error}); free space and resume") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(temporary: Path, path: Path) -> None:
    """Flush a filled folder and rename it; the name is on the disk too when this returns."""
    for file in temporary.iterdir():
        _flush(file)
    _flush(temporary)
    _remove(path)
    temporary.rename(path)
    for folder in (path.parent, path.parent.parent):  # that one has a new name when it is the first
        _flush(folder)


def _flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some file systems of networks flush no folders
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a checkpoint; a kill in between leaves none that looks whole or damaged."""
    if path.exists():
        gone = path.with_name(f".{path.name}{GONE}")
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def forget_old(run: Path, step: int, keep: int) -> None:
    """Keep the newest up to `step`; a later one is damaged, or the run had not gone back."""
    paths = sorted((run / FOLDER).glob("step-*"))
    current = [path for path in paths if path.name <= f"step-{step:08d}"]
    for path in {*paths} - {*current[-keep:]}:
        with contextlib.suppress(OSError):
            _remove(path)


def tidy(run: Path, step: int) -> list[str]:
    """Remove what a kill left half written, and tell what the run does not go on from.

    Args:
        run: The run's folder, to which nobody else writes.
        step: The newest whole checkpoint's, or 0.

    Returns:
        One line for each checkpoint that is not what it should be.
    """
    said: list[str] = []
    goes_on = f"the run goes on from step {step}" if step else "the run starts at step 0"
    for folder in (FOLDER, MILESTONES):
        for path in sorted((run / folder).glob(".step-*")):
            shutil.rmtree(path, ignore_errors=True)
            if path.name.endswith(CUT):
                name = path.name.removeprefix(".").removesuffix(CUT)
                said.append(f"{folder}/{name}: cut short while it was saved; removed, {goes_on}")
    for path in sorted((run / FOLDER).glob("step-*")):
        if path.name > f"step-{step:08d}":
            said.append(
                f"{FOLDER}/{path.name}: damaged, or without optimizer moments; passed over, "
                f"{goes_on} and removes it at the next save"
            )
    return said


def is_run(run: Path) -> bool:
    """Whether a folder is that of a run that has saved."""
    return (run / FOLDER).is_dir()


def find_checkpoints(run: Path, *, hashed: bool = True) -> list[Checkpoint]:
    """The whole checkpoints of a run, oldest first; one cut short or changed is left out.

    Without `hashed` only sizes are compared: a look from outside need not read every weight.
    """
    found = [_read(path, hashed=hashed) for path in sorted((run / FOLDER).glob("step-*"))]
    return [checkpoint for checkpoint in found if checkpoint is not None]


def latest_checkpoint(run: Path) -> Checkpoint | None:
    """The newest whole checkpoint, or None."""
    for path in sorted((run / FOLDER).glob("step-*"), reverse=True):
        if checkpoint := _read(path):
            return checkpoint
    return None


def at_step(run: Path, step: int) -> Checkpoint:
    """The checkpoint of a step, which another rank has found whole.

    Raises:
        TrainError: It is not here: the run's folder is not shared by all nodes.
    """
    path = run / FOLDER / f"step-{step:08d}"
    try:
        state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise TrainError(
            f"output: {path} is not visible on {platform.node()}; expected a folder on a file "
            "system that all nodes share"
        ) from None
    return Checkpoint(path, step, state)


def _read(path: Path, *, hashed: bool = True) -> Checkpoint | None:
    try:
        state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
        if {*state["files"]} != {*FILES}:
            return None
        for name, facts in state["files"].items():
            if (path / name).stat().st_size != facts["bytes"]:
                return None
            if hashed and sha256_file(path / name) != facts["sha256"]:
                return None
        return Checkpoint(path, int(state["step"]), state)
    except (OSError, ValueError, KeyError):
        return None


def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Put a checkpoint's weights into a model that is not in an engine yet.

    Raises:
        TrainError: Other parameters than the model's trainable ones, or other shapes.
    """
    weights = load_file(checkpoint.path / WEIGHTS)
    _check_names(checkpoint, model, weights)
    deepspeed_engine.assign(model, weights)


def load_start(run: Path, model: VisionLanguageModel) -> Checkpoint | None:
    """Put what an earlier run trained into a model, whichever of its parts learn now.

    What that run had frozen must be what this model has there: its weights fit nothing else. None
    where the weights are LLaVA's or transformers' (`lapilli.model.interop.foreign`).

    Raises:
        ModelError: Weights of others that do not fit the model.
        TrainError: No run, none of its checkpoints is whole, another model, other frozen weights.
    """
    found = latest_checkpoint(run)
    if found is None:
        if load_foreign(run, model):
            return None
        raise TrainError(
            f"start_from: {run} has no whole checkpoint; expected the output of a training run, or "
            "a checkpoint of LLaVA's or of transformers' LlavaForConditionalGeneration"
        )
    if earlier := found.state["config"]["start_from"]:
        load_start(Path(earlier), model)  # what learnt there and was frozen in `run` is only there
    weights = load_file(found.path / WEIGHTS)
    there = dict(model.named_parameters())
    here = {base_name(name): name for name in there}  # this run may put adapters around its layers
    weights = {here.get(name, name): value for name, value in weights.items()}
    for name, value in weights.items():
        if name not in there or shape_of(there[name]) != tuple(value.shape):
            shape = shape_of(there[name]) if name in there else "no such parameter"
            raise TrainError(
                f"start_from: {found.path} holds {name} of shape {tuple(value.shape)}, this model "
                f"{shape}; expected the same model config"
            )
    frozen = frozen_fingerprint(model, trained=weights.keys())
    if frozen != found.state["frozen"]:
        raise TrainError(
            f"start_from: {run} was trained beside other frozen weights (fingerprint "
            f"{found.state['frozen'][:12]}, here {frozen[:12]}); expected the same model config"
        )
    deepspeed_engine.assign(model, weights)
    return found


def load_into(engine: Any, checkpoint: Checkpoint) -> None:
    """Set an engine's weights, moments and step count to a checkpoint's. All ranks call it."""
    weights = load_file(checkpoint.path / WEIGHTS)
    flat = load_file(checkpoint.path / MOMENTS)
    _check_names(checkpoint, engine.module, weights)
    moments: dict[str, dict[str, Tensor]] = {name: {} for name in weights}
    for key, value in flat.items():
        name, _, moment = key.rpartition("/")
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
        if shape != tuple(weights[name].shape):
            raise TrainError(
                f"{checkpoint.path}: {name} has shape {tuple(weights[name].shape)}, the model's "
                f"has {shape}; expected the same model config"
            )


def frozen_fingerprint(model: nn.Module, trained: Collection[str]) -> str:
    """SHA-256 over the weights that are not `trained`: a checkpoint does not hold them.

    Collective, where they are shared among workers: each is made whole in its turn.
    """
    named = {base_name(name): parameter for name, parameter in model.named_parameters()}
    known = {base_name(name) for name in trained}
    digest = hashlib.sha256()
    for name, parameter in sorted(named.items()):
        if name not in known and group_of(name) != "adapters":
            digest.update(name.encode())
            with deepspeed_engine.gathered([parameter]):
                # as bytes: numpy has no bf16
                flat = parameter.detach().cpu().contiguous().flatten()
                digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_disk(run: Path, model: nn.Module, keep: int) -> None:
    """Stop before step 0 if the checkpoints to come do not fit on the disk.

    Args:
        run: The run's folder, absolute; it need not be there yet.
        model: The model, for what learns.
        keep: Checkpoints kept; one more is there while it is written.

    Raises:
        TrainError: Names the bytes needed and free.
    """
    one = 12 * sum(
        math.prod(shape_of(p)) for p in trainable_parameters(model).values()
    )  # fp32, two moments
    needed = one * (keep + 1)
    existing = next(folder for folder in (run, *run.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise TrainError(
            f"output: {run} has {free / 1e9:.1f} GB free, {keep + 1} checkpoints need "
            f"{needed / 1e9:.1f} GB; free space or lower keep"
        )
