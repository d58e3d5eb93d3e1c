"""Scan some elements of a source: verdicts and packed records as columns.

A part knows nothing of those before it: an element without an id has none, and no id is unique.
"""

from __future__ import annotations

import gc
import marshal
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa

from lapilli.data.config import SourceConfig
from lapilli.data.planning.incremental import row_stamp
from lapilli.data.planning.rules import record_rules
from lapilli.data.record import element_digest, element_json, pack_content, pack_names, shortened
from lapilli.data.sources import get_source
from lapilli.data.sources.reading.bounds import Bounds
from lapilli.data.sources.reading.json_ranges import BadCut, JsonRange, read_range
from lapilli.data.sources.tally import Tally
from lapilli.data.sources.validation import Rules, judge, record_id_of
from lapilli.data.text.encode import bind_template, load_tokenizer
from lapilli.data.text.templates import Template

__all__ = ["Part", "ScanSettings", "scan_elements", "scan_range"]

PART_BYTES = 4 << 20
PART_SCHEMA = pa.schema(
    [
        ("record_id", pa.string()),  # null for an element that has none
        ("reason", pa.string()),  # null if it is kept so far
        ("detail", pa.string()),
        ("raw_json", pa.string()),  # null where it cannot be needed: kept, and without images
        ("digest", pa.binary(16)),
        ("images", pa.binary()),  # its keys, by marshal; null without any, or if it is not kept
        ("content", pa.binary()),  # `pack_content` of the record; null if it is not kept
        ("stamp", pa.binary(8)),  # `row_stamp` if the id is unique and each key an image's path
    ]
)


@dataclass(frozen=True)
class Part:
    """Some elements of a source, in order.

    Attributes:
        table: One row an element; see `PART_SCHEMA`.
        fields: Records by the name of a field that nothing reads, in the order of first use.
    """

    table: pa.Table
    fields: Counter[str]


@dataclass(frozen=True)
class ScanSettings:
    """What all parts of a source are scanned with.

    Attributes:
        source: The source.
        template: The template, bound to the tokenizer.
        tokenizer: Its name; loaded only where a chat template is asked.
        compat: The config's.
        below: What the path of an image has before its key.
    """

    source: SourceConfig
    template: Template
    tokenizer: str
    compat: str | None
    below: str

    def rules(self) -> Rules:
        """How the build takes each record."""
        return _rules(self.template, self.tokenizer, self.compat)


@lru_cache(maxsize=4)
def _rules(template: Template, tokenizer: str, compat: str | None) -> Rules:
    if not template.chat:
        return record_rules(template, None, compat)
    loaded = load_tokenizer(tokenizer)
    return record_rules(bind_template(template, loaded), loaded, compat)


def scan_range(data: bytes | None, part: JsonRange, settings: ScanSettings) -> Part | None:
    """Scan a range of a JSON file; None if it was cut in the wrong place or is damaged.

    Args:
        data: Its bytes; None reads them.
        part: The range.
        settings: The source's.
    """
    data = part.load() if data is None else data
    try:
        with _without_collection():
            elements = read_range(data, part, Bounds.of(settings.source))
            return scan_elements(elements, settings, most=None)
    except BadCut:
        return None


@contextmanager
def _without_collection() -> Generator[None]:
    """No search for cycles: JSON has none, and looking takes a seventh of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def scan_elements(
    elements: Iterator[Any], settings: ScanSettings, most: int | None = PART_BYTES
) -> Part:
    """Scan elements, as many as `most` bytes of JSON text need; None takes all.

    Raises:
        DataError: As reading them does.
    """
    config, source, rules = settings.source, get_source(settings.source.format), settings.rules()
    tally = Tally(most=1 << 62)
    below = f"{settings.below}/" if settings.below else ""
    columns: dict[str, list[Any]] = {field.name: [] for field in PART_SCHEMA}
    add = [column.append for column in columns.values()]
    size = 0
    for element in elements:
        record_id = record_id_of(element)
        ids = record_id or "", f"{config.name}/{record_id}"
        entry = judge(element, ids, config, source, rules, tally)
        text = element_json(entry.raw)
        size += len(text)
        verdict, record = entry.verdict, entry.record
        if record is None or not verdict.kept:
            row = (shortened(text), None, None, None)
        else:
            keys, content = record.images, pack_content(record)
            packed = pack_names(record.record_id, record.sample_id, record.source) + content
            stamp = row_stamp(packed, [f"{below}{key}" for key in keys])
            images = marshal.dumps(keys) if keys else None
            row = (shortened(text) if keys else None, images, content, stamp)
        digest = element_digest(text)
        values = (record_id, verdict.reason, verdict.detail, row[0], digest, *row[1:])
        for append, value in zip(add, values, strict=True):
            append(value)
        if most is not None and size > most:
            break
    arrays = [pa.array(columns[field.name], field.type) for field in PART_SCHEMA]
    return Part(pa.table(arrays, schema=PART_SCHEMA), tally.fields)
