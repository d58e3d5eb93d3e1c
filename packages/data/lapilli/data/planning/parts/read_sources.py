"""Read every source of a build: its elements with their ids, verdicts and images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lapilli.data.config import BuildConfig, SourceConfig
from lapilli.data.errors import DataError
from lapilli.data.mounts.repairs import repairs_table
from lapilli.data.planning.located_entries import no_record, open_mount
from lapilli.data.planning.originals import Originals
from lapilli.data.planning.parts.disk_column import DiskColumn
from lapilli.data.planning.parts.entries import Entries
from lapilli.data.planning.parts.image_table import Images, ImageTable
from lapilli.data.planning.parts.record_file import RecordFile
from lapilli.data.planning.parts.run_scans import Scanner, scan_on_ray, scan_streamed
from lapilli.data.planning.parts.scan_part import Part, ScanSettings
from lapilli.data.planning.parts.source_columns import SourceColumns
from lapilli.data.planning.progress import paced
from lapilli.data.record import excerpt
from lapilli.data.sources import reads_json
from lapilli.data.sources.reading.json_ranges import RANGE_BYTES, BadCut, JsonRange, cut_source
from lapilli.data.sources.tally import Tally
from lapilli.data.text.templates import Template

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Read", "Reading", "read_sources"]

ON_DISK = ("digests", "stamps")  # columns of uint8 that lie in files


@dataclass(frozen=True)
class Reading:
    """How sources are read, which changes nothing of what is read.

    Attributes:
        range_bytes: Bytes of a range of a JSON file, about.
        scanner: Scans ranges.
    """

    range_bytes: int = RANGE_BYTES
    scanner: Scanner = scan_on_ray


@dataclass(frozen=True)
class Read:
    """What was read of the sources.

    Attributes:
        entries: Every element with its verdict.
        images: The images of kept entries, in the order of first use.
        repairs: How many keys were mended, by kind.
        repaired: Every key that was mended; see `REPAIRS_SCHEMA`.
        tallies: By source, what it holds beside its records.
    """

    entries: Entries
    images: ImageTable
    repairs: Counter[str]
    repaired: pa.Table
    tallies: dict[str, Tally]


def read_sources(
    config: BuildConfig,
    template: Template,
    originals: Originals,
    on_progress: Callable[[int], None],
    reading: Reading,
) -> Read:
    """Every entry of every source with its verdict and its images.

    Args:
        config: The build's settings; its root and tokenizer are absolute.
        template: The template, bound to the tokenizer.
        originals: Images that the dataset in the output holds.
        on_progress: Called with the number of records read, about once a second.
        reading: How the sources are read.

    Raises:
        DataError: A source is missing, broken or empty, or an id to exclude is no record's.
    """
    images, records, told = Images(), RecordFile(), paced(on_progress)
    unseen, done = set(config.exclude), 0
    all_columns: list[SourceColumns] = []
    for source in config.sources:
        columns = _read_source(
            source, config, template, reading, originals, images, records,
            lambda count, done=done: told(done + count),
        )  # fmt: skip
        unseen -= columns.excluded
        done += columns.count
        all_columns.append(columns)
    on_progress(done)
    if unseen:
        raise DataError(
            f"exclude: {excerpt(min(unseen))!r} is no record's sample id; expected "
            "source/record_id as in quarantine.parquet and selection.arrow"
        )
    return _united(all_columns, images, records)


def _read_source(
    source: SourceConfig, config: BuildConfig, template: Template, reading: Reading,
    originals: Originals, images: Images, records: RecordFile, told: Callable[[int], None],
) -> SourceColumns:  # fmt: skip
    """One source by its byte ranges; from its start where it has none or they were cut wrongly.

    Raises:
        DataError: Its images are nowhere, or as its reader does, or it has no record.
    """
    root, first = Path(config.root), len(records)
    mount = open_mount(source, config, root)
    if not originals:
        mount.require()
    settings = ScanSettings(
        source=source,
        template=template,
        tokenizer=config.tokenizer,
        compat=config.compat,
        below=mount.below,
    )

    def read(parts: Iterator[Part], tally: Tally) -> SourceColumns:
        columns = SourceColumns(
            name=source.name,
            mount=mount.again(remembers=False),
            images=images,
            records=records,
            tally=tally,
        )
        columns.read(parts, set(config.exclude), originals, told)
        return columns

    ranges: Sequence[JsonRange] | None = None
    if reads_json(source.format):
        ranges = cut_source(source, root, reading.range_bytes)
    if ranges is not None and len(ranges) > 1:
        try:
            return read(reading.scanner(ranges, settings), Tally())
        except BadCut:
            records.truncate(first)  # streaming finds out what is wrong, if anything is
    tally = Tally()
    columns = read(scan_streamed(root, settings, tally, told), tally)
    if not columns.count:
        raise no_record(source, root)
    return columns


def _united(columns: Sequence[SourceColumns], images: Images, records: RecordFile) -> Read:
    """The columns of all sources as one; images that no kept entry uses are left out.

    Those of the sources are gone afterwards: a column is never there twice.
    """
    starts = np.cumsum([0, *(one.count for one in columns)])
    numbers = _joined(columns, "numbers")
    used = np.flatnonzero(np.bincount(numbers, minlength=len(images)))
    if len(used) < len(images):
        numbers = np.searchsorted(used, numbers).astype(np.int32)
    pairs = list(zip(columns, starts.tolist(), strict=False))
    ids = [chunk for one in columns for chunk in one.sample_ids.chunks]
    entries = Entries(
        sources=[one.name for one in columns],
        starts=starts,
        sample_ids=pa.chunked_array(ids, pa.string()),
        copies={start + row: k for one, start in pairs for row, k in one.copies.items()},
        digests=_joined(columns, "digests"),
        stamps=_joined(columns, "stamps"),
        verdicts={start + row: v for one, start in pairs for row, v in one.verdicts.items()},
        texts={start + row: text for one, start in pairs for row, text in one.texts.items()},
        images_of=(table := images.table().only(used)),
        image_ends=np.cumsum(_joined(columns, "counts"), dtype=np.int64),
        image_numbers=numbers,
        records=records,
    )
    repaired = [repairs_table(one.name, one.mount.repaired()) for one in columns]
    return Read(
        entries=entries,
        images=table,
        repairs=sum((one.mount.repairs for one in columns), Counter[str]()),
        repaired=pa.concat_tables(repaired),
        tallies={one.name: one.tally for one in columns},
    )


def _joined(columns: Sequence[SourceColumns], name: str) -> NDArray[Any]:
    """A column of all sources one after the other, taken from them."""
    parts: list[NDArray[Any]] = [getattr(one, name) for one in columns]
    for one in columns:
        setattr(one, name, getattr(one, name)[:0])
    if len(parts) == 1:
        return parts[0]
    if name not in ON_DISK:
        return np.concatenate(parts)
    joined = DiskColumn(np.uint8, parts[0].shape[1])
    for part in parts:
        joined.append(part)
    return joined.array()
