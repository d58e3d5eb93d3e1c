"""Read a dataset's quarantine.parquet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lapilli.data.errors import DataError
from lapilli.data.io.access import cannot_read, is_denied
from lapilli.data.io.remote_path import Output

__all__ = ["QUARANTINE", "read_quarantine"]

QUARANTINE = "quarantine.parquet"
COLUMNS = ("source", "record_id", "sample_id", "reason", "detail", "record")


def read_quarantine(dataset: Output, columns: Sequence[str] = COLUMNS) -> pa.Table:
    """The records that were left out: texts, one row each, none null but `record`.

    Raises:
        DataError: The file is missing, damaged, or cannot be read.
    """

    def read(source: Any) -> pa.Table:
        return pq.read_table(source, columns=[*columns])

    file = dataset / QUARANTINE
    why = "no such file"
    try:
        table = read(file) if isinstance(file, Path) else file.read_with(read)
        table.validate(full=True)
        why = _problem(table, columns)
        if not why:
            return table
    except (OSError, pa.ArrowException) as error:
        if is_denied(error):
            raise DataError(cannot_read(file, error)) from None
        why = type(error).__name__
    raise DataError(f"{file}: missing or damaged ({why}); run `lapilli repair {dataset}`")


def _problem(table: pa.Table, columns: Sequence[str]) -> str:
    for name in columns:
        if name not in table.column_names:
            return f"column {name} is missing"
        if table.schema.field(name).type != pa.string():
            return f"column {name} is {table.schema.field(name).type}"
        if name != "record" and table[name].null_count:
            return f"column {name} has nulls"
    return ""
