"""Bound the memory of a Parquet file's values before they are read.

A value that is once in a chunk's dictionary may be named by a million rows, in a few bytes of
the file. What the dictionary holds is looked at first; a chunk whose values would take too much is
read as indices into it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lapilli.data.mounts.parquet_footer import Chunk
from lapilli.data.mounts.parquet_pages import Pages

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DAMAGED_VALUES", "Reopen", "Shared", "holds_any", "longest_value", "row_sizes"]

Reopen: TypeAlias = Callable[[Sequence[str]], pq.ParquetFile]
DICTIONARIES = frozenset({"PLAIN_DICTIONARY", "RLE_DICTIONARY"})
PROBED = 64  # rows
PER_VALUE = 8  # bytes that any value counts for
# What pyarrow raises for values that Python has none for: texts that are no UTF-8, dates after
# the year 9999, time zones that are nowhere.
DAMAGED_VALUES = (ValueError, OverflowError, KeyError, TypeError, pa.ArrowException)


class Shared(NamedTuple):
    """What a leaf holds in a row group that many rows may share.

    Attributes:
        longest: Bytes of the longest value that rows share, 0 where none is shared.
        values: How many values there are.
        total: The most bytes that all of them unpack to.
        is_indexed: Whether they can be read as indices into a dictionary.
    """

    longest: int
    values: int
    total: int
    is_indexed: bool


def longest_value(
    chunk: Chunk, reopen: Reopen, look: Callable[[Chunk], Pages], group: int, leaf: str
) -> Shared:
    """What rows of a row group share in a leaf.

    Args:
        chunk: The leaf's values there, as the footer has them.
        reopen: Opens the file once more, to read the leaves of these paths as indices.
        look: Looks at the pages of a chunk (`read_pages`).
        group: The row group.
        leaf: Dotted path of the leaf.

    Raises:
        pa.ArrowInvalid: As `read_pages`.
    """
    pages, count = look(chunk), chunk.num_values
    has_dictionary = pages.has_dictionary or not DICTIONARIES.isdisjoint(pages.encodings)
    longest, total, is_indexed = pages.longest, pages.linked, False
    if has_dictionary and chunk.physical_type == "FIXED_LEN_BYTE_ARRAY":
        longest, total = max(longest, chunk.type_length), chunk.type_length * count
    elif has_dictionary and chunk.physical_type == "BYTE_ARRAY":
        # Where the first rows hold nothing the dictionary is not read yet.
        batches = reopen([leaf]).iter_batches(PROBED, row_groups=[group], columns=[leaf])
        found = (_longest(batch.column(0)) for batch in batches)
        longest = max(longest, next(filter(None, found), 0))
        total, is_indexed = longest * count, True
    return Shared(longest, count, total, is_indexed)


def _longest(values: pa.Array) -> int:
    """Bytes of the longest value of the dictionary inside an array."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        lengths = pc.call_function("binary_length", [values.dictionary])
        return int(pc.call_function("max", [lengths]).as_py() or 0)
    if _is_list(kind):
        return _longest(values.values)
    if pa.types.is_struct(kind):
        return max((_longest(values.field(n)) for n in range(kind.num_fields)), default=0)
    return 0


def row_sizes(values: pa.Array) -> NDArray[np.int64]:
    """Bytes of each value of an array, int64 [n], whatever is inside of it.

    Every value counts for `PER_VALUE` bytes beside its text. Dictionaries are not unpacked.
    """
    return _sizes(values, PER_VALUE)


def holds_any(values: pa.Array) -> NDArray[np.bool_]:
    """Whether each value of an array, bool [n], is or holds a text or bytes, be they empty."""
    return _sizes(values, 0) > 0


def _sizes(values: pa.Array, per_value: int) -> NDArray[np.int64]:
    kind = values.type
    own = np.full(len(values), per_value, np.int64)
    if pa.types.is_dictionary(kind):
        sizes = _sizes(values.dictionary, per_value)
        return _of_valid(values, sizes[_filled(values.indices)]) if len(sizes) else own
    if _is_list(kind):
        inner = np.concatenate(([0], np.cumsum(_sizes(values.values, per_value))))
        if pa.types.is_fixed_size_list(kind):
            starts = (np.arange(len(values) + 1) + values.offset) * kind.list_size
        else:
            starts = values.offsets.to_numpy(zero_copy_only=False)
        return np.asarray(own + inner[starts[1:]] - inner[starts[:-1]], np.int64)
    if pa.types.is_struct(kind):
        fields = (_sizes(values.field(n), per_value) for n in range(kind.num_fields))
        return sum(fields, start=own)
    if _is_text(kind):
        lengths = pc.call_function("binary_length", [values])
        return own + _of_valid(values, _filled(lengths) + 1)
    return own


def _of_valid(values: pa.Array, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    valid = values.is_valid().to_numpy(zero_copy_only=False)
    return np.where(valid, sizes, 0).astype(np.int64)


def _filled(numbers: pa.Array) -> NDArray[np.int64]:
    return numbers.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)


def _is_list(kind: pa.DataType) -> bool:
    checks = (
        pa.types.is_list,
        pa.types.is_large_list,
        pa.types.is_map,
        pa.types.is_fixed_size_list,
    )
    return any(check(kind) for check in checks)


def _is_text(kind: pa.DataType) -> bool:
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary,
              pa.types.is_large_binary)  # fmt: skip
    return any(check(kind) for check in checks)
