"""Look at somebody's annotation file or folder, and write the recipe that reads it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from lapilli.data.config import SourceConfig
from lapilli.data.errors import DataError
from lapilli.data.mounts import EXTENSIONS
from lapilli.data.record import Record, excerpt
from lapilli.data.sources.validation import plain_rules, read_entries

__all__ = ["Guess", "guess_source", "recipe_text"]

LOOKED_AT = 200  # records
CONVERSATIONS = ("llava", "messages", "texts")
TABLES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".tar": "webdataset"}
JSON = frozenset({".json", ".jsonl", ".ndjson"})
PACKED = frozenset({".gz", ".zst", ".xz"})
WITHOUT_PROMPT = ("csv", "text_files", "webdataset", "parquet")
PROMPTS = ("Describe the image.", "What is in the picture?")


@dataclass(frozen=True)
class Guess:
    """A source that reads the user's data.

    Attributes:
        root: The folder that its paths are relative to.
        source: The settings.
        looked_at: Records that were read.
        good: Of these, records that the format reads.
        images: Image keys of these.
        found: Of these, keys that are files below `source.images`.
    """

    root: Path
    source: SourceConfig
    looked_at: int
    good: int
    images: int
    found: int


def guess_source(place: Path) -> Guess:
    """The format of a file or folder, and where its images are, by its first records.

    Raises:
        DataError: Nothing there can be read; says what was tried.
    """
    if place.is_dir():
        place = _in_folder(place)
    root = place.parent if "*" not in place.name else _above(place)
    annotations = place.relative_to(root).as_posix()
    name = _source_name(place)
    tries = [_tried(root, name, annotations, kind) for kind in _formats(place)]
    best = max(tries, key=lambda guess: guess.good)
    if not best.good:
        kinds = ", ".join(guess.source.format for guess in tries)
        raise DataError(
            f"{place}: none of its first {best.looked_at} records can be read as {kinds}; "
            "packages/data/lapilli/data/sources/FORMATS.md lists the formats"
        )
    return best


def _above(pattern: Path) -> Path:
    """The folder of a glob's first part."""
    return next(folder for folder in pattern.parents if "*" not in str(folder))


def _source_name(place: Path) -> str:
    stem = place.name.partition(".")[0] if "*" not in place.name else _above(place).name
    name = "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "_" for c in stem)
    return name.strip("_") or "own"


def _in_folder(folder: Path) -> Path:
    """The one annotation file of a folder, its tars, or the texts beside its images."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    able = [path for path in files if _kind(path) and _kind(path) != "webdataset"]
    tars = [path for path in files if path.suffix == ".tar"]
    if len(able) == 1 and not tars:
        return able[0]
    if tars and not able:
        return folder / "*.tar"
    if able:
        names = ", ".join(path.name for path in [*able, *tars][:8])
        raise DataError(f"{folder} holds several annotation files ({names}); give one of them")
    if next(folder.rglob("*.txt"), None) and next(_image_files(folder), None):
        return folder / "**" / "*.txt"
    raise DataError(
        f"{folder} holds no annotation file; expected {', '.join(sorted(JSON | {*TABLES}))}, or "
        "images with a text file beside each"
    )


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in PACKED]
    last = suffixes[-1] if suffixes else ""
    return "json" if last in JSON else TABLES.get(last, "")


def _formats(place: Path) -> Sequence[str]:
    if place.suffix == ".txt":
        return ["text_files"]
    kind = _kind(place)
    return CONVERSATIONS if kind in ("json", "") else [kind]


def _tried(root: Path, name: str, annotations: str, kind: str) -> Guess:
    prompts = [*PROMPTS] if kind in WITHOUT_PROMPT else []
    source = SourceConfig(name=name, annotations=annotations, format=kind, prompts=prompts)
    entries = list(islice(read_entries(source, root, plain_rules), LOOKED_AT))
    records = [entry.record for entry in entries if entry.record is not None and entry.verdict.kept]
    keys = [key for record in records for key in record.images]
    images, prefix, found = _images_folder(root, keys)
    placed = SourceConfig(
        name=name, annotations=annotations, format=kind, prompts=_needed(prompts, records),
        images=images, path_prefix=prefix,
    )  # fmt: skip
    return Guess(
        root=root, source=placed, looked_at=len(entries), good=len(records), images=len(keys),
        found=found,
    )  # fmt: skip


def _needed(prompts: list[str], records: Sequence[Record]) -> list[str]:
    """Prompts, where any record's question is one of them."""
    texts = {
        turn.text.replace("<image>", "").strip() for record in records for turn in record.turns
    }
    return prompts if texts & {*prompts} else []


def _images_folder(root: Path, keys: Sequence[str]) -> tuple[str, str, int]:
    """The folder below the root in which most keys are files, and what to take off the keys."""
    if not keys:
        return ".", "", 0
    folders = [".", *_folders_below(root)]
    hits = Counter(
        {folder: sum(_is_there(root / folder, key) for key in keys) for folder in folders}
    )
    best, found = max(hits.items(), key=lambda item: (item[1], -folders.index(item[0])))
    if found:
        return best, "", found
    for prefix in _prefixes(keys[0]):
        for folder in folders:
            cut = [key.removeprefix(prefix) for key in keys]
            if count := sum(_is_there(root / folder, key) for key in cut):
                return folder, prefix, count
    return ".", "", 0


def _is_there(folder: Path, key: str) -> bool:
    """Whether a key is a file below a folder, or a member of an archive that is there."""
    for suffix in (".tar", ".parquet"):
        container, inside, _ = key.partition(f"{suffix}/")
        key = container + suffix if inside else key
    if key.startswith("/") or ".." in key.split("/"):
        return False
    try:
        return (folder / key).is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _prefixes(key: str) -> Iterator[str]:
    """The folders that a key begins with, the longest first."""
    parts = key.replace("\\", "/").split("/")
    for count in range(len(parts) - 1, 0, -1):
        yield "/".join(parts[:count]) + "/"


def _folders_below(root: Path) -> list[str]:
    """Folders up to two levels below the root, by name; no file is looked at."""
    found: list[str] = []
    for first in _subfolders(root):
        found += [first, *(f"{first}/{second}" for second in _subfolders(root / first))]
    return found


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _image_files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)


def recipe_text(guess: Guess, command: str) -> str:
    """A recipe for `preprocess` with a comment a line, as YAML."""
    source = guess.source
    lines = [
        f"# Written by `{excerpt(command)}`, by its first {LOOKED_AT} records.",
        f"# Change first: {'prompts, ' if source.prompts else ''}held_out, and with another model "
        "than LLaVA-1.5 template and views.",
        "template: v1  # the conversation format that the language model was tuned with",
        "# tokenizer: lmsys/vicuna-7b-v1.5   the language model's; or preprocess --tokenizer",
        "sources:",
        f"  - name: {source.name}  # in reports, and the first half of sample ids",
        f"    annotations: {_quoted(source.annotations)}  # below the --root of preprocess",
        f"    format: {source.format}",
        f"    images: {_quoted(source.images)}  # the folder in which image paths start",
    ]
    if source.path_prefix:
        lines.append(f"    path_prefix: {_quoted(source.path_prefix)}  # taken off image paths")
    if source.prompts:
        lines.append("    prompts:  # one is drawn as the question of each caption")
        lines += [f"      - {_quoted(prompt)}" for prompt in source.prompts]
    lines += [
        "views:",
        "  clip336_pad: {size: 336, fill: mean, tower: clip, aspect: pad}  # of the tower",
        "mixture:",
        "  held_out: 0.05  # kept apart for evaluation, drawn by image",
    ]
    return "\n".join(lines) + "\n"


def _quoted(value: str | list[str]) -> str:
    text = value if isinstance(value, str) else value[0]
    return "'" + text.replace("'", "''") + "'"
