"""The run that a command goes on with: its paths, settings, length, and what a store has of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lapilli.data.io.access import exists, is_folder, subpaths
from lapilli.data.io.addresses import refuse_address
from lapilli.data.io.filesystems import is_remote
from lapilli.data.io.writer_lock import LOCK
from lapilli.train.checkpoint.store import bring_records, fetch_newest, stored_config
from lapilli.train.config import RunConfig, fixed_settings
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.names import CONFIG, STATE
from lapilli.train.run_folder.scratch import in_scratch, lies_in_store
from lapilli.train.run_folder.settings import (
    as_json,
    read_run_config,
    require_current,
    write_run_config,
)

__all__ = [
    "bring_run",
    "changed_length",
    "check_config",
    "check_length",
    "check_same_settings",
    "fetch_newer",
    "with_absolute_paths",
]


LENGTH = ("epochs", "max_steps")  # settings that may change down to what the run has not passed


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Make every local path absolute; a name that is not a folder here may be one on the hub.

    Of a run in a store the output is this node's scratch folder.

    Raises:
        DataError: An address where a path is expected.
    """
    config = in_scratch(config)
    refuse_address("offload.nvme_path", config.offload.nvme_path)

    def local(name: str) -> str:
        return str(Path(name).resolve()) if name and is_folder(Path(name)) else name

    model, disk, cache = config.model, config.offload.nvme_path, config.cache.folder
    return replace(
        config,
        dataset=config.dataset
        if is_remote(config.dataset)
        else str(Path(config.dataset).resolve()),
        output=str(Path(config.output).resolve()),
        init_from=_existing(config.init_from),
        offload=replace(config.offload, nvme_path=str(Path(disk).resolve()) if disk else ""),
        validation=replace(config.validation, dataset=local(config.validation.dataset)),
        cache=replace(config.cache, folder=str(Path(cache).resolve()) if cache else ""),
        model=replace(
            model,
            vision=replace(model.vision, pretrained=local(model.vision.pretrained)),
            language=replace(model.language, pretrained=local(model.language.pretrained)),
        ),
    )


def _existing(path: str) -> str:
    """Absolute where it is there: a folder, or a file such as `mm_projector.bin`."""
    return str(Path(path).resolve()) if path and exists(Path(path)) else path


def bring_run(config: RunConfig) -> None:
    """Bring what a run in a store has, checkpoints left out, to its scratch folder here.

    What is here stays where it is later: of a driver that was killed, or that lost its store.
    """
    if lies_in_store(config) and stored_config(config.checkpoint.upload):
        bring_records(Path(config.output), config.checkpoint.upload)


def check_config(run: Path, config: RunConfig) -> None:
    """A run folder belongs to one config; what decides the loss may not change."""
    path = run / CONFIG
    if exists(run / STATE):
        raise TrainError(
            f"output: {run} is a checkpoint and no run; a milestone has no optimizer moments to go "
            f"on from; set init_from: {run} and choose another --output"
        )
    if exists(run) and not is_folder(run):
        raise TrainError(f"output: {run} is a file; expected a folder; choose another --output")
    if not exists(path):
        if any(found.name != LOCK for found in subpaths(run)):
            raise TrainError(f"output: {run} is not empty and no run; choose another --output")
        return
    before = read_run_config(run)
    require_current(run)
    check_same_settings(before, config, run)


def fetch_newer(config: RunConfig, start: int, on_note: Callable[[str], None]) -> int:
    """Download a newer checkpoint from the copy; returns the step to resume from."""
    run, before = Path(config.output), stored_config(config.checkpoint.upload)
    if before is None:
        return start
    check_same_settings(before, config, config.checkpoint.upload)
    # from here on the folder belongs to this run; its length changes on resume
    write_run_config(run, replace(config, **{key: getattr(before, key) for key in LENGTH}))
    return fetch_newest(run, config.checkpoint.upload, start, on_note)


def check_same_settings(old: RunConfig, config: RunConfig, where: Path | str) -> None:
    """Refuse to resume with a setting that a resumed run may not change.

    Args:
        old: The settings in the run's folder or its copy.
        config: What the command says.
        where: The folder or address, for the error.

    Raises:
        TrainError: Names the first setting that differs, with both values.
    """
    before, now = as_json(fixed_settings(old)), as_json(fixed_settings(config))
    for key in {**now, **before}:
        if key not in LENGTH and before.get(key) != now.get(key):
            place = "checkpoint.upload" if where == config.checkpoint.upload else "output"
            raise TrainError(
                f"{key}: {where} was started with {before.get(key)!r}, now {now.get(key)!r}; "
                f"choose another --{place} or the same value"
            )


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
