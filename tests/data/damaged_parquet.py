"""Run by `test_hostile_parquet` in a process of its own, which a damaged file may end.

python -m tests.data.damaged_parquet FOLDER TIMES SEED
"""

from __future__ import annotations

import io
import random
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lapilli.data.config import SourceConfig
from lapilli.data.errors import DataError
from lapilli.data.images.view import BadImage
from lapilli.data.mounts import Located, Mount, read_image
from lapilli.data.sources.validation import read_entries
from tests.factories import conversation, image_bytes

__all__ = ["damaged", "other_lengths", "read_all", "tables"]

NAME = "t.parquet"
ROWS = 30
WAYS: list[dict[str, Any]] = [
    {"compression": "zstd"},
    {"compression": "none", "row_group_size": 10},
    {"compression": "snappy", "use_dictionary": False, "data_page_version": "2.0"},
    {"compression": "gzip", "use_dictionary": False, "column_encoding": {"id": "DELTA_BYTE_ARRAY"}},
]
WILD = (b"\xff\xff\xff\xff\x0f", b"\xfe\xff\xff\xff\x0f", b"\xff" * 9 + b"\x01", b"\0")


def tables() -> list[bytes]:
    """Files with columns of text, numbers, nested turns, and images alone and in lists."""
    jpeg = image_bytes("jpeg")
    images: list[dict[str, Any]] = [
        {"image": {"bytes": jpeg, "path": "1.jpg"}},
        {"images": [jpeg, jpeg]},
        {"image": jpeg},
    ]
    made: list[bytes] = []
    for image in images:
        rows = [
            {"id": f"{n}", "conversations": conversation("a")["conversations"], "width": n, **image}
            for n in range(ROWS)
        ]
        for way in WAYS:
            file = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(rows), file, **way)
            made.append(file.getvalue())
    return made


def damaged(data: bytes, chance: random.Random) -> bytes:
    """A file with wrong bytes in the headers of its pages or in its footer."""
    metadata = pq.ParquetFile(io.BytesIO(data)).metadata
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    columns = [group.column(n) for group in groups for n in range(group.num_columns)]
    pages = [c.data_page_offset for c in columns]
    pages += [c.dictionary_page_offset for c in columns if c.dictionary_page_offset]
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        in_footer = len(data) - 8 - chance.randrange(metadata.serialized_size)
        at = chance.choice((chance.choice(pages) + chance.randrange(40), in_footer))
        if chance.randrange(2):
            changed[at] = chance.choice((changed[at] ^ 1 << chance.randrange(8), 0, 127, 255))
        else:
            wild = chance.choice(WILD)
            changed[at : at + len(wild)] = wild
    return bytes(changed)


def other_lengths(data: bytes) -> Iterator[bytes]:
    """A file with each list of numbers in its footer, such as a histogram, one longer in turn.

    pyarrow's own view of a column ends the process for these.
    """
    end = len(data) - 8
    size = int.from_bytes(data[end : end + 4], "little")
    for at in range(end - size, end):
        if data[at] & 0xF == 6 and 0 < data[at] >> 4 < 6:  # Thrift: the head of a list of i64
            longer = data[:at] + bytes([data[at] + 0x10, 0]) + data[at + 1 : end]
            yield longer + (size + 1).to_bytes(4, "little") + b"PAR1"


def read_all(folder: Path) -> None:
    """Every record and some images of each column; verdicts and lines are no faults."""
    try:
        for entry in read_entries(SourceConfig("s", [NAME], format="parquet"), folder):
            entry.pack()
    except DataError as error:
        if "\n" in str(error):
            raise AssertionError("more than a line") from error
    for key in _keys():
        mount = Mount(folder)
        place = mount.locate(f"{NAME}/{key}")
        if isinstance(place, Located):
            try:
                read_image(folder, place)
            except BadImage:
                continue


def _keys() -> Iterator[str]:
    for row in (0, 11, ROWS - 1):
        yield f"image/{row}"
        yield f"images/{row}/1"


def _main() -> None:
    folder, times, seed = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    resource.setrlimit(resource.RLIMIT_AS, (4_000_000_000, 4_000_000_000))
    files = tables()
    by_chance = (
        damaged(files[number % len(files)], random.Random(f"{seed}/{number}"))
        for number in range(times)
    )
    for number, changed in enumerate((*other_lengths(files[0]), *by_chance)):
        (folder / NAME).write_bytes(changed)
        try:
            read_all(folder)
        except Exception as error:
            raise AssertionError(f"file {number} of seed {seed}") from error
    print("read")


if __name__ == "__main__":
    _main()
