"""Keep a dataset's tokenizer, template and view in the run.

`data/` in a run's folder, and in each milestone's, holds `tokenizer/` (the tokenizer's own files),
`template.json`, `view.json`, and `facts.json` with their fingerprints. It is written when the run
starts, and read whenever the run is asked, evaluated or exported.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lapilli.data.dataset.dataset import Dataset
from lapilli.data.dataset.shard_cache import dataset_folder
from lapilli.data.dataset.tokenizer_copy import TOKENIZER, check_copy_files, kept_files, open_copy
from lapilli.data.errors import DataError
from lapilli.data.images.view import ImageSpec
from lapilli.data.io.atomic import sha256_file, write_json
from lapilli.data.io.typed_json import Digest, FilePath, JsonError, from_json
from lapilli.data.io.whole_file import read_whole
from lapilli.data.shards.manifest import (
    Manifest,
    TokenizerFields,
    digest,
    read_manifest,
    template_fingerprint,
)
from lapilli.data.text.templates import Template
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.checkpoint_state import TrainingData
from lapilli.train.run_folder.names import CUT, DATA, DATA_INFO, GONE, TEMPLATE, VIEW
from lapilli.train.run_folder.settings import read_run_config

__all__ = [
    "RunData",
    "check_data",
    "check_same_data",
    "keep_data",
    "other_teachers",
    "read_data",
    "run_data_files",
    "training_data",
]

COMPARED = ("tokenizer", "special_ids", "template", "view")
T = TypeVar("T")


@dataclass(frozen=True)
class DataInfo:
    """`data/facts.json`: `TrainingData` with all of the tokenizer, and the files' SHA-256."""

    tokenizer: TokenizerFields
    special_ids: list[int | None]
    template: str
    template_name: str
    view: dict[str, Any]
    files: dict[FilePath, Digest]
    teachers: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class RunData:
    """The tokenizer, template and view a run was trained with.

    Attributes:
        tokenizer: transformers' tokenizer.
        template: How conversations were written down.
        spec: How images were made square.
    """

    tokenizer: Any
    template: Template
    spec: ImageSpec


def training_data(dataset: Dataset) -> TrainingData:
    """The properties of a dataset that other data for the same model are compared with."""
    return _training_data(dataset.path, dataset.manifest, dataset.view)


def _training_data(path: Path, manifest: Manifest, view: str) -> TrainingData:
    template = manifest.bound_template(path)
    return TrainingData(
        tokenizer=manifest.tokenizer["fingerprint"],
        special_ids=[manifest.tokenizer["bos_id"], manifest.tokenizer["eos_id"]],
        template=template_fingerprint(template),
        template_name=template.name,
        view=manifest.views[view].spec,
        teachers={name: one.identity for name, one in manifest.targets.items() if one.identity},
    )


def check_same_data(here: TrainingData, there: TrainingData, what: str) -> None:
    """Reject data that were prepared differently from a model's training data.

    Args:
        here: The data.
        there: The training data; empty fields are not compared.
        what: The name of the data, which the error starts with.

    Raises:
        TrainError: Names the first property that differs, with both values.
    """
    for name in COMPARED:
        mine, theirs = getattr(here, name), getattr(there, name)
        if theirs and mine != theirs:
            mine, theirs = _shown(here, name), _shown(there, name)
            if mine == theirs:  # templates of one name
                mine, theirs = (f"{mine} (fingerprint {f.template[:12]})" for f in (here, there))
            raise TrainError(
                f"{name}: {what} was made with {mine}, the training data with {theirs}; preprocess "
                "it with the training data's settings"
            )


def other_teachers(here: TrainingData, there: TrainingData, tasks: Iterable[str]) -> list[str]:
    """What differs between the teachers of two datasets, a text each; unknown ones are equal.

    Args:
        here: The data.
        there: What they are compared with.
        tasks: The targets that a model predicts.
    """
    pairs = ((task, here.teachers.get(task), there.teachers.get(task)) for task in tasks)
    return [
        f"targets {task} of {mine}, not of {theirs}"
        for task, mine, theirs in pairs
        if mine and theirs and mine != theirs
    ]


def _shown(data: TrainingData, name: str) -> str:
    """A property for an error message."""
    if name == "template":
        return data.template_name or data.template
    return data.tokenizer[:12] if name == "tokenizer" else str(getattr(data, name))


def keep_data(run: Path, dataset: Path, view: str, *, anew: bool) -> None:
    """Copy tokenizer, template and view into the run's folder, atomically.

    Args:
        run: The run's folder.
        dataset: The dataset's folder.
        view: The view trained on.
        anew: The run starts at step 0: what an earlier try left is replaced. A run that goes on
            keeps what it has, and gets what it lacks.

    Raises:
        DataError: The dataset's tokenizer or template is not what the dataset was made with.
        TrainError: What the run has is not its dataset's, or the folder cannot be written.
    """
    manifest = read_manifest(dataset)
    data = _training_data(dataset, manifest, view)
    if (run / DATA).is_dir() and not anew:
        read_data(run, data)
        return
    open_copy(dataset / TOKENIZER, manifest.tokenizer)
    check_copy_files(dataset, manifest.tokenizer_files)
    template = manifest.bound_template(dataset)
    temporary, gone = (run / f".{DATA}{end}" for end in (CUT, GONE))
    for leftover in (temporary, gone):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        (temporary / TOKENIZER).mkdir(parents=True)
        for file in _tokenizer_files(dataset, manifest):
            shutil.copyfile(file, temporary / TOKENIZER / file.name)
        write_json(temporary / TEMPLATE, asdict(template))
        write_json(temporary / VIEW, data.view)
        files = {path: sha256_file(temporary / path) for path in sorted(_files(temporary))}
        kept = {**asdict(data), "tokenizer": manifest.tokenizer, "files": files}
        write_json(temporary / DATA_INFO, kept)
        if (run / DATA).exists():
            (run / DATA).rename(gone)
        temporary.rename(run / DATA)
    except OSError as error:
        raise TrainError(
            f"{run / DATA}: cannot be written ({error}); free space, and run the same again"
        ) from None
    finally:
        for leftover in (temporary, gone):
            shutil.rmtree(leftover, ignore_errors=True)


def _tokenizer_files(dataset: Path, manifest: Manifest) -> list[Path]:
    """The tokenizer's files to copy: those in the manifest, with their SHA-256.

    Of one from before manifests had them, no link: it may lead to any file of this machine.
    """
    if manifest.tokenizer_files:
        return [dataset / facts.path for facts in manifest.tokenizer_files]
    return [path for path in kept_files(dataset / TOKENIZER) if not path.is_symlink()]


def run_data_files(run: Path) -> list[str]:
    """Paths below the run's folder of its `data`; empty before the run starts."""
    names = sorted(_files(run / DATA), key=lambda name: (name == DATA_INFO, name))  # that one last
    return [f"{DATA}/{name}" for name in names]


def _files(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            yield path.relative_to(folder).as_posix()


def read_data(run: Path, trained: TrainingData) -> RunData:
    """Read the data of a run, or of a milestone copied anywhere.

    A run that was started before runs kept anything is read from its dataset.

    Args:
        run: The folder.
        trained: Of its checkpoint: what must be found; empty fields are not compared.

    Raises:
        TrainError, DataError: A file that is missing or not what it was; names it.
    """
    folder = run / DATA
    if not folder.is_dir():
        return _of_dataset(run, trained)
    remedy = (
        f"bring {folder} back from a copy of the run, or remove it and run the same train again "
        "with the run's dataset, which writes it again"
    )
    kept = _read(folder / DATA_INFO, DataInfo, remedy)
    template = _read(folder / TEMPLATE, Template, remedy)
    spec = _read(folder / VIEW, ImageSpec, remedy)
    found = TrainingData(
        tokenizer=kept.tokenizer["fingerprint"],
        special_ids=[kept.tokenizer["bos_id"], kept.tokenizer["eos_id"]],
        template=template_fingerprint(template),
        view=json.loads(json.dumps(spec.facts())),
    )
    files = {"template": TEMPLATE, "view": VIEW, "tokenizer": DATA_INFO, "special_ids": DATA_INFO}
    for name, file in files.items():
        expected, here = getattr(trained, name), getattr(found, name)
        if expected and digest(here) != digest(expected):
            was, now = _fingerprint(expected), _fingerprint(here)
            raise TrainError(
                f"{folder / file}: not the {name.replace('_', ' ')} that the run was trained with "
                f"(fingerprint was {was}, is {now}); {remedy}"
            )
    _check_files(folder, kept.files, remedy)
    return RunData(open_copy(folder / TOKENIZER, kept.tokenizer, remedy), template, spec)


def check_data(run: Path, trained: TrainingData) -> None:
    """Compare a run's data with its checkpoint; runs of earlier versions have none.

    Raises:
        TrainError, DataError: A file that is missing or not what it was; names it.
    """
    if (run / DATA).is_dir():
        read_data(run, trained)


def _fingerprint(value: Any) -> str:
    is_digest = isinstance(value, str) and len(value) == 64
    return (value if is_digest else digest(value))[:12]


def _check_files(folder: Path, files: Mapping[str, str], remedy: str) -> None:
    """Compare the tokenizer's files byte for byte, settings included."""
    found = {name for name in _files(folder) if name.startswith(f"{TOKENIZER}/")}
    expected = {name for name in files if name.startswith(f"{TOKENIZER}/")}
    for name in sorted(expected | found):
        was = files.get(name, "none")
        now = sha256_file(folder / name) if name in found else "none"
        if was != now:
            raise TrainError(
                f"{folder / name}: changed since the run was trained (SHA-256 was {was[:12]}, is "
                f"{now[:12]}); {remedy}"
            )


def _of_dataset(run: Path, trained: TrainingData) -> RunData:
    """Read the data from the dataset that the run's settings name."""
    lacks = f"{run}: keeps no template, view and tokenizer (no {DATA}/)"
    config = read_run_config(run)
    try:
        dataset = dataset_folder(config.dataset)
        manifest = read_manifest(dataset)
        if config.view not in manifest.views:
            raise DataError(f"{dataset} has no view {config.view}")
        check_same_data(_training_data(dataset, manifest, config.view), trained, str(dataset))
        spec = ImageSpec.of(manifest.views[config.view].spec)
        tokenizer = open_copy(dataset / TOKENIZER, manifest.tokenizer)
        return RunData(tokenizer, manifest.bound_template(dataset), spec)
    except (DataError, TrainError) as error:
        raise TrainError(
            f"{lacks}, and cannot be read from its dataset: {error}; bring the dataset back and "
            "run the same train again, which keeps them"
        ) from None


def _read(path: Path, kind: type[T], remedy: str) -> T:
    try:
        return from_json(read_whole(path), kind)
    except OSError as error:
        raise TrainError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except JsonError as error:
        raise TrainError(f"{path}: damaged ({error}); {remedy}") from None
