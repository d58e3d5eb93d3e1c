"""Check every record and image of a mixture before anything is converted.

lapilli check photos.json
lapilli check --root playground/data

The first inspects your own file or folder and writes a recipe for it. Without --config the second
finds which of LLaVA's published annotation files are in the root.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Any

import pyarrow.parquet as pq

from lapilli.data.config import BuildConfig, SourceConfig
from lapilli.data.errors import DataError
from lapilli.data.images.codecs import resolve_codecs
from lapilli.data.images.view import BadImage, ImageSpec, Note, decode, square
from lapilli.data.io.access import is_folder, require_writable
from lapilli.data.io.addresses import plain_address
from lapilli.data.io.atomic import write_atomic, write_text
from lapilli.data.io.filesystems import is_remote
from lapilli.data.io.printable import bytes_text
from lapilli.data.io.writer_lock import only_writer
from lapilli.data.mounts import Located, read_image
from lapilli.data.mounts.published import ANNOTATIONS
from lapilli.data.planning.decode_check import verify_images
from lapilli.data.planning.mixture import num_held_out
from lapilli.data.planning.rules import record_rules
from lapilli.data.planning.scan import Survey, survey
from lapilli.data.planning.selection import quarantine_table
from lapilli.data.record import Entry, Verdict, excerpt
from lapilli.data.sources.root_address import with_root_address
from lapilli.data.sources.tally import Tally, describe_tally
from lapilli.data.sources.validation import Rules, plain_rules
from lapilli.data.text.encode import bind_template, load_tokenizer
from lapilli.data.text.templates import get_template
from pipelines.cli.command import UsageError, first_as, parse, progress_bar, run, say, say_title
from pipelines.cli.own_data import guess_source, recipe_text
from pipelines.cli.views import filled_views
from pipelines.reports.dataset_report import IMAGE_NOTES

__all__ = ["CheckConfig", "check", "main"]

RECIPES = Path(__file__).parent / "recipes" / "llava15"
PUBLISHED = ("pretrain_data.yaml", "finetune_data.yaml")
# Folders below the root that people keep an annotation file in, as its dataset is called.
FOLDERS = ("", "LLaVA-Pretrain", "LLaVA-Instruct-150K", "LLaVA-Tuning")
PROBE = 48  # images whose making is timed for the estimate
NAMED = 3  # names shown of a known hole
ROWS = 5000  # quarantine rows written at once


@dataclass(frozen=True)
class CheckConfig(BuildConfig):
    """A recipe for `preprocess`, of which only the sources, views and folders are looked at.

    Attributes:
        data: An annotation file, or a folder with one, to write a recipe for and check.
        recipe: Where that recipe is written; left out, NAME_data.yaml in the working folder.
        root: Folder that holds annotations and images.
        output: Parquet file to write the records with a problem to; none if left out.
        sources: The annotation files; without any, LLaVA's published files in the root.
        tokenizer: Loaded for a chat template only, as `template: tokenizer` is.
        template: Names the template that must be able to write every record; none if left out.
        views: How images are made square; decides which are too large and the disk needed.
        decode: Decode every image, on `workers` cores, instead of only finding it.
    """

    data: str = ""
    recipe: str = ""
    root: str = ""
    output: str = ""
    sources: list[SourceConfig] = field(default_factory=list[SourceConfig])
    tokenizer: str = ""
    template: str = ""
    views: dict[str, ImageSpec] = field(default_factory=dict[str, ImageSpec])
    decode: bool = False

    def __post_init__(self) -> None:
        """Check what types cannot say; no sources means the published ones."""
        if self.sources:
            super().__post_init__()


def check(config: CheckConfig) -> Survey:
    """Check the mixture and print a summary."""
    root = Path(config.root)
    if not is_folder(root):
        raise DataError(f"root: folder {root} does not exist; pass --root with the data's folder")
    if config.output:
        require_writable("output", Path(config.output).parent)
    config = config if config.sources else find_published(config)
    config = replace(config, views=filled_views(config.views))
    started = time.monotonic()
    for source in config.sources:
        files = ", ".join(p if is_remote(p) else str(root / p) for p in source.patterns)
        images = source.images
        below = plain_address(images) if is_remote(images) else root / images
        say(f"reading {files}, images below {below}")
    rules = _rules(config)
    found = _look(config, rules, decoded=None, last=not config.decode)
    num_held_out(config.mixture, found.read.total() - found.bad.total())
    notes: Counter[Note] = Counter()
    if config.decode:
        found = _look(config, rules, decoded=_decode(config, found, notes), last=True)
    print_summary(config, found)
    for note, count in sorted(notes.items()):
        say(f"  {count:,} images {note}: {IMAGE_NOTES[note]}")
    say(f"\n{time.monotonic() - started:.1f} s")
    return found


def write_recipe(config: CheckConfig) -> CheckConfig:
    """Write the recipe of `data`, and the settings to check it with.

    Raises:
        UsageError: Settings that the recipe decides were given, or its file exists with other text.
        DataError: Nothing there can be read.
    """
    if config.root or config.sources:
        raise UsageError(
            "data: --root or sources were given too; give either a file to look at or a recipe"
        )
    place = Path(config.data)
    if not place.exists():
        raise UsageError(f"data: {place} does not exist; expected an annotation file or a folder")
    guess = guess_source(place.resolve())
    path = Path(config.recipe or f"{guess.source.name}_data.yaml")
    text = recipe_text(guess, f"lapilli check {config.data}")
    if path.exists() and path.read_bytes() != text.encode():
        raise UsageError(
            f"recipe: {path} exists and differs; use it with --config {path}, remove it, or name "
            "another with --recipe"
        )
    require_writable("recipe", path.absolute().parent)
    write_text(path, text)
    say(
        f"{path}: format {guess.source.format}; of the first {guess.looked_at} records "
        f"{guess.good} can be read, {guess.found} of their {guess.images} images are there"
    )
    say(
        f"next: lapilli preprocess --config {quote(str(path))} --root {quote(str(guess.root))} "
        "--tokenizer NAME --output DIR"
    )
    say(
        "NAME is the language model's tokenizer; without one, `lapilli tokenizer` makes a small one"
    )
    written = parse(CheckConfig, [f"--config={path}", f"--root={guess.root}"], "")
    return replace(
        written, output=config.output, decode=config.decode, num_workers=config.num_workers
    )


def find_published(config: CheckConfig) -> CheckConfig:
    """The recipes' sources and views whose annotation files lie in the root.

    Raises:
        DataError: There is none; says what was looked for, and how to get it.
    """
    root = Path(config.root)
    sources: list[SourceConfig] = []
    views = dict(config.views)
    looked_for: list[str] = []
    for name in PUBLISHED:
        recipe = parse(CheckConfig, [f"--config={RECIPES / name}", f"--root={root}"], "")
        for source in recipe.sources:
            (file,) = source.patterns  # the published ones are single files
            looked_for.append(file)
            folder = next((f for f in FOLDERS if (root / f / file).is_file()), None)
            if folder is None:
                continue
            # The captions' images lie beside their file, the others below the root.
            images = source.images if source.images == "." else f"{folder}/{source.images}"
            path = f"{folder}/{file}".removeprefix("/")
            sources.append(replace(source, annotations=path, images=images.removeprefix("/")))
            views.update(recipe.views)
    if not sources:
        names = ", ".join(looked_for)
        raise DataError(
            f"root: {root} holds none of {names}; expected one of them there or below "
            f"{' or '.join(FOLDERS[1:])}; give another --root, a --config for other files, or get "
            f"one: wget -c -P {root} {ANNOTATIONS['llava_v1_5_mix665k.json']}"
        )
    return replace(config, sources=sources, views=views)


def _rules(config: CheckConfig) -> Rules:
    """The validation rules of a build with the template that is named, if any."""
    if not config.template:
        return plain_rules
    template, tokenizer = get_template(config.template), None
    if template.chat:
        if not config.tokenizer:
            raise DataError(
                f"tokenizer: empty, and template {template.name} is a tokenizer's chat template; "
                "give --tokenizer"
            )
        tokenizer = load_tokenizer(config.tokenizer)
        template = bind_template(template, tokenizer)
    return record_rules(template, tokenizer, config.compat)


def _look(
    config: CheckConfig, rules: Rules, decoded: dict[str, Verdict] | None, last: bool
) -> Survey:
    """One pass over the records; the last one writes those with a problem."""
    with progress_bar() as bar, _quarantine(config.output if last else "") as write:
        task = bar.add_task("records", total=None)
        return survey(
            config,
            decoded,
            rules=rules,
            on_progress=lambda done: bar.update(task, completed=done),
            on_bad=write,
        )


def _decode(config: CheckConfig, found: Survey, notes: Counter[Note]) -> dict[str, Verdict]:
    with progress_bar() as bar:
        task = bar.add_task("images", total=len(found.images))
        return verify_images(
            found.images.values(),
            Path(config.root),
            list(config.views.values()),
            workers=config.num_workers,
            notes=notes,
            on_progress=lambda done: bar.update(task, completed=done),
        )


@contextmanager
def _quarantine(output: str) -> Generator[Callable[[Entry], None]]:
    """Rows to a Parquet file as they come, under its name when all are there."""
    if not output:
        yield lambda entry: None
        return
    with only_writer(Path(output), "written", beside=True), _rows_to(Path(output)) as write:
        yield write


@contextmanager
def _rows_to(path: Path) -> Generator[Callable[[Entry], None]]:
    rows: list[Entry] = []
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        writer: Any = pq.ParquetWriter(temporary, quarantine_table([]).schema)
    except OSError as error:
        raise DataError(f"output: {path}: {error.strerror}; choose another --output") from None

    def move(target: Path) -> None:
        temporary.replace(target)

    def write(entry: Entry) -> None:
        rows.append(entry)
        if len(rows) == ROWS:
            writer.write_table(quarantine_table(rows))
            rows.clear()

    try:
        yield write
        writer.write_table(quarantine_table(rows))
        writer.close()
        write_atomic(path, move)
    finally:
        with suppress(OSError):  # report the first error
            temporary.unlink(missing_ok=True)


def print_summary(config: CheckConfig, found: Survey) -> None:
    """Print records, images, missing files, and what a build needs."""
    total, bad = found.read.total(), found.bad.total()
    say_title(f"{total:,} records: {total - bad:,} good, {bad:,} with a problem")
    for source, count in found.read.items():
        say(f"  {source}: {count:,} records")
        for line in describe_tally(found.tallies.get(source, Tally())):
            say(f"    {line}")
        for (name, reason), number in sorted(found.bad.items(), key=lambda item: -item[1]):
            if name == source:
                example = found.examples[name, reason]
                say(f"    {reason} {number:,}, first {example.sample_id}: {example.detail}")
    for what, number in sorted(found.lost.items(), key=lambda item: -item[1]):
        say(f"  {number:,} images: {what}")
    for hole, keys in found.holes.items():
        say(f"  known, {len(keys):,} {hole.name} ({hole.remedy}): {_some(keys)}")
    for kind, number in found.repairs.most_common():
        key, image = found.mended[kind]
        say(
            f"  {number:,} keys repaired ({kind}), "
            f"first '{excerpt(key)}' read from '{excerpt(image)}'"
        )
    print_needs(config, found)
    if config.output:
        say(f"records with a problem: {config.output}")
    if not config.decode:
        say("images were found, not decoded; --decode decodes every one")


def _some(keys: set[str]) -> str:
    """The first few names; all of them are in the quarantine file."""
    more = f" and {len(keys) - NAMED:,} more" if len(keys) > NAMED else ""
    return ", ".join(sorted(keys)[:NAMED]) + more


def print_needs(config: CheckConfig, found: Survey) -> None:
    """Disk and time of a build."""
    sizes = [
        place.size if place.member is None else place.member.stored
        for place in found.images.values()
    ]
    say(f"\n{len(sizes):,} distinct images, {bytes_text(sum(sizes))}")
    cores = config.num_workers or len(os.sched_getaffinity(0))
    for view, spec in config.views.items():
        disk = len(sizes) * spec.size**2 * 3
        rate = _images_per_second(list(found.images.values()), Path(config.root), spec)
        minutes = len(sizes) / rate / cores / 60 if rate else 0.0
        wording = f"about {minutes:.0f} min" if minutes >= 1 else "under a minute"
        time_text = f", {wording} on {cores} cores" if rate else ""
        say(f"a build of {view}: {bytes_text(disk)} of disk{time_text}")


def _images_per_second(places: list[Located], root: Path, spec: ImageSpec) -> float:
    """How fast this machine makes a view of these images on one core, by a sample of them."""
    resizer = resolve_codecs(spec.resizer).resizer
    sample = places[:: max(1, len(places) // PROBE)]
    started, made = time.perf_counter(), 0
    for number, place in enumerate(sample):
        if number == 1:  # the first loads libraries
            started, made = time.perf_counter(), 0
        try:
            square(decode(read_image(root, place), spec, resizer).image, spec, resizer)
            made += 1
        except BadImage:
            continue
    return made / (time.perf_counter() - started) if made > 1 else 0.0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 1 if a record has a problem."""
    arguments = first_as("data", argv)
    config = parse(
        CheckConfig, arguments, "Check a mixture's records and images, converting nothing.",
        addresses=["root", "tokenizer"],
    )  # fmt: skip
    if config.data:
        return 0 if check(write_recipe(config)).clean else 1
    if not config.root:
        raise UsageError("root: left out; expected --root FOLDER, or an annotation file to look at")
    if is_remote(config.root) and not config.sources:
        raise UsageError("root: an address and no sources; name a recipe with --config")
    return 0 if check(with_root_address(config)).clean else 1


if __name__ == "__main__":
    run(main)
