"""Select the records to keep from verdicts and image statuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lapilli.data.config import BuildConfig
from lapilli.data.io.atomic import ShardFacts, write_atomic
from lapilli.data.io.remote_path import Output
from lapilli.data.planning.build_plan import BuildPlan
from lapilli.data.planning.incremental import TokenGroup
from lapilli.data.planning.mixture import Pool, blend
from lapilli.data.planning.parts.entries import Entries
from lapilli.data.planning.parts.entry_views import EntryImages, EntryNames
from lapilli.data.planning.plan import check_quarantined
from lapilli.data.record import Entry, PackedEntry, Reason, Verdict, element_digest, element_json
from lapilli.data.shards.schemas import IMAGE_SCHEMA, OK, TOKEN_SCHEMA, TOKENS_BESIDE, UNUSED
from lapilli.data.shards.summaries import OpenColumns
from lapilli.data.sources import get_source

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "ImageRows",
    "Selection",
    "quarantine_table",
    "read_image_rows",
    "read_token_rows",
    "select",
    "write_quarantine",
    "write_repairs",
]

CHANGED = '"the annotation file has changed since this build was planned"'


@dataclass(frozen=True)
class Selection:
    """The final verdict of every element.

    Attributes:
        entries: All of them with their final verdicts, in the plan's order.
        columns: The columns of `selection.arrow`, one row a kept entry.
        mixture: The blend's facts.
    """

    entries: Entries
    columns: dict[str, Any]
    mixture: dict[str, Any]

    def counts(self) -> dict[str, Any]:
        """Records read, kept and quarantined; by reason and by source."""
        reasons = Counter(str(verdict.reason) for verdict in self.entries.verdicts.values())
        return {
            "read": len(self.entries),
            "kept": len(self.entries.kept),
            "quarantined": reasons.total(),
            "reasons": dict(sorted(reasons.items())),
            "sources": self.entries.by_source(),
        }


def select(plan: BuildPlan, rows: pa.Table, bad_images: Mapping[str, Verdict]) -> Selection:
    """Join the plan's verdicts with the results of decoding and tokenizing.

    Args:
        plan: The plan; it is not changed.
        rows: The rows of the token shards that the plan keeps, in the order of its entries, as
            `read_token_rows` gives them.
        bad_images: Verdict by image id, for the images that some view could not use.

    Raises:
        DataError: More is quarantined than the settings allow, or the mixture cannot be made.
    """
    planned, before = plan.entries, plan.entries.kept
    if not rows["sample_id"].equals(_only(planned.sample_ids, before)):
        raise RuntimeError("the token rows are not those of the records that were planned")
    entries = planned.with_verdicts(
        _without_training(rows, before, plan.config.compat)
        | planned.rows_with(_numbered(planned, bad_images))
    )
    check_quarantined(entries, plan.config.max_quarantined)
    kept = entries.kept
    if len(kept) < len(before):
        rows = rows.filter(pa.array(np.isin(before, kept)))
    columns: dict[str, Any] = {name: rows[name].combine_chunks() for name in rows.column_names}
    columns["image_slots"] = entries.images_of_kept(plan.slots.of_images())
    names = [source.name for source in plan.config.sources]
    pool = Pool(
        sample_ids=EntryNames(entries, kept),
        sources=entries.source_numbers(kept),
        images=EntryImages(entries, kept),
        image_counts=entries.image_counts[kept],
        tokens=columns["text_length"].to_numpy().astype(np.int64),
    )
    found = blend(pool, plan.config.mixture, names)
    columns |= {"split": found.splits, "repeats": found.repeats}
    return Selection(entries, columns, found.facts)


def _numbered(entries: Entries, bad_images: Mapping[str, Verdict]) -> dict[int, Verdict]:
    """The verdicts on bad images by their place in `images_of`."""
    if not bad_images:
        return {}
    arrow: Any = pc
    names = pa.array([*bad_images], pa.large_string())
    numbers = arrow.index_in(names, value_set=entries.images_of.ids).to_pylist()
    pairs = zip(numbers, bad_images.values(), strict=True)
    return {number: verdict for number, verdict in pairs if number is not None}


def _only(column: pa.ChunkedArray, rows: NDArray[np.int64]) -> pa.ChunkedArray:
    """The values of these rows, which are in order; chunks are not joined for it."""
    if len(rows) == len(column):
        return column
    mask = np.zeros(len(column), np.bool_)
    mask[rows] = True
    return column.filter(pa.array(mask))


def _without_training(
    rows: pa.Table, kept: NDArray[np.int64], compat: str | None
) -> dict[int, Verdict]:
    """The verdicts on records that train nothing, by entry. LLaVA keeps them."""
    if compat == "llava":
        return {}
    detail = "no token of this record is trained, or an image lies beyond max_text_length"
    verdict = Verdict(Reason.NO_TRAINED_TOKEN, detail)
    nothing = np.flatnonzero(rows["num_trained"].to_numpy() == 0)
    return dict.fromkeys(kept[nothing].tolist(), verdict)


@dataclass(frozen=True)
class ImageRows:
    """What views say of their images.

    Attributes:
        bad: The images that some view could not use, with the first view's verdict.
        notes: By `Note`, the images that some view has used in spite of it.
    """

    bad: dict[str, Verdict]
    notes: dict[str, set[str]]

    def count_notes(self, images: pa.Array) -> dict[str, int]:
        """Number of these images with each note."""
        arrow: Any = pc
        noted = {note: pa.array([*names], images.type) for note, names in self.notes.items()}
        found = {
            note: int(arrow.is_in(names, value_set=images).true_count)
            for note, names in noted.items()
        }
        return {note: count for note, count in sorted(found.items()) if count}


def read_image_rows(open_columns: OpenColumns, shards: Iterable[ShardFacts]) -> ImageRows:
    """Read images' statuses and notes from their shards, without pixels."""
    bad: dict[str, Verdict] = {}
    notes: dict[str, set[str]] = {}
    for shard in shards:
        table = open_columns(shard, IMAGE_SCHEMA, ["image_id", "status", "detail"])
        status = table["status"].to_numpy()
        for row in np.flatnonzero((status != OK) & (status != UNUSED)):
            image_id = table["image_id"][int(row)].as_py()
            detail = f"{image_id}: {table['detail'][int(row)].as_py()}"
            bad.setdefault(image_id, Verdict(Reason(status[row]), detail))
        details = table["detail"].to_numpy()
        for row in np.flatnonzero((status == OK) & (details != "")):
            for note in details[row].split(", "):
                notes.setdefault(note, set()).add(table["image_id"][int(row)].as_py())
    return ImageRows(bad, notes)


def read_token_rows(
    open_columns: OpenColumns, shards: Iterable[ShardFacts], groups: Sequence[TokenGroup]
) -> pa.Table:
    """What `select` needs of each token row that is wanted, with the row's place.

    `groups` says which record of the plan each row is; the rows come in the order of the records.
    """
    names = [*TOKENS_BESIDE]
    tables = [open_columns(shard, TOKEN_SCHEMA, names) for shard in shards]
    sizes = [len(part) for part in tables]
    shard = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    row = np.concatenate([np.zeros(0, np.int32), *(np.arange(n, dtype=np.int32) for n in sizes)])
    table = pa.concat_tables([TOKEN_SCHEMA.empty_table().select(names), *tables])
    table = table.append_column("token_shard", pa.array(shard))
    table = table.append_column("token_row", pa.array(row))
    record = np.concatenate([np.zeros(0, np.int64), *map(_places, groups)])
    if (np.diff(record) == 1).all() and record[:1].tolist() == [0]:
        return table  # of a new dataset: all rows, in order
    order = np.argsort(record, kind="stable")[(record < 0).sum() :]
    return table.take(pa.array(order))


def _places(group: TokenGroup) -> NDArray[np.int64]:
    """int64 [rows], the record of each row; -1 for one that is not wanted."""
    if isinstance(group.kept, range):
        return np.arange(group.kept.start, group.kept.stop)
    return np.array([-1 if place is None else place for place in group.kept], np.int64)


def quarantine_table(entries: Sequence[Entry | PackedEntry]) -> pa.Table:
    """The entries that are not kept, with reason, detail and the record as JSON."""
    bad = [entry for entry in entries if not entry.verdict.kept]
    columns = {
        "source": [entry.source for entry in bad],
        "record_id": [entry.record_id for entry in bad],
        "sample_id": [entry.sample_id for entry in bad],
        "reason": [str(entry.verdict.reason) for entry in bad],
        "detail": [entry.verdict.detail for entry in bad],
        "record": [entry.raw_json for entry in bad],
    }
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})


def write_quarantine(path: Output, entries: Entries, config: BuildConfig) -> ShardFacts:
    """Write every entry that is not kept as Parquet, with what its file says of it; its facts."""
    bad = list(entries.bad())
    texts = _read_again(entries, config)
    table = quarantine_table([replace(e, raw_json=e.raw_json or texts[e.sample_id]) for e in bad])
    facts = write_atomic(
        path, lambda temporary: pq.write_table(table, temporary, write_page_checksum=True)
    )
    return replace(facts, rows=len(bad))


def write_repairs(path: Output, repaired: pa.Table) -> ShardFacts:
    """Write every key that was mended, with the file it is read from, as Parquet; its facts."""
    facts = write_atomic(
        path, lambda temporary: pq.write_table(repaired, temporary, write_page_checksum=True)
    )
    return replace(facts, rows=len(repaired))


def _read_again(entries: Entries, config: BuildConfig) -> dict[str, str]:
    """The elements, by sample id, of the entries that were kept until pixels or tokens were seen.

    A source has an entry for each of its elements, in order.
    """
    found: dict[str, str] = {}
    for number, source in enumerate(config.sources):
        first, last = entries.starts[number : number + 2].tolist()
        wanted = {
            row - first: entries[row]
            for row in entries.verdicts
            if first <= row < last and row not in entries.texts
        }
        if not wanted:
            continue
        for place, element in enumerate(get_source(source.format).read(source, Path(config.root))):
            if place in wanted:
                entry, text = wanted.pop(place), element_json(element)
                changed = element_digest(text) != entry.digest
                found[entry.sample_id] = CHANGED if changed else text
            if not wanted:
                break
        found |= {entry.sample_id: CHANGED for entry in wanted.values()}
    return found
