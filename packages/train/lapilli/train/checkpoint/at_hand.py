"""Bring what a command reads of a run or of a model in a store to this node's disk.

Of a run that is everything but its checkpoints, and the one that is asked for: the newest whole
one, or the one that a later run has started from. Copies lie in the node's cache, and what the
store no longer has is removed from them.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

from lapilli.data.io.addresses import refuse_web
from lapilli.data.io.file_lock import file_lock
from lapilli.data.io.filesystems import is_remote
from lapilli.data.io.local_copy import cache_root, download, local_copy
from lapilli.data.io.remote_path import RemotePath
from lapilli.data.io.typed_json import JsonError
from lapilli.model.config import ModelConfig
from lapilli.train.checkpoint.layout import is_step, steps_in
from lapilli.train.checkpoint.store import bytes_at, fetch_checkpoint, fetch_records, listed
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.checkpoint_state import parse_state
from lapilli.train.run_folder.names import CONFIG, FOLDER, MILESTONES, REPLAY, STATE

__all__ = ["local_kept_step", "local_model", "local_records", "local_run"]


def local_model(config: ModelConfig) -> ModelConfig:
    """A model's settings with the weights that addresses name on this node's disk.

    Raises:
        DataError: One cannot be copied.
    """
    vision, language = (
        replace(part, pretrained=_weights(part.pretrained, f"model.{name}.pretrained"))
        for name, part in (("vision", config.vision), ("language", config.language))
    )
    return replace(config, vision=vision, language=language)


def _weights(name: str, setting: str) -> str:
    return str(local_copy(name, setting)) if is_remote(name) else name


def local_run(place: str | Path, setting: str, wanted: str = "") -> Path:
    """The folder of a run, a checkpoint, an export or a model: itself, or of an address its copy.

    Args:
        place: A path or an address.
        setting: What names it, for errors.
        wanted: The weights (`weights_id`) that a later run started from; empty for the newest.

    Raises:
        DataError: The address cannot be read.
        TrainError: The run there has no whole checkpoint, or the disk is full.
    """
    address = str(place).rstrip("/")
    if not is_remote(address):
        return Path(place)
    refuse_web(setting, address)
    steps = listed(address)
    if not steps:
        return local_copy(address, setting)
    run = _folder(address)
    with file_lock(run.parent.with_name(f".{run.parent.name}.lock")):
        fetch_records(run, address)
        for path in steps_in(run / FOLDER):
            if path.name not in steps:
                shutil.rmtree(path, ignore_errors=True)
        if not (_fetch_wanted(run, address, wanted) if wanted else _fetch_newest(run, address)):
            raise TrainError(
                f"{setting}: {address} has no whole checkpoint"
                + (f" of the weights {wanted[:12]} that were started from" if wanted else "")
                + "; name another run"
            )
    return run


def local_kept_step(place: str | Path, setting: str) -> Path:
    """The folder of a step that a run kept (`replay/step-N`): itself, or of an address its copy.

    The run's newest checkpoint lies above the copy, for the step to be taken again from.

    Raises:
        DataError: The address cannot be read.
        TrainError: The run there has no whole checkpoint, or the disk is full.
    """
    address = str(place).rstrip("/")
    if not is_remote(address):
        return Path(place)
    above, _, name = address.rpartition(f"/{REPLAY}/")
    if not above:
        raise TrainError(f"{setting}: {address}; expected s3://BUCKET/RUN/{REPLAY}/step-N")
    folder = local_run(above, setting) / REPLAY / name
    folder.mkdir(parents=True, exist_ok=True)
    for path in RemotePath(address).files():
        download(path, folder / path.name)
    return folder


def local_records(address: str) -> tuple[Path, dict[int, int]]:
    """This node's copy of what a run in a store has beside its checkpoints, and these by step.

    Returns:
        The folder; bytes of each whole checkpoint in the store.

    Raises:
        DataError: The address cannot be read.
        TrainError: There is no run.
    """
    if bytes_at(RemotePath(address) / CONFIG) is None:
        raise TrainError(f"{address}: neither a dataset nor a run there; check the address")
    run = _folder(address)
    with file_lock(run.parent.with_name(f".{run.parent.name}.lock")):
        fetch_records(run, address)
    sizes = dict[int, int]()
    for name, (size, _) in (RemotePath(address) / FOLDER).versions().items():
        step = name.partition("/")[0]
        if is_step(step):
            number = int(step.partition("-")[2])
            sizes[number] = sizes.get(number, 0) + size
    return run, sizes


def _folder(address: str) -> Path:
    digest = hashlib.sha256(address.encode()).hexdigest()[:16]
    return cache_root() / "runs" / digest / RemotePath(address).name


def _fetch_newest(run: Path, address: str) -> bool:
    found = listed(address)
    whole = [name for name in sorted(found, reverse=True) if STATE in found[name]]
    return any(fetch_checkpoint(run, address, f"{FOLDER}/{name}") for name in whole)


def _fetch_wanted(run: Path, address: str, wanted: str) -> bool:
    """Bring the checkpoint or milestone that has certain weights; states are a few kB each."""
    source = RemotePath(address)
    states = [
        path
        for folder in (FOLDER, MILESTONES)
        for path in (source / folder).files()
        if path.name == STATE
    ]
    for path in states:
        try:
            state = parse_state(bytes_at(path) or b"")
        except JsonError:
            continue
        if state.weights_id == wanted:
            name = str(path.relative_to(source)).removesuffix(f"/{STATE}")
            return fetch_checkpoint(run, address, name)
    return False
