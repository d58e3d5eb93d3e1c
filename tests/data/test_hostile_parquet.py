"""Parquet files whose footers and pages say what is not so: verdicts or a line, never an abort."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lapilli.data.mounts.parquet_footer import read_footer
from tests.conftest import ROOT
from tests.data.damaged_parquet import tables


def read_apart(folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "tests.data.damaged_parquet", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "read\n"), done.stderr[-3000:]


def test_wrong_bytes_in_pages_and_footers_end_no_process(tmp_path: Path) -> None:
    read_apart(tmp_path, "300", "1")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_many_wrong_bytes_end_no_process(tmp_path: Path) -> None:
    read_apart(tmp_path, "12000", "2")


def test_a_footer_is_what_pyarrow_reads() -> None:
    for data in tables():
        file = pq.ParquetFile(io.BytesIO(data))
        found = read_footer(file)
        assert len(found.groups) == file.metadata.num_row_groups
        for number, group in enumerate(found.groups):
            expected = file.metadata.row_group(number)
            assert group.num_rows == expected.num_rows
            for place, chunk in enumerate(group.chunks.values()):
                column = expected.column(place)
                assert chunk.physical_type == column.physical_type
                assert chunk.num_values == column.num_values
                assert chunk.null_count == column.statistics.null_count
                assert chunk.has_dictionary == column.has_dictionary_page
                assert chunk.uncompressed == column.total_uncompressed_size
                assert chunk.encodings <= {*column.encodings}
