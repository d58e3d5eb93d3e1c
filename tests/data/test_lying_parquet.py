"""Parquet files whose pages unpack to more than their footers say."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lapilli.data.mounts.parquet_footer import read_footer
from lapilli.data.mounts.parquet_pages import read_pages
from tests.conftest import ROOT
from tests.data.lying_parquet import Fields, Page, rewritten, varint

MEMORY = 3_000_000_000
READ = """
import resource, sys
from pathlib import Path
from lapilli.data.config import SourceConfig
from lapilli.data.errors import DataError
from lapilli.data.images.view import BadImage
from lapilli.data.mounts import Mount, read_image
from lapilli.data.sources.validation import read_entries
resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
root = Path(sys.argv[1])
try:
    next(iter(read_entries(SourceConfig("s", ["t.parquet"], format="parquet"), root)))
    print("a row")
except DataError as error:
    print(error)
if "image" in sys.argv:
    place = Mount(root).locate("t.parquet/image/0")
    try:
        print(len(read_image(root, place)))
    except BadImage as error:
        print(error)
""".replace("MEMORY", str(MEMORY))
COUNT, LEAF = 1 << 17, "texts.list.element"
Change = Callable[[list[Page], Fields], list[Page]]


def talk(rows: int) -> pa.Array:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    kind = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
    return pa.array([turns] * rows, kind)


def plain(meta: Fields) -> None:
    """The footer knows of no encoding but PLAIN."""
    meta[2] = (9, (5, [0]))


def hidden(pages: list[Page], meta: Fields) -> list[Page]:
    plain(meta)
    return pages


def run_length(*runs: tuple[int, int]) -> bytes:
    body = b"".join(varint(count << 1) + bytes([value]) for count, value in runs)
    return len(body).to_bytes(4, "little") + body


def deltas(count: int, first: int, step: int) -> bytes:
    block = -(-count // 128) * 128
    return (
        varint(block) + varint(4) + varint(count) + varint(2 * first) + varint(2 * step) + bytes(4)
    )


def one_page(encoding: int, count: int, body: bytes, told: int) -> Change:
    """A page of so many values, of which the footer tells `told`."""

    def change(pages: list[Page], meta: Fields) -> list[Page]:
        plain(meta)
        meta[5] = (6, told)
        header = pages[-1][0]
        header[5] = (12, {1: (5, count), 2: (5, encoding), 3: (5, 3), 4: (5, 3)})
        return [(header, body)]

    return change


IN_A_LIST = run_length((1, 0), (COUNT - 1, 1)) + run_length((COUNT, 3))
GROWING = IN_A_LIST + deltas(COUNT, 0, 1) + deltas(COUNT, 1, 0) + b"x" * COUNT
NULLS = run_length((1, 0), ((1 << 28) - 1, 1)) + run_length((1 << 28, 2))
WILD = (
    run_length((1, 1)) + varint(1 << 30) + varint(4) + varint((1 << 31) - 1) + bytes(6) + bytes(8)
)
TEXT = '[{"from": "human", "value": "' + "x" * (4 << 20) + '"}]'
PLAIN_LIST: dict[str, Any] = {"compression": "none", "use_dictionary": False}


def dictionary() -> pa.Table:
    shared = pa.DictionaryArray.from_arrays(pa.array([0] * 1024, pa.int32()), pa.array([TEXT]))
    return pa.table({"id": [str(n) for n in range(1024)], "conversations": shared})


def lists() -> pa.Table:
    return pa.table({"id": ["1"], "texts": pa.array([["x"]]), "conversations": talk(1)})


def image(rows: int) -> pa.Table:
    same = pa.DictionaryArray.from_arrays(
        pa.array([0] * rows, pa.int32()), pa.array([b"x" * (4 << 20)])
    )
    return pa.table(
        {"id": [str(n) for n in range(rows)], "image": same, "conversations": talk(rows)}
    )


@pytest.mark.parametrize(
    ("table", "leaf", "change", "options", "said"),
    [
        (dictionary, "conversations", hidden, {"compression": "zstd"}, "a row"),
        (lists, LEAF, one_page(7, COUNT, GROWING, COUNT), PLAIN_LIST, "values in lists, of 8590"),
        (lists, LEAF, one_page(7, COUNT, GROWING, 1), PLAIN_LIST, "a page of 131072 values"),
        (lists, LEAF, one_page(0, 1 << 28, NULLS, 1 << 28), PLAIN_LIST, "268435456 values in"),
        (lists, LEAF, one_page(0, 1 << 28, NULLS, 1), PLAIN_LIST, "a page of 268435456 values"),
        (lists, "id", one_page(6, 1, WILD, 1), PLAIN_LIST, "2147483647 values; it has 1"),
        (lists, "id", one_page(7, 1, WILD, 1), PLAIN_LIST, "2147483647 values; it has 1"),
        (lambda: image(1200), "image", hidden, {"compression": "zstd"}, "a row\n4194304"),
    ],
)
def test_a_footer_that_hides_what_pages_hold_takes_no_memory(
    tmp_path: Path,
    table: Callable[[], pa.Table],
    leaf: str,
    change: Change,
    options: dict[str, Any],
    said: str,
) -> None:
    data = rewritten(table(), leaf, change, store_schema=False, **options)
    (tmp_path / "t.parquet").write_bytes(data)
    command = [sys.executable, "-c", READ, str(tmp_path), leaf]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, said in done.stdout) == (0, True), done.stdout + done.stderr[-2000:]


def texts(rows: int) -> list[str | None]:
    chance = np.random.default_rng(1)
    made = [None if n % 7 == 0 else f"{n % 9}/" * int(chance.integers(9)) for n in range(rows)]
    return ["x" * 3000, *made[1:]]


def written(writer: str, table: pa.Table) -> io.BytesIO:
    file = io.BytesIO()
    if writer == "polars":
        polars.DataFrame(polars.from_arrow(table)).write_parquet(file)
    elif writer == "small":
        pq.write_table(table, file, data_page_size=64)
    else:
        encoding, version, codec = writer.split()
        encodings = {"flat": encoding, "list.list.element": encoding}
        how: dict[str, Any] = {"data_page_version": version, "compression": codec}
        pq.write_table(table, file, use_dictionary=False, column_encoding=encodings, **how)
    return file


WRITERS = [
    "polars",
    "small",
    *(
        f"{encoding} {version} {codec}"
        for encoding in ("PLAIN", "DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY")
        for version in ("1.0", "2.0")
        for codec in ("none", "snappy", "zstd", "gzip", "brotli", "lz4")
    ),
]


@pytest.mark.parametrize("writer", WRITERS)
def test_pages_of_other_writers_are_what_their_footers_say(writer: str) -> None:
    flat = texts(2000)
    table = pa.table({"flat": flat, "list": [flat[n : n + n % 5] for n in range(2000)]})
    file = written(writer, table)
    for chunk in read_footer(pq.ParquetFile(file)).groups[0].chunks.values():
        for ahead in (False, True):
            found = read_pages(file, chunk, ahead=ahead)
            assert found.has_dictionary == chunk.has_dictionary
            assert found.encodings <= chunk.encodings
            if "DELTA_BYTE_ARRAY" in writer:
                own = flat
                if chunk.max_repetition:
                    own = [text for texts in table["list"].to_pylist() for text in texts]
                lengths = [len(text) for text in own if text is not None]
                assert (found.longest, found.linked) == (max(lengths), sum(lengths))
            else:
                assert (found.longest, found.linked) == (0, 0)
