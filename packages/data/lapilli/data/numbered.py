"""Distinct names and their numbers, without a Python object for each."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa

__all__ = ["NamesByForm", "NumberedNames"]

SPELLING = "surrogatepass"  # names of files need not be UTF-8
EMPTY = -1


class NumberedNames(Mapping[str, int]):
    """Names by the order in which they were added: 14 to 20 bytes each beside the letters.

    An open-addressed table of numbers over one stretch of letters. A dict of texts takes 150 bytes
    more.
    """

    def __init__(self) -> None:
        self._letters = bytearray()
        self._ends = array("q", [0])
        self._table = array("i", [EMPTY] * 16)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[str]:
        """The names in order."""
        return map(self.name, range(len(self)))

    def __getitem__(self, name: str) -> int:
        """The number of a name."""
        if (number := self.find(name)) < 0:
            raise KeyError(name)
        return number

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.find(name) >= 0

    def name(self, number: int) -> str:
        """The name of a number."""
        return self._letters[self._ends[number] : self._ends[number + 1]].decode("utf-8", SPELLING)

    def find(self, name: str) -> int:
        """The number of a name, or -1."""
        return self._table[self._place(name, name.encode("utf-8", SPELLING))]

    def add(self, name: str) -> int:
        """The number of a name, which is a new one if the name is."""
        data = name.encode("utf-8", SPELLING)
        place = self._place(name, data)
        if (number := self._table[place]) >= 0:
            return number
        number = self._table[place] = len(self)
        self._letters += data
        self._ends.append(len(self._letters))
        if 3 * len(self) > 2 * len(self._table):
            self._grow()
        return number

    def column(self) -> pa.Array:
        """The names as large_string, in order. No name can be added while it is there."""
        buffers = [None, pa.py_buffer(self._ends), pa.py_buffer(self._letters)]
        return pa.Array.from_buffers(pa.large_string(), len(self), buffers)

    def _place(self, name: str, data: bytes) -> int:
        """Where a name's number is in the table, or would be."""
        table, ends, letters = self._table, self._ends, self._letters
        most = len(table) - 1
        place = hash(name) & most
        while (number := table[place]) >= 0:
            start, end = ends[number], ends[number + 1]
            if end - start == len(data) and letters.startswith(data, start):
                break
            place = (place + 1) & most
        return place

    def _grow(self) -> None:
        table = self._table = array("i", [EMPTY]) * (2 * len(self._table))
        most = len(table) - 1
        for number, name in enumerate(self):
            place = hash(name) & most
            while table[place] >= 0:
                place = (place + 1) & most
            table[place] = number


class NamesByForm:
    """Names by a form of theirs that several may share: 12 bytes a name."""

    def __init__(self, names: Sequence[str] | NumberedNames, form: Callable[[str], str]) -> None:
        """Of all these names.

        Args:
            names: The names.
            form: Gives a name's form.
        """
        self._form = form
        self._name = names.name if isinstance(names, NumberedNames) else names.__getitem__
        found = np.fromiter((hash(form(name)) for name in names), np.int64, len(names))
        self._order = np.argsort(found, kind="stable").astype(np.uint32)
        self._hashes = found[self._order]

    def get(self, form: str) -> list[str]:
        """The names of a form, in order."""
        first = np.searchsorted(self._hashes, hash(form), "left")
        last = np.searchsorted(self._hashes, hash(form), "right")
        names = map(self._name, self._order[first:last].tolist())
        return [name for name in names if self._form(name) == form]
