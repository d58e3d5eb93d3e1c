"""Store original image bytes in a dataset, to rebuild views when the files are gone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from lapilli.data.images.encodings import ORIGINAL
from lapilli.data.images.view import BadImage, ImageSpec, decode
from lapilli.data.io.atomic import ShardFacts
from lapilli.data.io.remote_path import Output, RemotePath
from lapilli.data.mounts import Located
from lapilli.data.mounts.places import Member
from lapilli.data.planning.incremental import Previous, row_stamp
from lapilli.data.shards.checks import only_chunk
from lapilli.data.shards.files import check_table, open_table
from lapilli.data.shards.schemas import IMAGE_SCHEMA, OK, TOKEN_SCHEMA

__all__ = ["Originals", "original_row"]


def original_row(
    read: Callable[[], bytes], guarded: AbstractContextManager[None], spec: ImageSpec
) -> dict[str, Any]:
    """An image's bytes as they are, with a status that says whether they can be decoded.

    Bytes that cannot be decoded are stored too, so that every view has the same verdict.
    """
    row: dict[str, Any] = dict.fromkeys(("source_width", "source_height", "pixels"))
    try:
        row["pixels"] = read()
        with guarded:
            decoded = decode(row["pixels"], spec)
    except BadImage as bad:
        return {**row, "status": str(bad.reason), "detail": bad.detail}
    size = {"source_width": decoded.source_width, "source_height": decoded.source_height}
    return {**row, **size, "status": OK, "detail": ""}


class Originals:
    """The source bytes that the dataset in the output folder holds, where the files are gone."""

    def __init__(self, previous: Previous | None, output: Output) -> None:
        views = previous.manifest.views if previous else {}
        self._previous = previous if ORIGINAL in views else None
        self._output = output

    def __bool__(self) -> bool:
        """Whether there are any."""
        return self._previous is not None

    def locate(self, sample_id: str, packed: bytes) -> tuple[Located, ...]:
        """The places in the dataset of a record's images; none if they are not all there.

        Args:
            sample_id: The record's.
            packed: The record, packed.
        """
        if sample_id not in self._rows:
            return ()
        stamp, images = self._rows[sample_id]
        if row_stamp(packed, images) != stamp:
            return ()
        places = tuple(self._places[name] for name in images if name in self._places)
        return places if len(places) == len(images) else ()

    def stamp(self, place: Located) -> bytes | None:
        """The stamp of the file behind a place in the dataset; None for other places."""
        if self._previous is None or self._places.get(place.image_id) != place:
            return None
        return self._stamps[place.image_id]

    @cached_property
    def _stamps(self) -> dict[str, bytes]:
        return dict(self._previous.slots) if self._previous else {}

    @cached_property
    def _rows(self) -> dict[str, tuple[bytes, tuple[str, ...]]]:
        """Stamp and image ids by sample id; of a record that has changed, the last row's."""
        if self._previous is None:
            return {}
        shards = self._previous.manifest.tokens
        tables = [
            open_table(self._output, shard, TOKEN_SCHEMA, ["image_ids"])["image_ids"]
            for shard in shards
        ]
        images = (tuple(ids) for table in tables for ids in table.to_pylist())
        return {
            name: (stamp, ids)
            for (name, stamp), ids in zip(self._previous.rows, images, strict=True)
        }

    @cached_property
    def _places(self) -> dict[str, Located]:
        if self._previous is None:
            return {}
        shards = self._previous.manifest.views[ORIGINAL].shards
        found = (self._in_shard(shard) for shard in shards)
        return {place.image_id: place for places in found for place in places}

    def _in_shard(self, shard: ShardFacts) -> list[Located]:
        """Where each image's bytes lie in a shard's file: an Arrow column is one stretch of it."""
        path = self._output / shard.path
        if isinstance(path, RemotePath):
            size, mtime_ns, whole = shard.bytes, 0, pa.py_buffer(path.read_bytes())
        else:
            size, mtime_ns = path.stat().st_size, path.stat().st_mtime_ns
            with pa.memory_map(str(path), "r") as file:
                whole = file.read_buffer()
        table = pa.ipc.open_file(whole).read_all()
        check_table(table, shard.rows, IMAGE_SCHEMA.names)
        column = only_chunk(table, "pixels")
        _, offsets, values = column.buffers()
        if values is None:
            return []
        starts = np.frombuffer(offsets, np.int64)[: len(column) + 1].tolist()
        base = values.address - whole.address
        valid = column.is_valid().to_pylist()
        return [
            Located(
                image_id=image_id,
                container=str(path),
                size=size,
                mtime_ns=mtime_ns,
                member=Member(
                    offset=base + start, stored=end - start, size=end - start, method="tar", crc=0
                ),
            )
            for image_id, start, end, there in zip(
                table["image_id"].to_pylist(), starts, starts[1:], valid, strict=False
            )
            if there
        ]
