"""Export a dataset's records and original images as WebDataset tars.

A tar holds samples `KEY.json` with `KEY.jpg`, or `KEY.0.jpg`, `KEY.1.png`, ... of several images.
The json is OpenAI's form: `{id, source, messages}`, each image in its place under the name of its
member. A split's tars are an epoch of it, in the dataset's order; their bytes follow from the
dataset alone.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from lapilli.data.config import BuildConfig
from lapilli.data.errors import DataError
from lapilli.data.images.view import BadImage
from lapilli.data.io.access import cannot_read, exists, is_denied, is_folder
from lapilli.data.io.atomic import write_atomic, write_json
from lapilli.data.io.remote_path import Output
from lapilli.data.io.typed_json import JsonError, from_json
from lapilli.data.io.whole_file import read_whole
from lapilli.data.io.writer_lock import LOCK, only_writer
from lapilli.data.mounts import EXTENSIONS, Located, read_image
from lapilli.data.planning.located_entries import locate_images, open_mount
from lapilli.data.record import ImagePart, Record
from lapilli.data.shards.checks import open_selection
from lapilli.data.shards.manifest import read_manifest
from lapilli.data.shards.schemas import HELD_OUT, TRAIN
from lapilli.data.sources.validation import read_entries
from lapilli.data.text.encode import llava_length

__all__ = ["ExportReport", "export_webdataset"]

EXPORT = "export.json"  # written first: whose export a folder is, finished or not
# The extension by what a file is, not by its name: a GIF called .jpg is a GIF.
FORMATS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2", "SUN": "ras"}
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ExportReport:
    """What was written: samples by split, tars made now and tars that were there."""

    samples: dict[str, int]
    built: int
    reused: int


@dataclass(frozen=True)
class _Sample:
    record: Record
    places: tuple[Located, ...]


def export_webdataset(
    dataset: Output,
    config: BuildConfig,
    output: Output,
    *,
    samples_per_tar: int,
    on_progress: Progress = lambda done, total: None,
) -> ExportReport:
    """Write `train-000000.tar`, ..., `held_out-000000.tar`, ...; a tar that is there is kept.

    Args:
        dataset: Folder or address of a dataset.
        config: Its settings, with the `root` where annotations and images lie now.
        output: Folder or address for the tars, new or of the same export.
        samples_per_tar: Samples in a tar, the last of a split has fewer.
        on_progress: Called with samples done and in all.

    Raises:
        DataError: No dataset, another export in `output` or somebody who writes there, sources that
            have changed since the dataset was built, an image that cannot be read, or a full disk.
    """
    if samples_per_tar < 1:
        raise DataError(f"samples_per_tar: {samples_per_tar}; expected at least 1")
    with only_writer(output, "written", beside=isinstance(output, Path)):
        return _export(dataset, config, output, samples_per_tar, on_progress)


def _export(
    dataset: Output,
    config: BuildConfig,
    output: Output,
    samples_per_tar: int,
    on_progress: Progress,
) -> ExportReport:
    manifest = read_manifest(dataset)
    table = open_selection(dataset, manifest)
    facts = {"dataset": manifest.fingerprint, "samples_per_tar": samples_per_tar}
    _check_output(output, facts)
    write_json(output / EXPORT, facts)
    writers = {
        split: _SplitWriter(output, split, samples_per_tar, Path(config.root))
        for split in (TRAIN, HELD_OUT)
    }
    total = int(table["repeats"].to_numpy().sum())
    done = 0
    for row, sample in _samples(table, config):
        writer = writers[table["split"][row].as_py()]
        for _ in range(table["repeats"][row].as_py()):
            writer.add(sample)
            done += 1
        on_progress(done, total)
    for writer in writers.values():
        writer.flush()
    return ExportReport(
        {split: writer.samples for split, writer in writers.items()},
        sum(writer.built for writer in writers.values()),
        sum(writer.reused for writer in writers.values()),
    )


def _check_output(output: Output, facts: dict[str, Any]) -> None:
    """The output is new or of the same export."""
    if not exists(output):
        return
    if is_folder(output) and all(path.name == LOCK for path in output.iterdir()):
        return
    try:
        before = from_json(read_whole(output / EXPORT), dict[str, Any])
    except (OSError, JsonError) as error:
        if is_denied(error):
            raise DataError(cannot_read(output / EXPORT, error)) from None
        raise DataError(f"output: {output} is not empty and no export; choose another") from None
    if before != facts:
        raise DataError(
            f"output: {output} holds the export of another dataset or with another "
            "samples_per_tar; choose another --output or remove this folder"
        )


def _samples(table: pa.Table, config: BuildConfig) -> Iterator[tuple[int, _Sample]]:
    """The selected records with their rows: a dataset keeps the order its sources have."""
    names: pa.ChunkedArray = table["sample_id"]
    lengths = table["llava_length"].to_numpy()
    root = Path(config.root)
    row = 0
    for source in config.sources:
        mount = open_mount(source, config, root)
        for entry in read_entries(source, root):
            if row == len(names) or entry.sample_id != names[row].as_py():
                continue
            checked, places = locate_images(entry, mount)
            if checked.record is None or llava_length(checked.record) != int(lengths[row]):
                raise _changed(names[row].as_py())
            if not checked.verdict.kept:
                raise _image_gone(checked.verdict.detail, root)
            yield row, _Sample(checked.record, places)
            row += 1
    if row < len(names):
        raise _changed(names[row].as_py())


def _changed(sample_id: str) -> DataError:
    return DataError(
        f"record {sample_id} of the dataset is not in its sources any more, or has another text; "
        "preprocess again, or give the --root of the data it was made of"
    )


class _SplitWriter:
    """Collects samples until they fill a tar; a tar that is finished already is passed over."""

    def __init__(self, output: Output, split: str, samples_per_tar: int, root: Path) -> None:
        self._output, self._split, self._size, self._root = output, split, samples_per_tar, root
        self._waiting: list[_Sample] = []
        self.samples = self.built = self.reused = 0

    def add(self, sample: _Sample) -> None:
        self._waiting.append(sample)
        if len(self._waiting) == self._size:
            self.flush()

    def flush(self) -> None:
        """Write what waits, if anything does."""
        if not self._waiting:
            return
        samples, self._waiting = self._waiting, []
        first = self.samples
        self.samples += len(samples)
        path = self._output / f"{self._split}-{first // self._size:06d}.tar"
        if exists(path):
            self.reused += 1
            return
        write_atomic(path, lambda temporary: _write_tar(temporary, samples, first, self._root))
        self.built += 1


def _write_tar(path: Path, samples: Sequence[_Sample], first: int, root: Path) -> None:
    from webdataset.writer import TarWriter  # imports torch

    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for number, sample in enumerate(samples, start=first):
            tar.write(_members(f"{number:09d}", sample, root))


def _members(key: str, sample: _Sample, root: Path) -> dict[str, Any]:
    """A sample as the webdataset library takes it: `__key__`, and bytes by extension."""
    members: dict[str, Any] = {"__key__": key}
    names: list[str] = []
    for number, place in enumerate(sample.places):
        try:
            data = read_image(root, place)
        except BadImage as bad:
            raise _image_gone(f"{place.image_id}: {bad.detail}", root) from None
        prefix = f"{number}." if len(sample.places) > 1 else ""
        extension = f"{prefix}{_extension(data, place.image_id)}"
        members[extension] = data
        names.append(f"{key}.{extension}")
    members["json"] = json.dumps(_message_form(sample.record, names), ensure_ascii=False).encode()
    return members


def _message_form(record: Record, names: Sequence[str]) -> dict[str, Any]:
    """A record as messages: content in parts, so that `<image>` in a text stays text."""
    messages: list[dict[str, Any]] = []
    for turn in record.turns:
        content = [
            {"type": "image_url", "image_url": {"url": names[part.index]}}
            if isinstance(part, ImagePart)
            else {"type": "text", "text": part.text}
            for part in turn.parts
        ]
        weight = {} if turn.trains else {"weight": 0}
        thinking = {"reasoning_content": turn.thinking} if turn.thinking else {}
        messages.append({"role": turn.role, "content": content, **weight, **thinking})
    return {"id": record.record_id, "source": record.source, "messages": messages}


def _image_gone(detail: str, root: Path) -> DataError:
    return DataError(
        f"image {detail}; below {root}: give the --root of the data the dataset was made of"
    )


def _extension(data: bytes, image_id: str) -> str:
    """The extension of an image's format; one that reading the tars again knows."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            found = image.format or ""
    except (UnidentifiedImageError, OSError, ValueError):
        found = ""
    extension = FORMATS.get(found, found.lower())
    if f".{extension}" not in EXTENSIONS:
        raise DataError(
            f"image {image_id} is of format {found or 'unknown'}, which has no extension in a tar; "
            "convert it to PNG and preprocess again, or leave its records out (`exclude`)"
        )
    return extension
