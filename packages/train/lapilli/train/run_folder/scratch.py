"""A run whose output is an address: each node keeps what it needs in a folder of its own.

The store at the address is the run. A node's scratch folder has the name of the address and a
digest of it, below `$LAPILLI_SCRATCH`, by default a folder of the user's in the system's temporary
folder; nothing that one node writes there is assumed to be seen by another.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from lapilli.data.io.filesystems import is_remote
from lapilli.train.config import RunConfig
from lapilli.train.errors import TrainError

__all__ = ["SCRATCH", "in_scratch", "lies_in_store", "of_store"]

SCRATCH = "LAPILLI_SCRATCH"


def in_scratch(config: RunConfig) -> RunConfig:
    """The settings on this node: an address as `output` is the store, a scratch folder the output.

    Raises:
        TrainError: `checkpoint.upload` names another store.
    """
    if not is_remote(config.output):
        return config
    address = config.output.rstrip("/")
    upload = config.checkpoint.upload.rstrip("/")
    if upload not in ("", address):
        raise TrainError(
            f"checkpoint.upload: {upload}; output is an address ({address}), which checkpoints go "
            "to; leave upload out"
        )
    return replace(
        config,
        output=str(_folder(address)),
        checkpoint=replace(config.checkpoint, upload=address),
    )


def of_store(config: RunConfig) -> RunConfig:
    """The settings for other nodes, each with a scratch folder of its own; undoes `in_scratch`."""
    if not lies_in_store(config):
        return config
    return replace(config, output=config.checkpoint.upload)


def lies_in_store(config: RunConfig) -> bool:
    """Whether the run's folder is this node's scratch, and its store the run."""
    address = config.checkpoint.upload
    return bool(address) and Path(config.output) == _folder(address)


def _folder(address: str) -> Path:
    own = Path(tempfile.gettempdir()) / f"lapilli-{os.getuid()}"
    root = Path(os.environ.get(SCRATCH) or own).absolute()
    name = f"{address.rpartition('/')[2]}-{hashlib.sha256(address.encode()).hexdigest()[:12]}"
    return root / "runs" / name
