"""The columns of the file that tells which image and record each slot and row was made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from lapilli.data.planning.incremental import Stamped
from lapilli.data.planning.parts.entry_views import StampedRows
from lapilli.data.planning.parts.image_slots import ImageSlots, binary_column

__all__ = ["input_columns"]


def input_columns(slots: ImageSlots, groups: Iterable[Sequence[Stamped]]) -> dict[str, pa.Array]:
    """The columns of the file that `read_previous` reads: the slots, then the token rows.

    Args:
        slots: The image slots.
        groups: The rows of each token shard.
    """
    names, stamps = [slots.names.cast(pa.string())], [slots.stamp_column()]
    for rows in groups:
        if isinstance(rows, StampedRows):
            names += rows.names().chunks
            stamps.append(binary_column(rows.stamps()))
        else:
            names.append(pa.array([name for name, _ in rows], pa.string()))
            stamps.append(pa.array([stamp for _, stamp in rows], pa.binary()))
    column = pa.concat_arrays(names)
    is_record = (np.arange(len(column)) >= len(slots)).astype(np.int8)
    return {
        "kind": pa.array(["image", "record"]).take(pa.array(is_record)),
        "name": column,
        "stamp": pa.concat_arrays(stamps),
    }
