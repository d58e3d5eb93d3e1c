"""Save and load checkpoints in a layout independent of world size and ZeRO stage.

`checkpoints/step-00000100/` holds a part from each worker (`lapilli.train.checkpoint.parts`) and
`state.json` with sizes and checksums of the parts. `milestones/step-00000100/` holds whole
`weights.safetensors` and no moments: weights to keep, and no point to go on from.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import nn

from lapilli.data.io.access import FULL, exists
from lapilli.data.io.printable import bytes_text
from lapilli.model.deepspeed_internals import shape_of
from lapilli.model.parts.trainable import trainable_parameters
from lapilli.train.checkpoint.find import Checkpoint, require_layout
from lapilli.train.checkpoint.layout import folder_bytes, forget_old, put_in_place
from lapilli.train.checkpoint.parts import Saved, open_saved, write_whole
from lapilli.train.checkpoint.places import Places
from lapilli.train.checkpoint.staging import StagedFragment, Staging
from lapilli.train.engine.fragments import (
    KINDS,
    WEIGHT,
    Fragment,
    checkpoint_share,
    held_fragments,
    set_steps,
    this_rank,
    working_fragments,
)
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.checkpoint_state import (
    LAYOUT,
    CheckpointFile,
    CheckpointState,
    write_state,
)
from lapilli.train.run_folder.names import (
    CONFIG,
    CUT,
    DATA,
    FOLDER,
    MILESTONES,
    STATE,
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

    What is written was copied to the host before, so that training may go on. Every worker has one;
    they agree in a process group of their own, beside that of the training. Making one is
    collective.
    """

    def __init__(self) -> None:
        self.staging = Staging()
        self.group: Any = None
        if this_rank()[1] > 1:
            self.group = dist.new_group(backend="gloo")
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def reserve(self, engine: Any) -> None:
        """Take the memory for this worker's share before the first step."""
        self.staging.reserve(sum(one.length for one in held_fragments(engine, divided=True)))

    def start(self, write: Callable[[], None]) -> None:
        """Write in the background; the write before has ended (`wait`)."""

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
        try:
            if raised[0] is None:
                self.wait()
            elif self._thread is not None:
                self._thread.join()  # what stopped the training is what is told
        finally:
            self.staging.free()


class Copies(Protocol):
    """What takes copies of saved folders elsewhere, behind the training."""

    def offer(self, path: Path) -> None:
        """A folder is whole; copy it when there is time."""
        ...

    def held(self) -> Collection[Path]:
        """Folders that are still needed here."""
        ...


@dataclass(frozen=True)
class _Finish:
    """What rank 0 does when all parts are on the disk.

    Attributes:
        run: The run's folder.
        state: What `state.json` says, but for the files.
        forms: As of `save`.
        keep: As of `save`.
        copies: As of `save`.
        places: As of `save`.
    """

    run: Path
    state: CheckpointState
    forms: Collection[str]
    keep: int
    copies: Copies | None
    places: Places = field(default_factory=Places)

    def place(self, form: str) -> Path:
        """Where a folder of the step will lie."""
        return self.run / form / step_name(self.state.step)

    @property
    def parts(self) -> Path:
        """The folder that parts are written into."""
        return _cut(self.place(FOLDER if FOLDER in self.forms else MILESTONES))

    def __call__(self, files: Mapping[str, CheckpointFile]) -> None:
        """Move what is whole into place: first the milestone, which a resumed run would not save.

        Of a milestone alone the parts are removed when its file is written.
        """
        content = json.dumps({name: file.sha256 for name, file in sorted(files.items())})
        weights = hashlib.sha256(content.encode()).hexdigest()
        state = replace(self.state, files={**files}, weights=weights)
        if MILESTONES in self.forms:
            self._finish_milestone(state)
        if FOLDER in self.forms:
            write_state(state, self.parts)
            self._put(FOLDER)
            held = self.copies.held() if self.copies else ()
            forget_old(self.run, state.step, self.keep, held=held)

    def follow(self, group: Any) -> None:
        """Finish the folders of other places beside that of rank 0, which is done. Collective."""
        if self.places.is_shared:
            return
        path = self.place(FOLDER)
        said = [(path / STATE).read_bytes() if self.places.rank == 0 else b""]
        dist.broadcast_object_list(said, src=0, group=group)
        if self.places.is_leader and self.places.rank:
            (self.parts / STATE).write_bytes(said[0])
            put_in_place(self.parts, path)
            held = self.copies.held() if self.copies else ()
            forget_old(self.run, self.state.step, self.keep, held=held)
        dist.barrier(group)

    def _finish_milestone(self, state: CheckpointState) -> None:
        folder = _cut(self.place(MILESTONES))
        if folder != self.parts:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        with open_saved(Checkpoint(self.parts, state.step, state)) as saved:
            file = write_whole(folder / WEIGHTS, saved)
        if folder == self.parts:
            for name in state.files:
                (folder / name).unlink()
        write_state(replace(state, files={WEIGHTS: file}), folder)
        config = json.dumps(state.config, indent=1)  # so that it can be named where a run can
        (folder / CONFIG).write_text(config, encoding="utf-8")
        if (self.run / DATA).is_dir():
            shutil.copytree(self.run / DATA, folder / DATA)
        self._put(MILESTONES)

    def _put(self, form: str) -> None:
        path = self.place(form)
        put_in_place(_cut(path), path)
        if self.copies:
            self.copies.offer(path)


def save(
    engine: Any,
    run: Path,
    step: int,
    state: CheckpointState,
    *,
    keep: int,
    writer: Writer | None = None,
    forms: Collection[str] = (FOLDER,),
    copies: Copies | None = None,
    places: Places | None = None,
) -> Path:
    """Copy this worker's share to the host; all workers write theirs. Collective.

    Args:
        engine: DeepSpeed's engine.
        run: The run's folder.
        step: Optimizer steps taken.
        state: What `state.json` says beside step and files.
        keep: Newest checkpoints to keep, this one included.
        writer: Writes behind the training; None writes now.
        forms: `checkpoints` for one to go on from, `milestones` for weights that are kept for ever.
        copies: Takes what is written elsewhere: this worker's part, on rank 0 the rest too.
        places: Who sees the same folder; None where all workers do. No milestone is written where
            there are several.

    Returns:
        The checkpoint's folder.
    """
    if writer:
        writer.wait()  # its memory is used again
    kinds = KINDS if FOLDER in forms else (WEIGHT,)
    staging = writer.staging if writer else Staging()
    pieces = staging.copy(held_fragments(engine, kinds, divided=True))
    shapes = {n: [*shape_of(p)] for n, p in trainable_parameters(engine.module).items()}
    made = replace(state, step=step, layout=LAYOUT, shapes=shapes)
    finish = _Finish(
        run=run, state=made, forms=forms, keep=keep, copies=copies,
        places=places or Places(this_rank()[0]),
    )  # fmt: skip

    def write() -> None:
        _write(pieces, kinds, finish, writer.group if writer else None)

    if writer:
        writer.start(write)
    else:
        write()
    return run / FOLDER / step_name(step)


def write_checkpoint(
    pieces: Iterable[StagedFragment], run: Path, state: CheckpointState, *, keep: int = 1
) -> None:
    """Write the checkpoint of a worker that is alone: whole or not there, also after a power cut.

    Args:
        pieces: All of it.
        run: The run's folder.
        state: With step and shapes.
        keep: Newest checkpoints to keep, this one included.

    Raises:
        TrainError: The disk is full or the folder cannot be written.
    """
    made = replace(state, layout=LAYOUT)
    finish = _Finish(run=run, state=made, forms=(FOLDER,), keep=keep, copies=None)
    _write([*pieces], KINDS, finish, None)


def _write(
    pieces: list[StagedFragment], kinds: Collection[str], finish: _Finish, group: Any
) -> None:
    # torch's distributed checkpoint, which who only reads a checkpoint does not wait for
    from lapilli.train.checkpoint.protocol import save_pieces

    sizes = {
        f"{name}/{kind}": math.prod(shape)
        for name, shape in finish.state.shapes.items()
        for kind in kinds
    }
    form = FOLDER if FOLDER in finish.forms else MILESTONES
    with _told(finish.place(form), finish.places):
        save_pieces(pieces, sizes, finish.parts, finish, group, finish.places)
        finish.follow(group)
    if finish.copies and this_rank()[0] and FOLDER in finish.forms:
        finish.copies.offer(finish.place(FOLDER))  # whole now; rank 0 has offered it


@contextmanager
def _told(path: Path, places: Places) -> Generator[None]:
    """A write that fails is one line, and leaves nothing."""
    try:
        yield
    except OSError as error:
        remedy = "free space" if error.errno in FULL else "see to the folder's rights and its disk"
        raise TrainError(f"{path}: cannot be written ({error}); {remedy} and resume") from None
    finally:
        if places.is_leader:
            for form in (FOLDER, MILESTONES):
                temporary = _cut(path.parent.parent / form / path.name)
                shutil.rmtree(temporary, ignore_errors=True)


def _cut(path: Path) -> Path:
    return path.with_name(f".{path.name}{CUT}")


def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Load a checkpoint's weights into a model without an engine: what this worker holds of them.

    Raises:
        TrainError: Other parameters than the model's trainable ones, or other shapes.
    """
    with open_saved(checkpoint) as saved:
        _check_names(saved, model)
        _load(saved, working_fragments(model))


def load_into(engine: Any, checkpoint: Checkpoint) -> None:
    """Set an engine's fp32 weights, moments and step count to a checkpoint's.

    A worker reads what it holds, and needs no other. The model must have been given the same
    weights before `initialize`: that is where its working copies (bf16, or partitioned) come from.

    Raises:
        TrainError: It is of the layout before, or of another model.
    """
    require_layout(checkpoint)
    set_steps(engine, checkpoint.step)
    with open_saved(checkpoint, KINDS) as saved:
        _check_names(saved, engine.module)
        _load(saved, held_fragments(engine))


def _load(saved: Saved, fragments: Iterable[Fragment]) -> None:
    for one in fragments:
        one.set(saved.read(one.name, one.kind, one.start, one.length))


def _check_names(saved: Saved, model: nn.Module) -> None:
    expected = trainable_parameters(model)
    if expected.keys() != saved.shapes.keys():
        different = sorted(expected.keys() ^ saved.shapes.keys())
        raise TrainError(
            f"{saved.path}: parameters differ from the model's ({different[0]} and "
            f"{len(different) - 1} more); expected the same model config and trainable parts"
        )
    for name, parameter in expected.items():
        shape = shape_of(parameter)
        if shape != saved.shapes[name]:
            raise TrainError(
                f"{saved.path}: {name} has shape {saved.shapes[name]}, the model's has {shape}; "
                "expected the same model config"
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
    needed = checkpoint_share(numbers, 1) * (keep + 1)
    needed += checkpoint_share(numbers, 1, milestone=True) * milestones
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
