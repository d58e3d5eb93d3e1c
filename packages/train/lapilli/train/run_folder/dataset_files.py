"""Keep a dataset's tokenizer, template and view in the run.

`data/` in a run's folder, and in each milestone's, holds `tokenizer/` (the tokenizer's own files),
`template.json`, `view.json`, and `facts.json` with their fingerprints. It is written when the run
starts, and read whenever the run is asked, evaluated or exported.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from lapilli.data.dataset.dataset import Dataset
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
from lapilli.train.run_folder.names import CUT, DATA, GONE
from lapilli.train.run_folder.settings import read_run_config

__all__ = [
    "RunData", "check_data", "check_same_data", "data_facts", "keep_data", "read_data",
    "run_data_files",
]  # fmt: skip

TEMPLATE, VIEW, FACTS = "template.json", "view.json", "facts.json"
T = TypeVar("T")


class Kept(TypedDict):
    """`data/facts.json`."""

    tokenizer: TokenizerFields
    special_ids: list[int | None]
    template: str
    template_name: str
    view: dict[str, Any]
    files: dict[FilePath, Digest]


@dataclass(frozen=True)
class RunData:
    """What a run's training data were like.

    Attributes:
        tokenizer: transformers' tokenizer.
        template: How conversations were written down.
        spec: How images were made square.
    """

    tokenizer: Any
    template: Template
    spec: ImageSpec


def data_facts(dataset: Dataset) -> dict[str, Any]:
    """What a checkpoint says of its data, and other data for the same model are compared with.

    Returns:
        Fingerprints of `tokenizer` and `template` (of its content, whatever its name),
        `template_name`, `special_ids` (which ids begin and end a text) and the fields of `view`.
    """
    return _facts(dataset.path, dataset.manifest, dataset.view)


def _facts(path: Path, manifest: Manifest, view: str) -> dict[str, Any]:
    template = manifest.bound_template(path)
    return {
        "tokenizer": manifest.tokenizer["fingerprint"],
        "special_ids": [manifest.tokenizer["bos_id"], manifest.tokenizer["eos_id"]],
        "template": template_fingerprint(template),
        "template_name": template.name,
        "view": manifest.views[view].spec,
    }


def check_same_data(here: Mapping[str, Any], there: Mapping[str, Any], what: str) -> None:
    """Refuse data made otherwise than those that a model was trained on.

    Args:
        here: `data_facts` of the data.
        there: Those of the training data.
        what: What the data are, as an error begins.

    Raises:
        TrainError: Names the first fact that differs, with both values.
    """
    for name in ("tokenizer", "special_ids", "template", "view"):
        if name in there and here[name] != there[name]:
            mine, theirs = (_told(facts, name) for facts in (here, there))
            if mine == theirs:  # templates of one name
                mine, theirs = (f"{mine} (fingerprint {f[name][:12]})" for f in (here, there))
            raise TrainError(
                f"{name}: {what} was made with {mine}, the training data with {theirs}; preprocess "
                "it with the training data's settings"
            )


def _told(facts: Mapping[str, Any], name: str) -> str:
    """A fact in few words."""
    if name == "template":
        return str(facts.get("template_name", facts[name]))
    return str(facts[name])[:12] if name == "tokenizer" else str(facts[name])


def keep_data(run: Path, dataset: Path, view: str, *, anew: bool) -> None:
    """Put what a run needs of its dataset into its folder, whole or not at all.

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
    facts = _facts(dataset, manifest, view)
    if (run / DATA).is_dir() and not anew:
        read_data(run, facts)
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
        write_json(temporary / VIEW, facts["view"])
        files = {path: sha256_file(temporary / path) for path in sorted(_files(temporary))}
        kept = {**facts, "tokenizer": manifest.tokenizer, "files": files}
        write_json(temporary / FACTS, kept)
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
    """What is copied of a dataset's tokenizer: the files that its manifest knows by their SHA-256.

    Of one from before manifests had them, no link: it may lead to any file of this machine.
    """
    if manifest.tokenizer_files:
        return [dataset / facts.path for facts in manifest.tokenizer_files]
    return [path for path in kept_files(dataset / TOKENIZER) if not path.is_symlink()]


def run_data_files(run: Path) -> list[str]:
    """The files that a run keeps of its dataset, relative to its folder; none before it starts."""
    names = sorted(_files(run / DATA), key=lambda name: (name == FACTS, name))  # that one last
    return [f"{DATA}/{name}" for name in names]


def _files(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            yield path.relative_to(folder).as_posix()


def read_data(run: Path, facts: Mapping[str, Any]) -> RunData:
    """What a run, or a milestone wherever it was copied to, keeps of its dataset.

    A run that was started before runs kept anything is read from its dataset.

    Args:
        run: The folder.
        facts: `data` of its checkpoint: what must be found.

    Raises:
        TrainError, DataError: A file that is missing or not what it was; names it.
    """
    folder = run / DATA
    if not folder.is_dir():
        return _of_dataset(run, facts)
    remedy = (
        f"bring {folder} back from a copy of the run, or remove it and run the same train again "
        "with the run's dataset, which writes it anew"
    )
    kept = _read(folder / FACTS, Kept, remedy)
    template = _read(folder / TEMPLATE, Template, remedy)
    spec = _read(folder / VIEW, ImageSpec, remedy)
    tokenizer_facts, files = kept["tokenizer"], kept["files"]
    found = {
        **kept, "tokenizer": tokenizer_facts["fingerprint"],
        "view": json.loads(json.dumps(spec.facts())),
        "special_ids": [tokenizer_facts["bos_id"], tokenizer_facts["eos_id"]],
        "template": template_fingerprint(template),
    }  # fmt: skip
    sources = {"template": TEMPLATE, "view": VIEW, "tokenizer": FACTS, "special_ids": FACTS}
    for name, file in sources.items():
        if name in facts and digest(found[name]) != digest(facts[name]):
            was, now = (_fingerprint(values[name]) for values in (facts, found))
            raise TrainError(
                f"{folder / file}: not the {name.replace('_', ' ')} that the run was trained with "
                f"(fingerprint was {was}, is {now}); {remedy}"
            )
    _check_files(folder, files, remedy)
    return RunData(open_copy(folder / TOKENIZER, tokenizer_facts, remedy), template, spec)


def check_data(run: Path, facts: Mapping[str, Any]) -> None:
    """Compare what a run keeps with what it was; one from before runs kept anything has nothing.

    Raises:
        TrainError, DataError: A file that is missing or not what it was; names it.
    """
    if (run / DATA).is_dir():
        read_data(run, facts)


def _fingerprint(value: Any) -> str:
    is_digest = isinstance(value, str) and len(value) == 64
    return (value if is_digest else digest(value))[:12]


def _check_files(folder: Path, files: Mapping[str, str], remedy: str) -> None:
    """The tokenizer's files, byte for byte: its settings take part in what it writes and reads."""
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


def _of_dataset(run: Path, facts: Mapping[str, Any]) -> RunData:
    """The same from the dataset that a run's settings name."""
    lacks = f"{run}: keeps no template, view and tokenizer (no {DATA}/)"
    config = read_run_config(run)
    dataset = Path(config.dataset)
    try:
        manifest = read_manifest(dataset)
        if config.view not in manifest.views:
            raise DataError(f"{dataset} has no view {config.view}")
        check_same_data(_facts(dataset, manifest, config.view), facts, str(dataset))
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
