"""Images inside of Parquet files: found, read by row group, and never taken for text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lapilli.data.config import SourceConfig
from lapilli.data.images.view import BadImage
from lapilli.data.mounts import Located, Mount, read_image, tables
from lapilli.data.planning.incremental import image_stamp
from lapilli.data.record import Entry, Verdict
from lapilli.data.sources.tally import Tally
from lapilli.data.sources.validation import read_entries
from tests.data.source_files import JPEG, entries, refused, write_parquet
from tests.factories import Mixture, build_dataset, conversation, image_bytes, make_tokenizer
from tests.object_store import serve_s3

BYTES = st.sampled_from([JPEG, b"one", b"", None])
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CONVERSATION = {"conversations": conversation("a", "x")["conversations"]}
TEXT = {"conversations": conversation("a")["conversations"]}
KINDS: dict[str, tuple[str, pa.DataType]] = {
    "struct": ("image", STRUCT),
    "struct without a path": ("image", pa.struct([("bytes", pa.large_binary())])),
    "binary": ("image", pa.binary()),
    "list": ("images", pa.list_(STRUCT)),
    "large list": (
        "images",
        pa.large_list(pa.struct([("path", pa.string()), ("bytes", pa.binary())])),
    ),
    "list of binary": ("images", pa.list_(pa.binary())),
    "dictionary": ("image", pa.dictionary(pa.int32(), pa.binary())),
    "list of dictionary": ("images", pa.list_(pa.dictionary(pa.int32(), pa.binary()))),
}


def located(root: Path, key: str, prefix: str = ".") -> Located:
    place = Mount(root, prefix).locate(key)
    assert isinstance(place, Located), place
    return place


def read(root: Path, name: str = "a.parquet", **config: Any) -> list[Entry]:
    return entries(root, annotations=name, format="parquet", **config)


def table(rows: list[dict[str, Any]], column: str, kind: pa.DataType) -> pa.Table:
    """Rows of a conversation with an image column of this kind."""
    turns = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
    return pa.Table.from_pylist(rows, pa.schema([("conversations", turns), (column, kind)]))


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    rows=st.lists(
        st.none() | st.lists(st.tuples(BYTES, st.sampled_from(["p.jpg", None])), max_size=3),
        min_size=1,
        max_size=6,
    ),
    group=st.integers(1, 7),
    statistics=st.booleans(),
)
def test_a_key_of_a_row_is_its_bytes_or_its_path(
    tmp_path: Path, kind: str, rows: list[Any], group: int, statistics: bool
) -> None:
    """Whatever is null, with counts of nulls in the footer and without, in groups of any size."""
    column, of = KINDS[kind]
    is_list = column == "images"
    inner: Any = of.value_type if is_list else of
    is_struct = pa.types.is_struct(inner)
    has_path = is_struct and inner.num_fields == 2

    def as_cell(image: tuple[bytes | None, str | None]) -> Any:
        if not is_struct:
            return image[0]
        return {"bytes": image[0]} | ({"path": image[1]} if has_path else {})

    values = [
        None
        if row is None
        else [as_cell(i) for i in row]
        if is_list
        else (as_cell(row[0]) if row else None)
        for row in rows
    ]
    elements = [{**CONVERSATION, column: value} for value in values]
    path = tmp_path / "a.parquet"
    pq.write_table(
        table(elements, column, of), path, row_group_size=group, write_statistics=statistics
    )
    found = read(tmp_path)
    assert len(found) == len(rows)
    for number, (entry, value) in enumerate(zip(found, values, strict=True)):
        expected = _keys(value, f"a.parquet/{column}/{number}", is_list, has_path)
        if None in expected:  # a struct of two nulls in a list
            assert entry.verdict.reason == "schema"
            continue
        assert entry.record is not None
        assert entry.record.images == tuple(expected)
        for key, data in zip(entry.record.images, _bytes(value, is_list), strict=False):
            if data is not None:
                assert read_image(tmp_path, located(tmp_path, key)) == data


def _bytes(value: Any, is_list: bool) -> list[bytes | None]:
    items = value if is_list else [value]
    return [i.get("bytes") if isinstance(i, dict) else i for i in items or [] if i is not None]


def _keys(value: Any, key: str, is_list: bool, has_path: bool) -> list[str | None]:
    if value is None:
        return []
    found: list[str | None] = []
    for index, item in enumerate(value if is_list else [value]):
        data = item.get("bytes") if isinstance(item, dict) else item
        path = item.get("path") if has_path and item is not None else None
        own = f"{key}/{index}" if is_list else key
        found.append(own if data is not None else path)
    # A column that is null altogether, or a lone null, is no image at all.
    return [] if found == [None] and not is_list else found


def test_no_bytes_are_read_for_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file as `datasets` writes it, nothing but texts, paths and the footer."""
    rows = [{**CONVERSATION, "image": {"bytes": JPEG, "path": None}}, {**TEXT, "image": None}]
    pq.write_table(table(rows * 4, "image", STRUCT), tmp_path / "a.parquet", row_group_size=3)
    asked: set[str] = set()
    iterate = pq.ParquetFile.iter_batches

    def watched(self: pq.ParquetFile, *args: Any, columns: list[str], **more: Any) -> Iterator[Any]:
        asked.update(columns)
        return iterate(self, *args, columns=columns, **more)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    found = read(tmp_path)
    assert [entry.verdict.kept for entry in found] == [True] * 8
    for entry in found:
        for key in entry.record.images if entry.record else ():
            located(tmp_path, key)
    assert not [leaf for leaf in asked if leaf.endswith("bytes")]
    assert "image.path" in asked


def test_two_groups_are_kept_and_each_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**CONVERSATION, "image": JPEG + bytes([n])} for n in range(12)]
    pq.write_table(table(rows, "image", pa.binary()), tmp_path / "a.parquet", row_group_size=3)
    groups: list[int] = []
    real = tables._read_group  # pyright: ignore[reportPrivateUsage]

    def counted(identity: Any, open_file: Any, cell: Any) -> Any:
        groups.append(cell.group)
        return real(identity, open_file, cell)

    monkeypatch.setattr(tables, "_read_group", counted)
    order = [0, 1, 3, 2, 4, 5, 6, 8, 7, 9, 10, 11]  # as readers of several threads ask
    for row in order:
        place = located(tmp_path, f"a.parquet/image/{row}")
        assert read_image(tmp_path, place) == JPEG + bytes([row])
    assert groups == [0, 1, 2, 3]
    assert len(tables._groups) <= 2  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize(
    "key",
    ["image/12", "image/-1", "image/01", "image/1.jpg", "image", "other/0", "image/0/0", "image/x",
     "image/\u0661"],
)  # fmt: skip
def test_a_key_that_is_no_row_is_missing(tmp_path: Path, key: str) -> None:
    rows = [{**CONVERSATION, "image": JPEG}] * 12
    pq.write_table(table(rows, "image", pa.binary()), tmp_path / "a.parquet")
    verdict = Mount(tmp_path).locate(f"a.parquet/{key}")
    assert isinstance(verdict, Verdict)
    assert verdict.reason == "image_missing"


def test_a_place_without_an_image_or_in_a_damaged_group_says_so(tmp_path: Path) -> None:
    rows = [{**CONVERSATION, "images": [JPEG]}, {**CONVERSATION, "images": None}]
    path = tmp_path / "a.parquet"
    pq.write_table(
        table(rows, "images", pa.list_(pa.binary())), path, compression="none", use_dictionary=False
    )
    for key in ("images/0/1", "images/1/0"):
        with pytest.raises(BadImage, match="no image in this row") as caught:
            read_image(tmp_path, located(tmp_path, f"a.parquet/{key}"))
        assert caught.value.reason == "image_undecodable"
    data = bytearray(path.read_bytes())
    at = data.index(JPEG)
    data[at - 4 : at] = b"\xff\xff\xff\x7f"  # the length of the value
    path.write_bytes(bytes(data))
    with pytest.raises(BadImage, match="damaged in its file"):
        read_image(tmp_path, located(tmp_path, "a.parquet/images/0/0"))
    path.write_bytes(path.read_bytes()[:-20])
    verdict = Mount(tmp_path).locate("a.parquet/images/0/0")
    assert isinstance(verdict, Verdict)
    assert "is no whole Parquet file" in verdict.detail


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [{**CONVERSATION, "image": JPEG}]
    pq.write_table(table(rows, "image", pa.binary()), path)
    place = located(tmp_path, "a.parquet/image/0")
    assert read_image(tmp_path, place) == JPEG
    os.utime(path, ns=(1, place.mtime_ns + 1))
    with pytest.raises(BadImage, match="written again after the build was planned"):
        read_image(tmp_path, place)
    assert image_stamp(located(tmp_path, "a.parquet/image/0")) != image_stamp(place)


# ---- what is beside the images -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("audio", {"bytes": b"RIFF", "path": None}, "unsupported_field"),
        ("jpg", b"\xff\xd8", "unsupported_field"),
        ("thumbnails", [{"bytes": b"x", "path": None}], "unsupported_field"),
        ("extra_bytes", {"inner": {"raw": b"x"}}, "unsupported_field"),
        ("audio", {"bytes": None, "path": None}, None),
        ("jpg", b"", "unsupported_field"),
        ("embedding", [0.5, 1.5], None),
    ],
)
def test_bytes_that_are_no_image_of_the_record_are_never_passed_over(
    tmp_path: Path, column: str, value: Any, reason: str | None
) -> None:
    write_parquet(tmp_path / "a.parquet", [{**TEXT, column: value}, {**TEXT, column: None}])
    tally = Tally()
    source = SourceConfig("s", "a.parquet", format="parquet")
    first, second = read_entries(source, tmp_path, tally=tally)
    assert first.verdict.reason == reason
    assert second.verdict.kept
    assert tally.fields == ({column: 1} if column == "embedding" else {})


def test_bytes_beside_an_image_are_counted(tmp_path: Path) -> None:
    rows = [{**CONVERSATION, "image": JPEG, "thumbnail": b"x"}]
    write_parquet(tmp_path / "a.parquet", rows)
    tally = Tally()
    (entry,) = read_entries(SourceConfig("s", "a.parquet", format="parquet"), tmp_path, tally=tally)
    assert entry.verdict.kept
    assert tally.fields == {"thumbnail": 1}


def test_images_inside_of_turns_and_outside_of_the_folder_are_one_line(tmp_path: Path) -> None:
    parts = [{"type": "image", "image": {"bytes": JPEG}}]
    write_parquet(tmp_path / "a.parquet", [{"messages": [{"role": "user", "content": parts}]}])
    assert "holds bytes inside the turns" in refused(
        tmp_path, annotations="a.parquet", format="parquet"
    )
    write_parquet(tmp_path / "a.parquet", [{**CONVERSATION, "image": JPEG}])
    (tmp_path / "images").mkdir()
    assert "set `images` to a folder or an address above it" in refused(
        tmp_path, annotations="a.parquet", format="parquet", images="images"
    )


# ---- in a bucket, and as a dataset -------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder behind `s3://tables`, with one file of three row groups."""
    folder = tmp_path_factory.mktemp("s3")
    (folder / "tables" / "train").mkdir(parents=True)
    pictures = [image_bytes("jpeg", 12, 9, seed=n) for n in range(6)]
    rows = [
        {
            "texts": [{"user": "What is it?", "assistant": "A goat."}],
            "images": [{"bytes": data, "path": None}],
        }
        for data in pictures
    ]
    write_parquet(folder / "tables" / "train" / "0.parquet", rows, row_group_size=2)
    with serve_s3(folder):
        yield folder / "tables"


@pytest.mark.parametrize("where", ["s3://tables", "."])
def test_a_dataset_of_a_table_is_the_same_from_a_bucket(
    bucket: Path, tmp_path: Path, where: str
) -> None:
    """Also with `keep_original`, whose bytes are those of the file."""
    root = tmp_path if where != "." else bucket
    name = f"{where}/train/*.parquet" if where != "." else "train/*.parquet"
    source = SourceConfig("s", name, where, format="parquet")
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    report = build_dataset(
        Mixture(root, [source], {}, []), tmp_path / "out", tokenizer, keep_original=True
    )
    assert (report.manifest.counts["kept"], report.manifest.counts["images"]) == (6, 6)
    shard = report.manifest.views["original"].shards[0]
    with pa.memory_map(str(tmp_path / "out" / shard.path)) as file:
        stored = pa.ipc.open_file(file).read_all()
    start = f"{where}/" if where != "." else ""
    assert stored["image_id"].to_pylist() == [
        f"{start}train/0.parquet/images/{n}/0" for n in range(6)
    ]
    assert stored["pixels"].to_pylist() == [image_bytes("jpeg", 12, 9, seed=n) for n in range(6)]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"annotations": "s3://tables/none/*.parquet"}, "no file matches"),
        ({"annotations": ["s3://tables/train/0.parquet", "a.parquet"]}, "an address above it"),
        ({"annotations": "s3://tables/train/0.parquet"}, "set `images` to a folder or an address"),
    ],
)
def test_what_is_wrong_with_an_address_is_one_line(
    bucket: Path, tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    assert words in refused(tmp_path, format="parquet", **config)
    assert bucket.is_dir()


@pytest.mark.parametrize("of", [pa.binary(), STRUCT])
def test_a_list_of_one_length_holds_images(tmp_path: Path, of: pa.DataType) -> None:
    """Arrow's `fixed_size_list`, which Parquet keeps as any list; null rows among them."""
    cells = [[b"one", b"two"], None, [b"three", b"four"]]
    if pa.types.is_struct(of):
        cells = [c and [{"bytes": one, "path": None} for one in c] for c in cells]
    turns = [
        TEXT["conversations"] if c is None else conversation("a", ["x", "y"])["conversations"]
        for c in cells
    ]
    rows = [{"conversations": t, "images": c} for t, c in zip(turns, cells, strict=True)]
    pq.write_table(table(rows, "images", pa.list_(of, 2)), tmp_path / "a.parquet", row_group_size=2)
    found = read(tmp_path)
    keys = [entry.record.images for entry in found if entry.record is not None]
    assert keys == [
        ("a.parquet/images/0/0", "a.parquet/images/0/1"),
        (),
        ("a.parquet/images/2/0", "a.parquet/images/2/1"),
    ]
    bytes_of = [read_image(tmp_path, located(tmp_path, key)) for row in keys for key in row]
    assert bytes_of == [b"one", b"two", b"three", b"four"]
