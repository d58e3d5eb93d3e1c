"""Select the records to keep from verdicts and image statuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lapilli.data.config import BuildConfig
from lapilli.data.io.atomic import ShardFacts, write_atomic
from lapilli.data.io.remote_path import Output
from lapilli.data.planning.build_plan import BuildPlan
from lapilli.data.planning.incremental import TokenGroup
from lapilli.data.planning.mixture import Pool, blend
from lapilli.data.planning.plan import check_quarantined
from lapilli.data.record import Entry, PackedEntry, Reason, Verdict, element_digest, element_json
from lapilli.data.shards.files import open_table
from lapilli.data.shards.schemas import IMAGE_SCHEMA, OK, SELECTION_SCHEMA, TOKEN_SCHEMA, UNUSED
from lapilli.data.sources import get_source

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

ROWS_AT_ONCE = 8192
CHANGED = '"the annotation file has changed since this build was planned"'


@dataclass(frozen=True)
class Selection:
    """The final verdict of every element.

    Attributes:
        entries: All of them with their final verdicts, in the plan's order.
        columns: The columns of `selection.arrow`, one row a kept entry.
        mixture: The blend's facts.
    """

    entries: list[PackedEntry]
    columns: dict[str, list[Any]]
    mixture: dict[str, Any]

    def counts(self) -> dict[str, Any]:
        """Records read, kept and quarantined; by reason and by source."""
        reasons = Counter(str(e.verdict.reason) for e in self.entries if not e.verdict.kept)
        return {
            "read": len(self.entries),
            "kept": len(self.columns["sample_id"]),
            "quarantined": reasons.total(),
            "reasons": dict(sorted(reasons.items())),
            "sources": dict(Counter(entry.source for entry in self.entries)),
        }


def select(
    plan: BuildPlan, token_rows: Iterable[Mapping[str, Any]], bad_images: Mapping[str, Verdict]
) -> Selection:
    """Join the plan's verdicts with the results of decoding and tokenizing.

    Args:
        plan: The plan; it is not changed.
        token_rows: The rows of the token shards that the plan keeps, in the order of its entries.
        bad_images: Verdict by image id, for the images that some view could not use.

    Raises:
        DataError: More is quarantined than the settings allow, or the mixture cannot be made.
    """
    entries: list[PackedEntry] = []
    columns: dict[str, list[Any]] = {field.name: [] for field in SELECTION_SCHEMA}
    kept: list[tuple[str, tuple[str, ...]]] = []
    rows = iter(token_rows)
    for entry, images in zip(plan.entries, plan.entry_images, strict=True):
        if not entry.verdict.kept:
            entries.append(entry)
            continue
        row = next(rows)
        if row["sample_id"] != entry.sample_id:
            raise RuntimeError(f"token row {row['sample_id']} where {entry.sample_id} was planned")
        verdict = _late_verdict(row, images, bad_images, plan.config.compat)
        entries.append(entry if verdict.kept else replace(entry, verdict=verdict))
        if verdict.kept:
            kept.append((entry.source, images))
            columns["image_slots"].append([plan.slots[image_id] for image_id in images])
            for name, value in row.items():
                columns[name].append(value)
    check_quarantined(entries, plan.config.max_quarantined)
    pool = Pool(
        columns["sample_id"],
        [source for source, _ in kept],
        [images for _, images in kept],
        np.array(columns["text_length"], np.int64),
    )
    found = blend(pool, plan.config.mixture, [source.name for source in plan.config.sources])
    columns |= {"split": found.splits, "repeats": found.repeats.tolist()}
    return Selection(entries, columns, found.facts)


def _late_verdict(
    row: Mapping[str, Any],
    images: Iterable[str],
    bad_images: Mapping[str, Verdict],
    compat: str | None,
) -> Verdict:
    """The verdict that needed pixels or tokens. LLaVA keeps a sample that trains nothing."""
    for image_id in images:
        if image_id in bad_images:
            return bad_images[image_id]
    if row["num_trained"] == 0 and compat != "llava":
        detail = "no token of this record is trained, or an image lies beyond max_text_length"
        return Verdict(Reason.NO_TRAINED_TOKEN, detail)
    return Verdict()


@dataclass(frozen=True)
class ImageRows:
    """What views say of their images.

    Attributes:
        bad: The images that some view could not use, with the first view's verdict.
        notes: By `Note`, the images that some view has used in spite of it.
    """

    bad: dict[str, Verdict]
    notes: dict[str, set[str]]

    def count_notes(self, images: Container[str]) -> dict[str, int]:
        """Number of these images with each note."""
        found = {note: sum(name in images for name in names) for note, names in self.notes.items()}
        return {note: count for note, count in sorted(found.items()) if count}


def read_image_rows(output: Output, shards: Iterable[ShardFacts]) -> ImageRows:
    """Read images' statuses and notes from their shards, without pixels."""
    bad: dict[str, Verdict] = {}
    notes: dict[str, set[str]] = {}
    for shard in shards:
        table = open_table(output, shard, IMAGE_SCHEMA, ["image_id", "status", "detail"])
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
    output: Output, shards: Iterable[ShardFacts], groups: Sequence[TokenGroup]
) -> Iterator[dict[str, Any]]:
    """What `select` needs of each token row that is wanted, with the row's place.

    `groups` says which record of the plan each row is; the rows come in the order of the records.
    """
    names = ["sample_id", "text_length", "num_trained", "llava_length"]
    tables = [open_table(output, shard, TOKEN_SCHEMA, names) for shard in shards]
    if not tables:
        return
    table = pa.concat_tables(tables)
    sizes = [len(part) for part in tables]
    shard = np.repeat(np.arange(len(sizes)), sizes)
    row = np.concatenate([np.arange(size) for size in sizes])
    record = np.array([-1 if k is None else k for group in groups for k in group.kept], np.int64)
    order = np.argsort(record, kind="stable")[(record < 0).sum() :]
    for start in range(0, len(order), ROWS_AT_ONCE):
        chosen = order[start : start + ROWS_AT_ONCE]
        for place, found in zip(chosen, table.take(chosen).to_pylist(), strict=True):
            yield {**found, "token_shard": int(shard[place]), "token_row": int(row[place])}


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


def write_quarantine(
    path: Output, entries: Sequence[PackedEntry], config: BuildConfig
) -> ShardFacts:
    """Write every entry that is not kept as Parquet, with what its file says of it; its facts."""
    bad = [entry for entry in entries if not entry.verdict.kept]
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


def _read_again(entries: Sequence[PackedEntry], config: BuildConfig) -> dict[str, str]:
    """The elements, by sample id, of the entries that were kept until pixels or tokens were seen.

    A source has an entry for each of its elements, in order.
    """
    found: dict[str, str] = {}
    for source in config.sources:
        own = [entry for entry in entries if entry.source == source.name]
        wanted = {
            place: entry
            for place, entry in enumerate(own)
            if not entry.verdict.kept and entry.raw_json is None
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
