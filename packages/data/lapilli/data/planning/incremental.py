"""Find which shards of an existing dataset an incremental build can keep.

Image slots and token rows of the dataset in the output folder are kept where they are; what is new
or changed comes behind them. A shard is made again only where an image that is still used has
changed; a token row that has changed or is no longer wanted stays in its shard, unselected.
"""

from __future__ import annotations

import hashlib
import marshal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from lapilli.data.errors import DataError
from lapilli.data.io.atomic import ShardFacts
from lapilli.data.io.remote_path import Output
from lapilli.data.mounts import Located
from lapilli.data.shards.files import finished_facts, open_table
from lapilli.data.shards.manifest import Manifest, TargetFacts, ViewFacts, read_manifest
from lapilli.data.shards.schemas import INPUT_SCHEMA

__all__ = [
    "Previous",
    "Stamped",
    "TokenGroup",
    "arrange_tokens",
    "image_stamp",
    "keep_image_shards",
    "read_previous",
    "row_stamp",
]

STAMP_BYTES = 8
UNUSED_STAMP = b""
Stamped: TypeAlias = tuple[str, bytes]  # a name, and what tells its content from another's


@dataclass(frozen=True)
class Previous:
    """The dataset that the output folder holds.

    Attributes:
        manifest: Its facts.
        slots: Image id and stamp by slot; the stamp of a slot without use is empty.
        rows: Sample id and stamp of each row of the token shards, in order.
    """

    manifest: Manifest
    slots: list[Stamped]
    rows: list[Stamped]


@dataclass(frozen=True)
class TokenGroup:
    """The rows of one token shard.

    Attributes:
        number: The shard's number.
        rows: Sample id and stamp of each row.
        kept: For each row, which of the plan's kept records it is; None for one no longer wanted.
        facts: Of the shard, where it stays as it is though some of its rows are not wanted.
    """

    number: int
    rows: Sequence[Stamped]
    kept: Sequence[int | None]
    facts: ShardFacts | None = None


def read_previous(output: Output) -> Previous | None:
    """The finished dataset in an output, or None where there is none that can be read."""
    try:
        manifest = read_manifest(output)
        if manifest.inputs is None:
            return None
        table = open_table(output, manifest.inputs, INPUT_SCHEMA)
    except DataError:
        return None
    kinds, names, stamps = (table[name].to_pylist() for name in ("kind", "name", "stamp"))
    images = kinds.count("image")
    pairs = list(zip(names, stamps, strict=True))
    return Previous(manifest, pairs[:images], pairs[images:])


def image_stamp(place: Located) -> bytes:
    """What tells a file from another under its name: size and time of its container, its place."""
    return _stamp(repr((place.size, place.mtime_ns, place.member)).encode())


def row_stamp(packed: bytes, image_ids: Sequence[str]) -> bytes:
    """What tells one record with its images from another."""
    # As marshal writes the pair of both; its format 0 knows no references between values.
    return _stamp(b"(\2\0\0\0" + packed + marshal.dumps(tuple(image_ids), 0))


def _stamp(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=STAMP_BYTES).digest()


def keep_image_shards(
    output: Output, slots: Sequence[Stamped], previous: Previous, view: ViewFacts | TargetFacts
) -> dict[int, ShardFacts]:
    """The shards of a view or a teacher, by number, that stay although an image has no more use.

    Those whose images are all in use need no such list: their task is what it was.
    """
    size, kept = view.images_per_shard, dict[int, ShardFacts]()
    for number, facts in enumerate(view.shards):
        before = previous.slots[number * size : (number + 1) * size]
        now = slots[number * size : (number + 1) * size]
        unused = any(stamp == UNUSED_STAMP for _, stamp in now)
        same = len(now) == len(before) and all(
            stamp in (UNUSED_STAMP, then) for (_, stamp), (_, then) in zip(now, before, strict=True)
        )
        if unused and same and finished_facts(output, facts.path) == facts:
            kept[number] = facts
    return kept


def arrange_tokens(
    output: Output, records: Sequence[Stamped], size: int, folder: str, previous: Previous | None
) -> list[TokenGroup]:
    """The token shards of the records: those there are, then new ones of at most `size` rows.

    Args:
        output: The dataset's folder.
        records: Sample id and stamp of each record to have, in order.
        size: Rows of a new shard.
        folder: Where shards of this tokenizer and template lie, relative to `output`.
        previous: The dataset there.
    """
    old = list(_old_groups(previous, folder))
    if not old:  # nothing to compare with: no record is looked at
        starts = range(0, len(records), size)
        parts = ((start, min(start + size, len(records))) for start in starts)
        return [
            TokenGroup(number, records[start:end], range(start, end))
            for number, (start, end) in enumerate(parts)
        ]
    wanted = {record: place for place, record in enumerate(records)}
    groups: list[TokenGroup] = []
    for number, facts, rows in old:
        kept = tuple(wanted.get(row) for row in rows)
        if None not in kept:
            groups.append(TokenGroup(number, rows, kept))
        elif any(place is not None for place in kept):
            if finished_facts(output, facts.path) != facts:
                continue  # damaged, and what it was made of is gone: its records get new rows
            groups.append(TokenGroup(number, rows, kept, facts))
        else:
            continue
        for row in rows:
            wanted.pop(row, None)
    new = list(wanted.items())
    first = max((group.number for group in groups), default=-1) + 1
    for place in range(0, len(new), size):
        part = new[place : place + size]
        rows, kept = tuple(row for row, _ in part), tuple(index for _, index in part)
        groups.append(TokenGroup(first + place // size, rows, kept))
    return groups


def _old_groups(
    previous: Previous | None, folder: str
) -> Iterable[tuple[int, ShardFacts, tuple[Stamped, ...]]]:
    """Number, facts and rows of each token shard of a dataset that lies in `folder`."""
    start = 0
    for facts in previous.manifest.tokens if previous else ():
        rows = previous.rows[start : start + facts.rows] if previous else []
        start += facts.rows
        name = Path(facts.path)
        if name.parent.as_posix() == folder:
            yield int(name.name.partition("-")[0]), facts, tuple(rows)
