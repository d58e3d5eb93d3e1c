"""Every element of a build's sources in columns: 45 bytes a record in memory, texts on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, overload

import numpy as np
import pyarrow as pa

from lapilli.data.planning.parts.image_table import ImageTable
from lapilli.data.planning.parts.record_file import RecordFile
from lapilli.data.record import PackedEntry, Verdict, pack_names

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Entries"]

AT_ONCE = 8192  # entries that are made Python's at a time
KEPT = Verdict()


@dataclass
class Entries(Sequence[PackedEntry]):
    """The elements of all sources with their verdicts, in order, n of them.

    Attributes:
        sources: The names of the sources, in order.
        starts: int64 [sources + 1], the first row of each, and n.
        sample_ids: string [n], in as many chunks as there were parts.
        copies: By row, k of a sample id that ends on `#k` because its record id was taken.
        digests: uint8 [n, 16], of the elements' JSON text.
        stamps: uint8 [n, 8], `row_stamp` of the entries that are kept; 0 elsewhere.
        verdicts: Of the entries that are not kept, by row.
        texts: JSON text of the entries that are not kept, by row, where their file is not to be
            read again.
        images_of: The images, in the order of first use.
        image_ends: int64 [n], where the images of an entry end in `image_numbers`.
        image_numbers: int32, places in `images_of`; none of an entry that is not kept.
        records: The records of the entries that were kept before their images were looked for.
    """

    sources: list[str]
    starts: NDArray[np.int64]
    sample_ids: pa.ChunkedArray
    copies: dict[int, int]
    digests: NDArray[np.uint8]
    stamps: NDArray[np.uint8]
    verdicts: dict[int, Verdict]
    texts: dict[int, str]
    images_of: ImageTable
    image_ends: NDArray[np.int64]
    image_numbers: NDArray[np.int32]
    records: RecordFile

    def __len__(self) -> int:
        return len(self.sample_ids)

    @overload
    def __getitem__(self, row: int) -> PackedEntry: ...
    @overload
    def __getitem__(self, row: slice) -> list[PackedEntry]: ...
    def __getitem__(self, row: int | slice) -> PackedEntry | list[PackedEntry]:
        """An entry, with its record."""
        if isinstance(row, slice):
            return [self[place] for place in range(*row.indices(len(self)))]
        row = range(len(self))[row]
        source, record_id, sample_id = self.names(row)
        has_record = self.records.lengths[row] > 0
        return PackedEntry(
            source=source,
            record_id=record_id,
            sample_id=sample_id,
            digest=self.digests[row].tobytes(),
            packed=self.packed(row) if has_record else None,
            raw_json=self.texts.get(row),
            verdict=self.verdicts.get(row, KEPT),
        )

    @cached_property
    def kept(self) -> NDArray[np.int64]:
        """int64 [kept], the rows of the entries that are kept."""
        mask = np.ones(len(self), np.bool_)
        mask[np.fromiter(self.verdicts, np.int64, len(self.verdicts))] = False
        return np.flatnonzero(mask)

    def bad(self) -> Iterator[PackedEntry]:
        """The entries that are not kept, in order."""
        return (self[row] for row in sorted(self.verdicts))

    def names(self, row: int) -> tuple[str, str, str]:
        """Source, record id and sample id of an entry."""
        source = self.sources[int(np.searchsorted(self.starts, row, "right")) - 1]
        sample_id: str = self.sample_ids[row].as_py()
        copy = self.copies.get(row)
        record_id = sample_id[len(source) + 1 :].removesuffix(f"#{copy}" if copy else "")
        return source, record_id, sample_id

    def names_of(self, rows: NDArray[np.int64]) -> pa.ChunkedArray:
        """string, the sample ids of some entries; of rows in order only what lies between is read.

        Arrow joins all chunks of a column that places are taken from.
        """
        if not len(rows):
            return self.sample_ids.slice(0, 0)
        first, last = int(rows.min()), int(rows.max())
        part = self.sample_ids.slice(first, last + 1 - first)
        return (
            part
            if len(part) == len(rows) and last == int(rows[-1])
            else part.take(pa.array(rows - first))
        )

    def packed(self, row: int) -> bytes:
        """The record of an entry that has one, packed."""
        source, record_id, sample_id = self.names(row)
        return pack_names(record_id, sample_id, source) + self.records.read(row)

    @property
    def content_bytes(self) -> NDArray[np.uint32]:
        """uint32 [n], the bytes of each record, but for its names."""
        return self.records.lengths

    def images(self, row: int) -> tuple[str, ...]:
        """The identities of an entry's images."""
        start = int(self.image_ends[row - 1]) if row else 0
        return self.images_of.names(self.image_numbers[start : self.image_ends[row]].tolist())

    @property
    def image_counts(self) -> NDArray[np.int64]:
        """int64 [n], the images of each entry; entries that are no longer kept have theirs."""
        return np.diff(self.image_ends, prepend=0)

    def images_of_kept(self, values: NDArray[np.int32]) -> pa.ListArray:
        """List of int32 [kept], for each image of each kept entry what `values` has for it.

        Args:
            values: int32 [images], in the order of `images_of`.
        """
        counts, mask = self.image_counts, np.zeros(len(self), np.bool_)
        mask[self.kept] = True
        numbers = self.image_numbers[np.repeat(mask, counts)]
        ends = np.cumsum([0, *counts[self.kept]], dtype=np.int32)
        return pa.ListArray.from_arrays(pa.array(ends), pa.array(values[numbers], pa.int32()))

    def rows_with(self, verdicts: Mapping[int, Verdict]) -> dict[int, Verdict]:
        """The kept entries with one of these images, with the verdict on the first of theirs.

        Args:
            verdicts: By place in `images_of`.
        """
        if not verdicts:
            return {}
        bad = np.isin(self.image_numbers, np.fromiter(verdicts, np.int32, len(verdicts)))
        found: dict[int, Verdict] = {}
        for place in np.flatnonzero(bad).tolist():
            row = int(np.searchsorted(self.image_ends, place, "right"))
            if row not in self.verdicts:
                found.setdefault(row, verdicts[int(self.image_numbers[place])])
        return found

    def by_source(self) -> dict[str, int]:
        """Number of entries of each source that has any."""
        sizes = np.diff(self.starts).tolist()
        return {name: size for name, size in zip(self.sources, sizes, strict=True) if size}

    def kept_by_source(self) -> Counter[str]:
        """Number of kept entries of each source that has any."""
        bounds = np.searchsorted(self.kept, self.starts)
        pairs = zip(self.sources, np.diff(bounds).tolist(), strict=True)
        return Counter({name: size for name, size in pairs if size})

    def source_numbers(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The place of each row's source in `sources`."""
        return np.searchsorted(self.starts, rows, "right") - 1

    def with_verdicts(self, verdicts: Mapping[int, Verdict]) -> Entries:
        """The same entries, some with other verdicts."""
        return replace(self, verdicts={**self.verdicts, **verdicts})

    def lines(self, number: int) -> Iterator[str]:
        """Sample id, reason and digest of each entry of a source, many lines at a time."""
        first, last = self.starts[number : number + 2].tolist()
        for start in range(first, last, AT_ONCE):
            end = min(last, start + AT_ONCE)
            names = self.sample_ids.slice(start, end - start).to_pylist()
            digests = self.digests[start:end].tobytes().hex()
            yield "".join(
                f"{name}\t{self.verdicts.get(start + n, KEPT).reason}\t"
                f"{digests[32 * n : 32 * n + 32]}\n"
                for n, name in enumerate(names)
            )
