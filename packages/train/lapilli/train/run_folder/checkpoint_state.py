"""`state.json` of a checkpoint: its step, its files with checksums, and what it was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lapilli.data.io.typed_json import Digest, FilePath, Natural, as_type, from_json
from lapilli.data.io.whole_file import read_whole
from lapilli.train.config import RunConfig
from lapilli.train.run_folder.names import STATE, WEIGHTS
from lapilli.train.run_folder.settings import settings_of

__all__ = [
    "LAYOUT",
    "CheckpointFile",
    "CheckpointState",
    "TrainingData",
    "parse_state",
    "read_state",
    "write_state",
]

LAYOUT = 2  # parts by worker; 1 had all weights in one file and all moments in another


@dataclass(frozen=True)
class CheckpointFile:
    """Size and SHA-256 of a checkpoint's file."""

    bytes: Natural
    sha256: Digest


@dataclass(frozen=True)
class TrainingData:
    """The properties of a dataset that other data for the same model are compared with.

    An empty field is not known: an earlier version, or another project, did not write it.

    Attributes:
        tokenizer: The tokenizer's fingerprint.
        special_ids: The ids that begin and end a text.
        template: Fingerprint of the template's content.
        template_name: Its name.
        view: The fields of the view's `ImageSpec`.
        teachers: By name of a dataset's targets, `TargetFacts.identity`; not compared where a
            model predicts nothing.
    """

    tokenizer: str = ""
    special_ids: list[int | None] = field(default_factory=list[int | None])
    template: str = ""
    template_name: str = ""
    view: dict[str, Any] = field(default_factory=dict[str, Any])
    teachers: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """What a checkpoint's `state.json` says. Fields an earlier version lacks are empty.

    Attributes:
        step: Optimizer steps taken.
        start: SHA-256 of the weights the run was initialized from; empty for none.
        dataset: The dataset's fingerprint.
        data: Its properties.
        frozen: Fingerprints of the frozen weights, in the form of the version that wrote them
            (`lapilli.train.checkpoint.frozen`).
        config: The run's settings as written, maybe under earlier names; see `settings`.
        versions: Installed libraries.
        loss_scale: The state of fp16's loss scaling.
        layout: How its files are laid out; 1 where an earlier version wrote it.
        shapes: Shape of each parameter that learns, by name; of layout 1 its file tells them.
        weights: What the weights are known by: the same for a checkpoint and its step's milestone.
        files: The checkpoint's files.
    """

    step: Natural = 0
    start: str = ""
    dataset: str = ""
    data: TrainingData = field(default_factory=TrainingData)
    frozen: Any = None
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    versions: dict[str, str] = field(default_factory=dict[str, str])
    loss_scale: dict[str, float] = field(default_factory=dict[str, float])
    layout: Natural = 1
    shapes: dict[str, list[Natural]] = field(default_factory=dict[str, list[Natural]])
    weights: str = ""
    files: dict[FilePath, CheckpointFile]

    @property
    def weights_id(self) -> str:
        """What the weights are known by to the runs that start from them."""
        file = self.files.get(WEIGHTS)
        return self.weights or (file.sha256 if file else "")

    def settings(self, where: object) -> RunConfig:
        """The run's settings.

        Args:
            where: The file, for an error.

        Raises:
            TrainError: They are missing or invalid.
        """
        return settings_of(self.config, where)


NAMES = {one.name for one in fields(CheckpointState)}
DATA_NAMES = {one.name for one in fields(TrainingData)}


def read_state(folder: Path) -> CheckpointState:
    """Read a checkpoint's `state.json`; fields that a later version added are left out.

    Raises:
        OSError: It cannot be read.
        JsonError: It is damaged; names the field.
    """
    return parse_state(read_whole(folder / STATE))


def parse_state(text: bytes) -> CheckpointState:
    """A checkpoint's state from the bytes of its `state.json`.

    Raises:
        JsonError: It is damaged; names the field.
    """
    found = from_json(text, dict[str, Any])
    data: object = found.get("data")
    if isinstance(data, dict):
        found["data"] = _known(as_type(data, dict[str, Any], "data"), DATA_NAMES)
    return as_type(_known(found, NAMES), CheckpointState)


def write_state(state: CheckpointState, folder: Path) -> None:
    """Write a checkpoint's `state.json`."""
    content = {
        name: value for name, value in asdict(state).items() if name != "loss_scale" or value
    }
    content["data"] = {name: value for name, value in content["data"].items() if value}
    (folder / STATE).write_text(json.dumps(content, indent=1), encoding="utf-8")


def _known(found: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name in names}
