"""Bounds on the size of one record and of one unpacked file.

A record that exceeds a bound is quarantined; reading continues with the next.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

from lapilli.data.config import MOST_RECORD, MOST_UNPACKED, SourceConfig
from lapilli.data.errors import DataError

__all__ = [
    "BOUNDS", "TOO_DEEP", "TOO_MANY", "Bounds", "Unreadable", "bounded_lines", "bounded_stream",
    "holds_too_much", "too_large", "why_unreadable",
]  # fmt: skip

MOST_VALUES = 1 << 22  # of a record: an empty list of 3 characters takes 72 bytes of memory
TOO_DEEP = "lists and objects nested too deeply to be read"
TOO_MANY = f"a record of more than {MOST_VALUES} values"
SKIPPED = 1 << 20


@dataclass(frozen=True, slots=True)
class Bounds:
    """Most bytes of a record, and most bytes that a compressed file may unpack to."""

    record: int = MOST_RECORD
    unpacked: int = MOST_UNPACKED

    @staticmethod
    def of(config: SourceConfig) -> Bounds:
        """A source's."""
        return Bounds(config.max_record_bytes, config.max_unpacked_bytes)


BOUNDS = Bounds()


@dataclass(frozen=True, slots=True)
class Unreadable:
    """An element that could not be read, in the place of it.

    Attributes:
        detail: Why, as a verdict has it.
        begin: How it begins in its file; empty where that is not known.
    """

    detail: str
    begin: str = ""


def why_unreadable(error: Exception) -> str | None:
    """Why a JSON text that may be valid was not parsed; None where it is not valid."""
    if isinstance(error, RecursionError):
        return TOO_DEEP
    if isinstance(error, (json.JSONDecodeError, UnicodeError)):
        return None
    return f"a number of more digits than are read ({sys.get_int_max_str_digits()})"


def too_large(size: str, most: int) -> str:
    """The detail of a record that is over the bound; `size` says how much of what it has."""
    return f"a record of {size}; `max_record_bytes` of its source is {most}"


def holds_too_much(text: str | bytes) -> bool:
    """Whether a JSON text may have more than `MOST_VALUES` values."""
    if len(text) <= MOST_VALUES:  # each of them is a character at least
        return False
    marks = (",", "[", "{") if isinstance(text, str) else (b",", b"[", b"{")
    return sum(text.count(mark) for mark in marks) > MOST_VALUES  # type: ignore[arg-type]


def bounded_lines(file: BinaryIO, most: int) -> Iterator[bytes | Unreadable]:
    r"""The lines of a file, which end at `\n` and nowhere else; longer ones are passed over."""
    while line := file.readline(most + 1):
        if len(line) <= most or line.endswith(b"\n"):
            yield line
            continue
        size, more = len(line), line
        while more and not more.endswith(b"\n"):
            more = file.readline(SKIPPED)
            size += len(more)
        yield Unreadable(too_large(f"{size} bytes", most), line[:200].decode("utf-8", "replace"))


class _Bounded(io.RawIOBase):
    """What a packed file unpacks to, up to a bound."""

    def __init__(self, file: BinaryIO, name: str, most: int) -> None:
        self._file, self._name, self._most = file, name, most
        self._left = most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._file.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise DataError(
                f"annotations: {self._name} unpacks to more than {self._most} bytes; raise "
                "`max_unpacked_bytes` of its source if it may, or unpack it"
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def bounded_stream(file: BinaryIO, name: str, most: int) -> BinaryIO:
    """A file that is unpacked while it is read, for no more than `most` bytes.

    Reading raises `DataError` beyond that, with the file's name.
    """
    return cast("BinaryIO", io.BufferedReader(_Bounded(file, name, most), 1 << 16))
