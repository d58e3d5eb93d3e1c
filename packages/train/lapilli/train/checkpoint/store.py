"""Read what a run has in an object store, and store what belongs to no checkpoint.

See `lapilli.train.checkpoint.upload` for what lies there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lapilli.data.io.access import FULL
from lapilli.data.io.atomic import sha256_file
from lapilli.data.io.local_copy import download
from lapilli.data.io.remote_path import RemotePath
from lapilli.data.io.typed_json import JsonError, as_type, from_json, is_file_path
from lapilli.data.record import excerpt
from lapilli.train.checkpoint.find import Checkpoint, damage, latest_checkpoint
from lapilli.train.checkpoint.layout import is_step, put_in_place
from lapilli.train.checkpoint.places import Places
from lapilli.train.config import RunConfig
from lapilli.train.errors import TrainError
from lapilli.train.renamed import RUN_NAMES
from lapilli.train.run_folder.checkpoint_state import parse_state, read_state
from lapilli.train.run_folder.dataset_files import run_data_files
from lapilli.train.run_folder.messages import note
from lapilli.train.run_folder.names import (
    CONFIG,
    CUT,
    DATA,
    FOLDER,
    NOTES,
    PROFILE,
    RECORDS,
    REPLAY,
    REPORT,
    RUN_INFO,
    STACKS,
    STATE,
    WORKERS,
    step_name,
)
from lapilli.train.run_folder.restarts import keep_later
from lapilli.train.run_folder.scratch import lies_in_store

__all__ = [
    "bring_records",
    "bytes_at",
    "fetch_agreed",
    "fetch_checkpoint",
    "fetch_newest",
    "fetch_records",
    "listed",
    "newest_checkpoint",
    "store_config",
    "store_records",
    "stored_beside",
    "stored_config",
]

OF_DRIVER = (RUN_INFO, NOTES, WORKERS, REPORT)


def bytes_at(path: RemotePath) -> bytes | None:
    """An object's bytes; None if there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def listed(address: str) -> dict[str, dict[str, RemotePath]]:
    """The objects of each checkpoint at an address, by step and by name."""
    folder = RemotePath(address) / FOLDER
    found: dict[str, dict[str, RemotePath]] = {}
    for path in folder.files():
        step, *names = path.relative_to(folder).parts
        if is_step(step) and len(names) == 1:
            found.setdefault(step, {})[names[0]] = path
    return found


def stored_config(address: str) -> RunConfig | None:
    """The settings of the run whose copies are at an address; None where there is no run.

    Raises:
        DataError: The address cannot be read.
        TrainError: What is there is no run's.
    """
    data = bytes_at(RemotePath(address) / CONFIG)
    if data is None:
        return None
    try:
        found = from_json(data, dict[str, Any])
        config = as_type(RUN_NAMES.with_new_names(found), RunConfig)
    except JsonError as error:
        raise TrainError(
            f"checkpoint.upload: {address}/{CONFIG} is not a run's ({error}); choose another "
            "address"
        ) from None
    if RUN_NAMES.found_in(found):
        raise TrainError(
            f"checkpoint.upload: the run at {address} was made by an earlier version and cannot be "
            "resumed; choose another address"
        )
    return config


def store_config(run: Path, address: str) -> None:
    """Upload the settings and `data`; fails before the first step if the store cannot be written.

    Raises:
        DataError: The address cannot be written.
    """
    for name in (CONFIG, *run_data_files(run)):
        (RemotePath(address) / name).put(run / name)


def store_records(run: Path, address: str) -> None:
    """Upload what the driver has of a run that ended: records, facts, notes, stacks, the report.

    Raises:
        DataError: The address cannot be read or written.
    """
    keep_later(run, _records_at(address))  # of a worker that was lost before it brought them
    stacks = [f"{STACKS}/{path.name}" for path in sorted((run / STACKS).glob("*"))]
    for name in (*RECORDS, *OF_DRIVER, *stacks):
        if (run / name).exists():
            (RemotePath(address) / name).put(run / name)


def stored_beside(address: str) -> list[str]:
    """Paths in a run in a store of the traces and kept steps that its workers put there.

    Raises:
        DataError: The address cannot be read.
    """
    run = RemotePath(address)
    return sorted(f"{kind}/{name}" for kind in (PROFILE, REPLAY) for name in (run / kind).sizes())


def bring_records(run: Path, address: str) -> None:
    """Bring all of a run but its checkpoints; what is here of a later life, or as late, stays.

    Raises:
        DataError: The address cannot be read.
    """
    run.mkdir(parents=True, exist_ok=True)
    is_older = keep_later(run, _records_at(address))
    missing = [name for name in OF_DRIVER if is_older or not (run / name).exists()]
    _fetch_files(run, address, (CONFIG, *missing))
    _fetch_data(run, address)


def _records_at(address: str) -> dict[str, bytes]:
    found = {name: bytes_at(RemotePath(address) / name) for name in reversed(RECORDS)}
    return {name: data for name, data in found.items() if data is not None}


def fetch_records(run: Path, address: str) -> None:
    """Download all of a run but its checkpoints.

    Raises:
        DataError: The address cannot be read.
    """
    run.mkdir(parents=True, exist_ok=True)
    _fetch_files(run, address, (CONFIG, *RECORDS, *OF_DRIVER))
    _fetch_data(run, address)


def newest_checkpoint(config: RunConfig) -> Checkpoint | None:
    """The newest whole checkpoint of a run; of one in a store its `state.json` alone is read.

    Raises:
        DataError, TrainError: It cannot be read: it may be whole.
    """
    run, address = Path(config.output), config.checkpoint.upload
    if not lies_in_store(config):
        return latest_checkpoint(run)
    found = listed(address)
    for name in sorted(found, reverse=True):
        if STATE in found[name]:
            with contextlib.suppress(FileNotFoundError, JsonError):
                state = parse_state(found[name][STATE].read_bytes())
                return Checkpoint(run / FOLDER / name, state.step, state)
    return None


def fetch_agreed(run: Path, address: str, places: Places) -> int:
    """Have every place hold the newest checkpoint that all of them can fetch. Collective.

    Returns:
        Its step; 0 where there is none.

    Raises:
        DataError: The address cannot be read.
    """
    agreed: list[list[str]] = [[]]
    if places.rank == 0:
        found = listed(address)
        agreed[0] = sorted((name for name in found if STATE in found[name]), reverse=True)
    if dist.is_initialized():
        dist.broadcast_object_list(agreed, src=0)
    for name in agreed[0]:
        path = run / FOLDER / name
        whole = not places.is_leader or _is_here(path) or _fetch(
            RemotePath(address) / FOLDER / name, path
        )  # fmt: skip
        if all(_gathered(whole)):
            if places.rank == 0:
                keep_later(run, _records_at(address))
            return int(name.partition("-")[2])
        if places.is_leader:
            shutil.rmtree(path, ignore_errors=True)
        if places.rank == 0:
            note(run, f"{address}: {FOLDER}/{name} is cut short or damaged there; passed over")
    return 0


def _is_here(path: Path) -> bool:
    return path.is_dir() and not damage(path)


def _gathered(value: bool) -> list[bool]:
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _fetch_files(run: Path, address: str, names: Iterable[str]) -> None:
    """Download those of the files that are there."""
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            download(RemotePath(address) / name, run / f".{name}{CUT}")
            (run / f".{name}{CUT}").replace(run / name)


def fetch_newest(
    run: Path, address: str, step: int, on_note: Callable[[str], None] = lambda line: None
) -> int:
    """Download the newest whole checkpoint if it is newer than the local one.

    Args:
        run: The run's folder.
        address: Where its copies are.
        step: The newest whole checkpoint here, or 0.
        on_note: Called with a line for what was fetched, and for each that is damaged there.

    Returns:
        The step of the newest whole checkpoint here now.

    Raises:
        DataError: The address cannot be read.
        TrainError: The disk is full.
    """
    found = listed(address)
    for name in sorted(found, reverse=True):
        if name <= step_name(step):
            break
        path = run / FOLDER / name
        if STATE in found[name] and _fetch(RemotePath(address) / FOLDER / name, path):
            _fetch_files(run, address, RECORDS)
            _fetch_data(run, address)
            on_note(f"{address}: fetched {FOLDER}/{name}")
            return int(name.partition("-")[2])
        on_note(f"{address}: {FOLDER}/{name} is cut short or damaged there; passed over")
    return step


def fetch_checkpoint(run: Path, address: str, name: str) -> bool:
    """Download a checkpoint or milestone, by its path in the run, unless it is here and whole.

    Returns:
        False if it is not what its `state.json` says.

    Raises:
        DataError: The address cannot be read.
        TrainError: The disk is full.
    """
    path = run / name
    here = path.is_dir() and not damage(path, hashed=False, resumable=False)
    return here or _fetch(RemotePath(address) / name, path)


def _fetch_data(run: Path, address: str) -> None:
    """Download the run's `data` if it is missing here."""
    source, temporary = RemotePath(address) / DATA, run / f".{DATA}{CUT}"
    if (run / DATA).exists():
        return
    shutil.rmtree(temporary, ignore_errors=True)
    for path in source.files():
        name = str(path.relative_to(source))
        if not is_file_path(name):  # a store's keys are any text
            raise TrainError(
                f"checkpoint.upload: {excerpt(str(path))} leads out of the run; remove it there"
            )
        target = temporary / name
        target.parent.mkdir(parents=True, exist_ok=True)
        download(path, target)
    if temporary.exists():
        temporary.rename(run / DATA)


def _fetch(source: RemotePath, path: Path) -> bool:
    """Download a checkpoint; False if it is not what its `state.json` says."""
    temporary = path.with_name(f".{path.name}{CUT}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        state = source / STATE
        download(state, temporary / STATE)
        for name, file in read_state(temporary).files.items():
            with contextlib.suppress(OSError):  # this node's own part, from before
                os.link(path / name, temporary / name)
            if _size(temporary / name) != file.bytes:
                (temporary / name).unlink(missing_ok=True)
                download(source / name, temporary / name)
            if sha256_file(temporary / name) != file.sha256:
                return False
        put_in_place(temporary, path)
        return True
    except (FileNotFoundError, JsonError, KeyError):
        return False
    except OSError as error:
        remedy = "free space" if error.errno in FULL else "see to the folder's rights and its disk"
        raise TrainError(
            f"{path}: cannot be fetched from {source} ({error}); {remedy} and run the same again"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1
