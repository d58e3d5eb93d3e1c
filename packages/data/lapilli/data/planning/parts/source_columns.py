"""Put the parts of one source together: images found, ids unique, contradictions taken back."""

from __future__ import annotations

import marshal
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lapilli.data.mounts import Located, Mount
from lapilli.data.planning.incremental import STAMP_BYTES, row_stamp
from lapilli.data.planning.originals import Originals
from lapilli.data.planning.parts.disk_column import DiskColumn
from lapilli.data.planning.parts.image_table import Images
from lapilli.data.planning.parts.record_file import RecordFile
from lapilli.data.planning.parts.scan_part import Part
from lapilli.data.planning.parts.unique_ids import EarlyIds, RecordIds
from lapilli.data.record import Reason, Record, Verdict, pack_names, unpack
from lapilli.data.sources.tally import Tally

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["SourceColumns"]

_ARROW: Any = pc
EXCLUDED = Verdict(Reason.EXCLUDED, "named in `exclude`")


@dataclass
class SourceColumns:
    """The elements of one source, n of them; rows count from its first.

    Attributes:
        name: The source.
        mount: Where its images are found.
        images: The images of all sources; this one's are added.
        records: The records of all sources; this one's are added.
        tally: What the source holds beside its records.
        excluded: The sample ids that were named in `exclude` and found.
        sample_ids: string [n], in a chunk for each part.
        copies: By row; see `Entries`.
        digests: uint8 [n, 16], in a file.
        stamps: uint8 [n, 8], in a file.
        counts: int32 [n], images of each entry.
        numbers: int32, the numbers of the images of one entry after another.
        verdicts: Of the entries that are not kept.
        texts: JSON text of the entries that are not kept.
    """

    name: str
    mount: Mount
    images: Images
    records: RecordFile
    tally: Tally
    excluded: set[str] = field(default_factory=set[str])
    sample_ids: pa.ChunkedArray = field(default_factory=lambda: pa.chunked_array([], pa.string()))
    copies: dict[int, int] = field(default_factory=dict[int, int])
    digests: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, 16), np.uint8))
    stamps: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, STAMP_BYTES), np.uint8))
    counts: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    numbers: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    verdicts: dict[int, Verdict] = field(default_factory=dict[int, Verdict])
    texts: dict[int, str] = field(default_factory=dict[int, str])
    count: int = 0

    def read(
        self,
        parts: Iterator[Part],
        exclude: set[str],
        originals: Originals,
        told: Callable[[int], None],
    ) -> None:
        """Take all parts, in order.

        Args:
            parts: The parts.
            exclude: Sample ids of records to leave out, of any source.
            originals: Images that the dataset in the output holds.
            told: Called with the number of entries so far.

        Raises:
            DataError, BadCut: As the parts do.
        """
        own = {name for name in exclude if name.startswith(f"{self.name}/")}
        prefix = len(self.name) + 1
        early = EarlyIds(None if originals else (name[prefix:] for name in own))
        first = len(self.records)
        ids = RecordIds()
        digests, stamps = DiskColumn(np.uint8, 16), DiskColumn(np.uint8, STAMP_BYTES)
        found = {name: bytearray() for name in ("counts", "numbers")}
        stale = array("q")
        for part in parts:
            table, size = part.table, len(part.table)
            record_ids = self._named(table, stale)
            ids.add(record_ids)
            digests.append(_bytes_of(table["digest"], 16))
            own_stamps = table["stamp"].fill_null(b"\0" * STAMP_BYTES)
            stamps.append(_bytes_of(own_stamps, STAMP_BYTES))
            self.records.append(table["content"])
            names = early.of(record_ids.to_pylist()) if early else {}
            self._judge(table, names, own)
            located = self._locate(table, names, originals, stale, first)
            counts = np.zeros(size, np.int32)
            rows = np.fromiter(located, np.int64, len(located))
            counts[rows] = [len(numbers) for numbers in located.values()]
            found["counts"] += counts.tobytes()
            numbers = [n for numbers in located.values() for n in numbers]
            found["numbers"] += np.array(numbers, np.int32).tobytes()
            for name, times in part.fields.items():
                self.tally.count((name,), times)
            self.count += size
            told(self.count)
        self.mount.forget_listings()
        if not self.count:
            return
        self.digests, self.stamps = digests.array(), stamps.array()
        self.counts = np.frombuffer(found["counts"], np.int32)
        self.numbers = np.frombuffer(found["numbers"], np.int32)
        self._name(ids, stale)
        self._settle(first)
        self._stamp_again(stale, first)

    def _named(self, table: pa.Table, stale: array[int]) -> pa.Array:
        """The record ids; an element without one is called by its place."""
        column = table["record_id"].combine_chunks()
        if column.null_count:
            stale.extend((self.count + np.flatnonzero(column.is_null().to_numpy(False))).tolist())
            named = (
                f"@{self.count + n}" if name is None else name
                for n, name in enumerate(column.to_pylist())
            )
            return pa.array(list(named), pa.string())
        return _copied(column)

    def _judge(self, table: pa.Table, names: dict[int, str], own: set[str]) -> None:
        """Take the verdicts of a part, and those on the records to leave out."""
        reasons, details = table["reason"], table["detail"]
        for row in np.flatnonzero(reasons.is_valid().to_numpy()).tolist():
            verdict = Verdict(Reason(reasons[row].as_py()), details[row].as_py())
            self._refuse(table, row, verdict)
        for row, record_id in names.items():
            if (sample_id := f"{self.name}/{record_id}") in own:
                self.excluded.add(sample_id)
                self._refuse(table, row, EXCLUDED)

    def _refuse(self, table: pa.Table, row: int, verdict: Verdict) -> None:
        self.verdicts[self.count + row] = verdict
        if (text := table["raw_json"][row].as_py()) is not None:
            self.texts[self.count + row] = text

    def _locate(
        self, table: pa.Table, names: dict[int, str], originals: Originals, stale: array[int],
        first: int,
    ) -> dict[int, list[int]]:  # fmt: skip
        """The numbers of the images of each entry of a part that is kept and has some."""
        found: dict[int, list[int]] = {}
        below = f"{self.mount.below}/" if self.mount.below else ""
        for row, packed in enumerate(table["images"].to_pylist()):
            if packed is None or self.count + row in self.verdicts:
                continue
            keys: tuple[str, ...] = marshal.loads(packed)
            if not originals and (known := self._known(keys)) is not None:
                found[row] = known
                continue
            places = _located(self.mount, keys)
            if isinstance(places, Verdict):
                held: tuple[Located, ...] = ()
                if originals and places.reason == Reason.IMAGE_MISSING:
                    content = self.records.read(first + self.count + row)
                    sample_id = f"{self.name}/{names[row]}"
                    record_id = table["record_id"][row].as_py() or f"@{self.count + row}"
                    named = pack_names(record_id, sample_id, self.name)
                    held = originals.locate(sample_id, named + content)
                if not held:
                    self._refuse(table, row, places)
                    continue
                places = held
            found[row] = [self.images.number(place) for place in places]
            if any(p.image_id != f"{below}{key}" for p, key in zip(places, keys, strict=True)):
                stale.append(self.count + row)
        return found

    def _known(self, keys: tuple[str, ...]) -> list[int] | None:
        """The numbers of images that are all there as their keys say and known by now."""
        find, identity = self.images.names.find, self.mount.identity
        numbers: list[int] = []
        for key in keys:
            if (number := find(identity(key))) < 0:
                return None
            numbers.append(number)
        return numbers

    def _name(self, ids: RecordIds, stale: array[int]) -> None:
        """Make the ids unique."""
        renamed, self.copies = ids.unique()
        stale.extend(renamed)
        made: list[pa.Array] = []
        start, left = 0, deque(renamed)
        for chunk in ids.take_chunks():
            end = start + len(chunk)
            if left and left[0] < end:
                names: list[str] = chunk.to_pylist()
                while left and left[0] < end:
                    row = left.popleft()
                    names[row - start] = renamed[row]
                chunk = pa.array(names, pa.string())
            start = end
            made.append(_ARROW.binary_join_element_wise(self.name, chunk, "/"))
        self.sample_ids = pa.chunked_array(made, pa.string())

    def _settle(self, first: int) -> None:
        """Quarantine the entries of which a key's repair is taken back."""
        verdicts = self.mount.settle(self._keys(first))
        if not verdicts:
            return
        for row in np.flatnonzero(self.counts).tolist():
            keys = self._record(row, first).images
            verdict = next((verdicts[key] for key in keys if key in verdicts), None)
            if verdict is not None:
                self.verdicts[row] = verdict
        taken = np.zeros(self.count, np.bool_)
        taken[np.fromiter(self.verdicts, np.int64, len(self.verdicts))] = True
        self.numbers = self.numbers[~np.repeat(taken, self.counts)]
        self.counts[taken] = 0

    def _keys(self, first: int) -> Iterator[str]:
        """The keys that images were looked for by, in order: none behind one that was refused."""
        for row in np.flatnonzero(self.records.lengths[first:]).tolist():
            if self.verdicts.get(row) == EXCLUDED:
                continue
            for key in self._record(row, first).images:
                yield key
                if self.mount.is_refused(key):
                    break

    def _record(self, row: int, first: int) -> Record:
        return unpack(pack_names("", "", self.name) + self.records.read(first + row))

    def _stamp_again(self, stale: array[int], first: int) -> None:
        """Stamp the entries whose names or images are not what their part took them for."""
        ends = np.cumsum(self.counts, dtype=np.int64)
        for row in np.unique(np.frombuffer(stale, np.int64)).tolist():
            if row in self.verdicts:
                continue
            sample_id: str = self.sample_ids[row].as_py()
            copy = self.copies.get(row)
            record_id = sample_id[len(self.name) + 1 :].removesuffix(f"#{copy}" if copy else "")
            packed = pack_names(record_id, sample_id, self.name) + self.records.read(first + row)
            own = self.numbers[ends[row] - self.counts[row] : ends[row]].tolist()
            stamp = row_stamp(packed, [*map(self.images.names.name, own)])
            self.stamps[row] = np.frombuffer(stamp, np.uint8)


def _located(mount: Mount, keys: tuple[str, ...]) -> tuple[Located, ...] | Verdict:
    """The places of all keys, or the verdict on the first that has none."""
    found: list[Located] = []
    for key in keys:
        place = mount.locate(key)
        if isinstance(place, Verdict):
            return place
        found.append(place)
    return tuple(found)


def _copied(array: pa.Array) -> pa.Array:
    """The same values in memory of this process: a part lies in that of Ray's store."""
    return _ARROW.binary_join_element_wise(array, "", "")


def _bytes_of(column: pa.ChunkedArray, width: int) -> memoryview:
    """The values of a column of that many bytes each, one after the other."""
    array: Any = column.combine_chunks()
    start = array.offset * width
    return memoryview(array.buffers()[1])[start : start + len(array) * width]
