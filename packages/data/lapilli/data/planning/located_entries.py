"""Read a source's entries and locate their images, for builds, checks and exports alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from lapilli.data.config import BuildConfig, SourceConfig
from lapilli.data.errors import DataError
from lapilli.data.mounts import Located, Mount
from lapilli.data.record import Entry, PackedEntry, Record, Verdict
from lapilli.data.sources.reading.files import annotation_folder
from lapilli.data.sources.tally import Tally
from lapilli.data.sources.validation import Rules, plain_rules, read_entries

__all__ = ["entries_of", "locate_images", "open_mount", "take_back", "verdict_among"]


def entries_of(
    source: SourceConfig, root: Path, rules: Rules = plain_rules, tally: Tally | None = None
) -> Iterable[Entry]:
    """The entries of a source; `tally` takes what `read_entries` counts.

    Raises:
        DataError: There is none, or see `read_entries`.
    """
    empty = True
    for entry in read_entries(source, root, rules, tally):
        empty = False
        yield entry
    if empty:
        raise DataError(
            f"annotations: {root}: {', '.join(source.patterns)} holds no record, expected at least "
            f"one; check the file or take source {source.name} out of the recipe"
        )


def open_mount(source: SourceConfig, config: BuildConfig, root: Path) -> Mount:
    """Where a source's images are found."""
    beside = annotation_folder(source, root)
    return Mount(
        root=root,
        prefix=source.images,
        aliases=source.aliases,
        extra_roots=tuple(config.extra_roots),
        beside=beside,
    )


def locate_images(entry: Entry, mount: Mount) -> tuple[Entry, tuple[Located, ...]]:
    """Find an entry's images; one that is not found is its verdict."""
    if entry.record is None or not entry.verdict.kept:
        return entry, ()
    found: list[Located] = []
    for key in entry.record.images:
        place = mount.locate(key)
        if isinstance(place, Verdict):
            return replace(entry, verdict=place), ()
        found.append(place)
    return entry, tuple(found)


def verdict_among(verdicts: Mapping[str, Verdict], record: Record | None) -> Verdict | None:
    """The verdict on the first image of a record that has one, by key."""
    keys = record.images if record is not None else ()
    return next((verdicts[key] for key in keys if key in verdicts), None)


def take_back(
    verdicts: dict[str, Verdict],
    entries: list[PackedEntry],
    entry_images: list[tuple[str, ...]],
    first: int,
) -> None:
    """Quarantine the entries from `first` on that have an image with one of these verdicts."""
    for place in range(first, len(entries)) if verdicts else ():
        entry = entries[place]
        record = entry.record if entry.verdict.kept else None
        verdict = verdict_among(verdicts, record)
        if verdict is not None:
            entries[place], entry_images[place] = replace(entry, verdict=verdict), ()
