"""The distinct images of a build in columns: 16 bytes each beside the letters of its name."""

from __future__ import annotations

import hashlib
import json
import marshal
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lapilli.data.mounts import Located
from lapilli.data.mounts.places import Cell, Member
from lapilli.data.numbered import NumberedNames
from lapilli.data.planning.incremental import STAMP_BYTES, image_stamp
from lapilli.data.planning.originals import Originals
from lapilli.data.planning.parts.disk_column import DiskColumn
from lapilli.data.planning.shard_task import source_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ImageTable", "Images"]

WHOLE = -1  # an image that is a file of its own
AT_ONCE = 8192  # images that are made Python's at a time


class Images:
    """The distinct images of all sources so far, numbered in the order of first use."""

    def __init__(self) -> None:
        self.names = NumberedNames()
        self._sizes, self._times, self._inside = DiskColumn("<i8"), DiskColumn("<i8"), array("i")
        self._containers, self._container = NumberedNames(), array("i")
        self._members, self._member_ends = bytearray(), array("q", [0])

    def __len__(self) -> int:
        return len(self._inside)

    def number(self, place: Located) -> int:
        """The number of an image."""
        number = self.names.add(place.image_id)
        if number == len(self):
            self._sizes.append(place.size.to_bytes(8, "little", signed=True))
            self._times.append(place.mtime_ns.to_bytes(8, "little", signed=True))
            self._inside.append(self._part(place))
        return number

    def _part(self, place: Located) -> int:
        """The number of a place inside of a container; `WHOLE` for a file."""
        if place.member is None and place.container == place.image_id:
            return WHOLE
        member = place.member
        self._members += marshal.dumps(member and (isinstance(member, Cell), *member))
        self._member_ends.append(len(self._members))
        self._container.append(self._containers.add(place.container))
        return len(self._container) - 1

    def table(self) -> ImageTable:
        """All of them; no image can be added afterwards."""
        buffers = [None, pa.py_buffer(self._member_ends), pa.py_buffer(self._members)]
        return ImageTable(
            ids=self.names.column(),
            sizes=self._sizes.array(),
            times=self._times.array(),
            inside=np.frombuffer(self._inside, np.int32),
            containers=[*self._containers],
            container=np.frombuffer(self._container, np.int32),
            members=pa.Array.from_buffers(pa.large_binary(), len(self._container), buffers),
        )


@dataclass(frozen=True)
class ImageTable:
    """Where each of n images is.

    Attributes:
        ids: large_string [n], their identities.
        sizes: int64 [n], bytes of their containers; in a file.
        times: int64 [n], when their containers were last written, in ns; in a file.
        inside: int32 [n], the row of an image that is part of a container in the next columns; -1
            for a file.
        containers: The containers.
        container: int32 [parts], places in `containers`.
        members: large_binary [parts], which part, by marshal.
    """

    ids: pa.Array
    sizes: NDArray[np.int64]
    times: NDArray[np.int64]
    inside: NDArray[np.int32]
    containers: list[str]
    container: NDArray[np.int32]
    members: pa.Array

    def __len__(self) -> int:
        return len(self.ids)

    def only(self, numbers: NDArray[np.int64]) -> ImageTable:
        """The images of these numbers, in this order."""
        if len(numbers) == len(self):
            return self
        return ImageTable(
            ids=self.ids.take(pa.array(numbers)),
            sizes=self.sizes[numbers],
            times=self.times[numbers],
            inside=self.inside[numbers],
            containers=self.containers,
            container=self.container,
            members=self.members,
        )

    def names(self, numbers: Iterable[int]) -> tuple[str, ...]:
        """The identities of some images."""
        return tuple(self.ids[number].as_py() for number in numbers)

    def place(self, number: int) -> Located:
        """Where an image is."""
        return self.places(number, number + 1)[0]

    def places(self, start: int, stop: int) -> list[Located]:
        """Where the images of a stretch of numbers are."""
        part = slice(start, stop)
        columns = (self.sizes[part], self.times[part], self.inside[part])
        return [
            self._located(image_id, size, mtime_ns, row)
            for image_id, size, mtime_ns, row in zip(
                self.ids[part].to_pylist(), *(one.tolist() for one in columns), strict=True
            )
        ]

    def _located(self, image_id: str, size: int, mtime_ns: int, row: int) -> Located:
        if row == WHOLE:
            return Located(image_id=image_id, container=image_id, size=size, mtime_ns=mtime_ns)
        return Located(
            image_id=image_id,
            container=self.containers[self.container[row]],
            size=size,
            mtime_ns=mtime_ns,
            member=_member(self.members[row].as_py()),
        )

    @property
    def source_bytes(self) -> int:
        """Bytes of all images' files or members."""
        parts = np.flatnonzero(self.inside != WHOLE)
        whole = int(self.sizes.sum()) - int(self.sizes[parts].sum())
        return whole + sum(source_bytes(self.place(number)) for number in parts.tolist())

    def stamps(self, originals: Originals) -> NDArray[np.uint8]:
        """uint8 [n, 8], what tells each image's file from another under its name; in a file."""
        found = DiskColumn(np.uint8, STAMP_BYTES)
        for start in range(0, len(self), AT_ONCE):
            for place in self.places(start, start + AT_ONCE):
                found.append(originals.stamp(place) or image_stamp(place))
        return found.array()

    def digest(self, stamps: NDArray[np.uint8]) -> str:
        """`manifest.digest` of each image's identity and stamp, without a list of all of them."""
        found, separator = hashlib.sha256(b"["), ""
        for start in range(0, len(self), AT_ONCE):
            names = self.ids[start : start + AT_ONCE].to_pylist()
            marks = stamps[start : start + AT_ONCE].tobytes().hex()
            pairs = [[name, marks[16 * n : 16 * n + 16]] for n, name in enumerate(names)]
            text = json.dumps(pairs, ensure_ascii=False, separators=(",", ":"))[1:-1]
            found.update(f"{separator}{text}".encode("utf-8", "surrogatepass"))
            separator = ","
        found.update(b"]")
        return found.hexdigest()


def _member(packed: bytes) -> Member | Cell | None:
    fields: tuple[Any, ...] | None = marshal.loads(packed)
    if fields is None:
        return None
    return (Cell if fields[0] else Member)(*fields[1:])
