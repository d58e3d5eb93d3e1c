"""Read a source's entries and locate their images, for builds, checks and exports alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from lapilli.data.config import BuildConfig, SourceConfig
from lapilli.data.errors import DataError
from lapilli.data.mounts import Located, Mount
from lapilli.data.record import Entry, Verdict
from lapilli.data.sources.reading.files import annotation_folder
from lapilli.data.sources.tally import Tally
from lapilli.data.sources.validation import Rules, plain_rules, read_entries

__all__ = ["entries_of", "locate_images", "no_record", "open_mount"]


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
        raise no_record(source, root)


def no_record(source: SourceConfig, root: Path) -> DataError:
    """One line for a source without a record."""
    return DataError(
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
