"""The image slots of a build in columns: those of the dataset there, then the images it lacks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lapilli.data.mounts import Located
from lapilli.data.planning.incremental import STAMP_BYTES, UNUSED_STAMP, Previous, Stamped
from lapilli.data.planning.parts.image_table import AT_ONCE, ImageTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ImageSlots", "SlotPlaces", "arrange_slots", "binary_column"]

UNUSED = -1


@dataclass(frozen=True, eq=False)
class ImageSlots(Sequence[Stamped]):
    """The images of a build, which every view holds in the same order: image id and stamp by slot.

    The stamp of a slot without use is empty.

    Attributes:
        names: large_string [slots], image ids.
        stamps: uint8 [slots, 8]; see `image_stamp`.
        numbers: int32 [slots], places in `table`; -1 of a slot without use.
        table: The images in use.
        previous: The dataset that the output holds, if there is one.
    """

    names: pa.Array
    stamps: NDArray[np.uint8]
    numbers: NDArray[np.int32]
    table: ImageTable
    previous: Previous | None = None

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, slot: int) -> Stamped: ...
    @overload
    def __getitem__(self, slot: slice) -> list[Stamped]: ...
    def __getitem__(self, slot: int | slice) -> Stamped | list[Stamped]:
        """Image id and stamp of a slot, or of some."""
        if isinstance(slot, int):
            slot = range(len(self))[slot]
            return self[slot : slot + 1][0]
        stamps, used = self.stamps[slot].tobytes(), self.numbers[slot] != UNUSED
        return [
            (name, stamps[STAMP_BYTES * n : STAMP_BYTES * (n + 1)] if is_used else UNUSED_STAMP)
            for n, (name, is_used) in enumerate(
                zip(self.names[slot].to_pylist(), used.tolist(), strict=True)
            )
        ]

    def __iter__(self) -> Iterator[Stamped]:
        """All of them, many at a time."""
        for start in range(0, len(self), AT_ONCE):
            yield from self[start : start + AT_ONCE]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and [*self] == [*other]

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    @property
    def unused(self) -> int:
        """Number of slots without use."""
        return int((self.numbers == UNUSED).sum())

    def used_names(self) -> pa.Array:
        """large_string, the identities of the images in use, by slot."""
        return self.names.filter(pa.array(self.numbers != UNUSED)) if self.unused else self.names

    def of_images(self) -> NDArray[np.int32]:
        """int32 [images], the slot of each image of `table`."""
        slots = np.flatnonzero(self.numbers != UNUSED)
        found = np.zeros(len(self.table), np.int32)
        found[self.numbers[slots]] = slots
        return found

    def stamp_column(self) -> pa.Array:
        """Binary [slots], the stamps."""
        if not self.unused:
            return binary_column(self.stamps)
        return pa.array([stamp for _, stamp in self], pa.binary())


class SlotPlaces(Sequence[Located]):
    """Where the images of some slots are. Equal to a tuple of them, and pickled as one.

    A slot without use has a place without a container: nothing is read for it.
    """

    def __init__(self, slots: ImageSlots, start: int, stop: int) -> None:
        """Of the slots of a stretch."""
        self._slots, self._range = slots, range(start, stop)

    def __len__(self) -> int:
        return len(self._range)

    @overload
    def __getitem__(self, place: int) -> Located: ...
    @overload
    def __getitem__(self, place: slice) -> Self: ...
    def __getitem__(self, place: int | slice) -> Located | Self:
        """One of them, or some."""
        if isinstance(place, slice):
            part = self._range[place]
            return type(self)(self._slots, part.start, part.stop)
        slot = self._range[place]
        return SlotPlaces(self._slots, slot, slot + 1)._all()[0]

    def __iter__(self) -> Iterator[Located]:
        return iter(self._all())

    def _all(self) -> list[Located]:
        slots, part = self._slots, slice(self._range.start, self._range.stop)
        numbers = slots.numbers[part]
        if len(numbers) and numbers[0] != UNUSED and (np.diff(numbers) == 1).all():
            return slots.table.places(int(numbers[0]), int(numbers[-1]) + 1)
        names = slots.names[part].to_pylist()
        return [
            _unused(name) if number == UNUSED else slots.table.place(number)
            for name, number in zip(names, numbers.tolist(), strict=True)
        ]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (SlotPlaces, tuple)) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (tuple(self),)


def _unused(image_id: str) -> Located:
    return Located(image_id=image_id, container="", size=0, mtime_ns=0)


def arrange_slots(
    table: ImageTable, stamps: NDArray[np.uint8], previous: Previous | None
) -> ImageSlots:
    """The image slots: the dataset's own where they are, then the images it lacks.

    A slot whose image is used no more keeps its place, with an empty stamp.

    Args:
        table: The images in use, in the order of their first use.
        stamps: uint8 [images, 8], theirs.
        previous: The dataset that the output holds, if there is one.
    """
    if previous is None:
        numbers = np.arange(len(table), dtype=np.int32)
        return ImageSlots(names=table.ids, stamps=stamps, numbers=numbers, table=table)
    arrow: Any = pc
    known = pa.array([name for name, _ in previous.slots], pa.large_string())
    old = arrow.fill_null(arrow.index_in(known, value_set=table.ids), UNUSED).to_numpy()
    is_new = np.ones(len(table), np.bool_)
    is_new[old[old != UNUSED]] = False
    new = np.flatnonzero(is_new)
    numbers = np.concatenate([old, new]).astype(np.int32)
    return ImageSlots(
        names=pa.concat_arrays([known, table.ids.take(pa.array(new))]),
        stamps=np.where((numbers != UNUSED)[:, None], stamps[numbers], 0).astype(np.uint8)
        if len(table)
        else np.zeros((len(numbers), STAMP_BYTES), np.uint8),
        numbers=numbers,
        table=table,
        previous=previous,
    )


def binary_column(values: NDArray[np.uint8]) -> pa.Array:
    """Binary [n], of n values of as many bytes each."""
    size, width = values.shape
    ends = np.arange(0, (size + 1) * width, width, dtype=np.int32)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(np.ascontiguousarray(values))]
    return pa.Array.from_buffers(pa.binary(), size, buffers)
