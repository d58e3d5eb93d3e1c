"""Put the parts of one source together: images found, ids unique, contradictions taken back."""

from __future__ import annotations

import marshal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lapilli.data.mounts import Located, Mount
from lapilli.data.planning.incremental import STAMP_BYTES, row_stamp
from lapilli.data.planning.originals import Originals
from lapilli.data.planning.parts.record_file import RecordFile
from lapilli.data.planning.parts.scan_part import Part
from lapilli.data.planning.parts.unique_ids import EarlyIds, unique_ids
from lapilli.data.record import Reason, Record, Verdict, pack_names, unpack
from lapilli.data.sources.tally import Tally

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Images", "SourceColumns"]

EXCLUDED = Verdict(Reason.EXCLUDED, "named in `exclude`")


@dataclass
class Images:
    """The distinct images of all sources, numbered in the order of first use."""

    places: list[Located] = field(default_factory=list[Located])
    numbers: dict[str, int] = field(default_factory=dict[str, int])

    def number(self, place: Located) -> int:
        """The number of an image."""
        number = self.numbers.setdefault(place.image_id, len(self.places))
        if number == len(self.places):
            self.places.append(place)
        return number


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
        sample_ids: large_string [n].
        copies: int32 [n]; see `Entries`.
        digests: uint8 [n, 16].
        stamps: uint8 [n, 8].
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
    sample_ids: pa.Array = field(default_factory=lambda: pa.array([], pa.large_string()))
    copies: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
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
        first = len(self.records.lengths)
        ids: list[pa.Array] = []
        digests: list[NDArray[np.uint8]] = []
        stamps: list[NDArray[np.uint8]] = []
        counts: list[NDArray[np.int32]] = []
        numbers: list[NDArray[np.int32]] = []
        stale: list[int] = []
        for part in parts:
            table, size = part.table, len(part.table)
            ids.append(self._named(table, stale))
            digests.append(_bytes_of(table["digest"], 16))
            stamps.append(_bytes_of(table["stamp"].fill_null(b"\0" * STAMP_BYTES), STAMP_BYTES))
            self.records.append(table["content"])
            names = early.of(ids[-1].to_pylist()) if early else {}
            self._judge(table, names, own)
            located = self._locate(table, names, originals, stale, first)
            counts.append(np.zeros(size, np.int32))
            rows = np.fromiter(located, np.int64, len(located))
            counts[-1][rows] = [len(found) for found in located.values()]
            numbers.append(np.array([n for found in located.values() for n in found], np.int32))
            for name, times in part.fields.items():
                self.tally.count((name,), times)
            self.count += size
            told(self.count)
        if not self.count:
            return
        self.digests, self.stamps = np.concatenate(digests), np.concatenate(stamps)
        self.counts, self.numbers = np.concatenate(counts), np.concatenate(numbers)
        self._name(pa.chunked_array(ids, pa.large_string()), stale)
        self._settle(first)
        self._stamp_again(stale, first)

    def _named(self, table: pa.Table, stale: list[int]) -> pa.Array:
        """The record ids; an element without one is called by its place."""
        column = table["record_id"].cast(pa.large_string()).combine_chunks()
        if column.null_count:
            stale += (self.count + np.flatnonzero(column.is_null().to_numpy(False))).tolist()
            named = (
                f"@{self.count + n}" if name is None else name
                for n, name in enumerate(column.to_pylist())
            )
            column = pa.array(list(named), pa.large_string())
        return column

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
        self, table: pa.Table, names: dict[int, str], originals: Originals, stale: list[int],
        first: int,
    ) -> dict[int, list[int]]:  # fmt: skip
        """The numbers of the images of each entry of a part that is kept and has some."""
        found: dict[int, list[int]] = {}
        below = f"{self.mount.below}/" if self.mount.below else ""
        for row, packed in enumerate(table["images"].to_pylist()):
            if packed is None or self.count + row in self.verdicts:
                continue
            keys: tuple[str, ...] = marshal.loads(packed)
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

    def _name(self, ids: pa.ChunkedArray, stale: list[int]) -> None:
        """Make the ids unique."""
        renamed, copies = unique_ids(ids)
        stale += renamed
        self.copies = np.zeros(self.count, np.int32)
        self.copies[np.fromiter(copies, np.int64, len(copies))] = [*copies.values()]
        made: list[pa.Array] = []
        start = 0
        for chunk in ids.chunks:
            own = {row - start: renamed[row] for row in renamed if 0 <= row - start < len(chunk)}
            names: list[str] = chunk.to_pylist()
            for row, name in own.items():
                names[row] = name
            made.append(pa.array([f"{self.name}/{name}" for name in names], pa.large_string()))
            start += len(chunk)
        self.sample_ids = pa.concat_arrays(made)

    def _settle(self, first: int) -> None:
        """Quarantine the entries of which a key's repair is taken back."""
        verdicts = self.mount.settle()
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

    def _record(self, row: int, first: int) -> Record:
        return unpack(pack_names("", "", self.name) + self.records.read(first + row))

    def _stamp_again(self, stale: list[int], first: int) -> None:
        """Stamp the entries whose names or images are not what their part took them for."""
        ends = np.cumsum(self.counts, dtype=np.int64)
        for row in sorted(set(stale)):
            if row in self.verdicts:
                continue
            sample_id: str = self.sample_ids[row].as_py()
            copy = int(self.copies[row])
            record_id = sample_id[len(self.name) + 1 :].removesuffix(f"#{copy}" if copy else "")
            packed = pack_names(record_id, sample_id, self.name) + self.records.read(first + row)
            own = self.numbers[ends[row] - self.counts[row] : ends[row]].tolist()
            stamp = row_stamp(packed, [self.images.places[number].image_id for number in own])
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


def _bytes_of(column: pa.ChunkedArray, width: int) -> NDArray[np.uint8]:
    """uint8 [n, width], a copy of values of that many bytes each."""
    array: Any = column.combine_chunks()
    data = np.frombuffer(array.buffers()[1], np.uint8)
    start = array.offset * width
    return data[start : start + len(array) * width].reshape(-1, width).copy()
