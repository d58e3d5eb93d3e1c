"""Names, sizes and depths that no honest file has: the rest is read, in little memory."""

from __future__ import annotations

import gzip
import io
import json
import struct
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lapilli.data.config import BuildConfig, SourceConfig
from lapilli.data.errors import DataError
from lapilli.data.images.view import ImageSpec
from lapilli.data.mounts import Located, Mount, read_image
from lapilli.data.planning.plan import plan_build
from lapilli.data.record import Reason, Verdict
from lapilli.data.sources.reading import bounds, json_scanner
from lapilli.data.sources.reading.patterns import MOST_NAMES, expand_braces
from lapilli.data.sources.reading.tar_members import key_and_suffix
from pipelines.check import main as check
from tests.conftest import ROOT
from tests.data.source_files import entries, refused, write_lines
from tests.factories import conversation, image_bytes, make_tokenizer

JPEG = image_bytes("jpeg")
DEEP = "a/" * 3000 + "x.jpg"
TURNS = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
TALK = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def reasons(root: Path, **config: Any) -> list[Reason | None]:
    return [entry.verdict.reason for entry in entries(root, **config)]


def place_of(root: Path, key: str) -> Located | Verdict:
    return Mount(root).locate(key)


def assert_found(root: Path, key: str) -> None:
    place = place_of(root, key)
    assert isinstance(place, Located), place
    assert read_image(root, place) == JPEG


# ---- archives and folders ----------------------------------------------------------------------

NAMES = {
    "deep": DEEP,
    "deep as a folder": "b/" * 3000,
    "empty": "",
    "a dot": ".",
    "a slash": "/",
    "dots": "../../x.jpg",
    "digits": "9" * 5000,
    "backslashes": "c\\" * 3000 + "x.jpg",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_member_of_any_name_does_not_matter_to_others(
    tmp_path: Path, name: str, kind: str
) -> None:
    path = tmp_path / f"m.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for member in (name, "good.jpg"):
                archive.writestr(zipfile.ZipInfo(member), JPEG)
    else:
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for member in (name, "good.jpg"):
                info = tarfile.TarInfo(member)
                info.size = len(JPEG)
                tar.addfile(info, io.BytesIO(JPEG))
    assert_found(tmp_path, f"m.{kind}/good.jpg")


def test_a_zip_with_a_name_that_is_not_utf_8_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.writestr("é.jpg", JPEG)  # flagged as UTF-8
        archive.writestr("good.jpg", JPEG)
    data = (tmp_path / "m.zip").read_bytes().replace("é".encode(), b"\xff\xfe")
    (tmp_path / "m.zip").write_bytes(data)
    assert_found(tmp_path, "m.zip/good.jpg")


def header(name: str, size: bytes) -> bytes:
    """The header of a tar's member; GNU's form, with a size as it is given."""
    block = bytearray(512)
    block[: len(name)] = name.encode()
    block[100:108], block[108:116], block[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    block[124:136], block[136:148], block[148:156] = size, b"00000000000\0", b" " * 8
    block[156:157], block[257:265] = b"0", b"ustar  \0"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def negative(size: int) -> bytes:
    return (size & (1 << 88) - 1 | 0xFF << 88).to_bytes(12)


@pytest.mark.parametrize("size", [-1, -256, -512, -513, -4096, -(1 << 62)])
def test_a_negative_size_is_that_members_verdict(tmp_path: Path, size: int) -> None:
    """-512 leads `tarfile` back to the same header for ever."""
    good = header("good.jpg", b"%011o\0" % len(JPEG)) + JPEG + bytes(-len(JPEG) % 512)
    for place, content in (
        ("after", header("x.jpg", negative(size)) + good),
        ("before", good + header("x.jpg", negative(size))),
    ):
        (tmp_path / f"{place}.tar").write_bytes(content + bytes(1024))
        bad = place_of(tmp_path, f"{place}.tar/x.jpg")
        assert isinstance(bad, Verdict)
        assert bad.reason == Reason.IMAGE_UNDECODABLE
        assert_found(tmp_path, f"{place}.tar/good.jpg")


def test_a_build_quarantines_the_record_of_a_negative_size(tmp_path: Path) -> None:
    (tmp_path / "n.tar").write_bytes(header("x.jpg", negative(-256)) + bytes(1024))
    (tmp_path / "good.jpg").write_bytes(JPEG)
    records = [conversation(key, key) for key in ("good.jpg", "n.tar/x.jpg")]
    (tmp_path / "a.json").write_text(json.dumps(records))
    plan = plan_build(
        BuildConfig(
            str(tmp_path),
            str(tmp_path / "out"),
            [SourceConfig("s", "a.json")],
            str(make_tokenizer(tmp_path / "tokenizer")),
            "v1",
            {"v": ImageSpec(32, (0, 0, 0))},
            max_quarantined=1.0,
        )
    )
    found = {entry.record_id: entry.verdict.reason for entry in plan.entries}
    assert found == {"good.jpg": None, "n.tar/x.jpg": Reason.IMAGE_UNDECODABLE}


@pytest.mark.parametrize("chain", [3, 5000])
def test_headers_of_headers_end(tmp_path: Path, chain: int) -> None:
    long_name = header("@LongLink", b"%011o\0" % 1)[:156] + b"L" + b"\0" * 355
    block = bytearray(long_name)
    block[257:265], block[148:156] = b"ustar  \0", b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    (tmp_path / "m.tar").write_bytes((bytes(block) + b"n" + bytes(511)) * chain + bytes(1024))
    assert isinstance(place_of(tmp_path, "m.tar/x.jpg"), Verdict)
    assert "no whole tar" in refused(tmp_path, annotations="m.tar", format="webdataset")


def test_a_zip_that_points_outside_of_itself_is_a_verdict(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.writestr("x.jpg", JPEG)
    data = bytearray((tmp_path / "m.zip").read_bytes())
    at = data.index(b"PK\1\2")
    struct.pack_into("<I", data, at + 42, 0xFFFFFF00)
    (tmp_path / "m.zip").write_bytes(data)
    verdict = place_of(tmp_path, "m.zip/x.jpg")
    assert isinstance(verdict, Verdict)
    assert verdict.reason == Reason.IMAGE_UNDECODABLE


@pytest.mark.parametrize("key", [DEEP, "", "9" * 5000, "\0", "a\\" * 3000, "%25" * 2000 + ".jpg"])
def test_a_key_of_any_form_is_a_verdict_and_others_are_found(tmp_path: Path, key: str) -> None:
    (tmp_path / "good.jpg").write_bytes(JPEG)
    mount = Mount(tmp_path)
    assert isinstance(mount.locate(key), Verdict)
    assert isinstance(mount.locate("good.jpg"), Located)


def test_links_in_circles_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "im"
    folder.mkdir()
    (folder / "good.jpg").write_bytes(JPEG)
    for name, target in (("self", "self"), ("a", "b"), ("b", "a"), ("up", "..")):
        (folder / name).symlink_to(target)
    assert_found(tmp_path, "im/good.jpg")
    assert isinstance(place_of(tmp_path, "im/self"), Verdict)
    write_lines(folder / "a.jsonl", [conversation("a")])
    found = entries(tmp_path, annotations="**/a.jsonl")
    assert [entry.record_id for entry in found] == ["a"]


def test_a_pattern_finds_a_file_below_a_thousand_folders(tmp_path: Path) -> None:
    deep = tmp_path
    for _ in range(1100):
        deep = deep / "d"
        deep.mkdir()
    write_lines(deep / "a.jsonl", [conversation("a")])
    found = entries(tmp_path, annotations="**/a.jsonl")
    (deep / "a.jsonl").unlink()
    while deep != tmp_path:  # `shutil.rmtree` does not go as deep
        deep.rmdir()
        deep = deep.parent
    assert len(found) == 1


@pytest.mark.parametrize(
    "pattern",
    [
        "{1..1000000000}",
        "{a..z}" * 9,
        "{x," + "{a,b}" * 40 + "}",
        "{" * 500 + "a,b" + "}" * 500,
        "{1..99999999999999999999}",
    ],
)
def test_braces_that_stand_for_too_many_files_are_one_line(tmp_path: Path, pattern: str) -> None:
    assert f"more than {MOST_NAMES} files" in refused(tmp_path, annotations=pattern)


def test_braces_of_few_files_are_all_of_them() -> None:
    assert expand_braces("{a..c}{08..10}") == [f"{a}{n}" for a in "abc" for n in ("08", "09", "10")]
    assert expand_braces("a}{b") == ["a}{b"]


@pytest.mark.parametrize(
    ("name", "parted"),
    [("a/b.0.jpg", ("a/b", "0.jpg")), ("b", None), ("x/.jpg", ("x/", "jpg")), (".jpg", None),
     ("a.b/.x", None), ("a.b/c/.x", ("a.b/c/", "x")), ("a/" * 2000, None)],
)  # fmt: skip
def test_a_members_key_is_webdatasets(name: str, parted: tuple[str, str] | None) -> None:
    from webdataset.tariterators import base_plus_ext

    assert key_and_suffix(name) == parted
    if len(name) < 100:
        assert (parted or (None, None)) == base_plus_ext(name)


# ---- records -----------------------------------------------------------------------------------

GOOD = json.dumps(conversation("good"))
BAD = {
    "deep": "[" * 50_000 + "]" * 50_000,
    "deep in a field": '{"id": "deep", "meta": ' + "[" * 50_000 + "]" * 50_000 + "}",
    "digits": '{"id": ' + "9" * 5000 + "}",
    "negative digits": '{"id": [-' + "9" * 5000 + "]}",
    "long": '{"id": "' + "x" * 3000 + '"}',
    "long with brackets": '{"id": "[{\\"' + "\\\\]}" * 1000 + '"}',
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("form", ["array", "lines", "gz"])
def test_a_record_that_cannot_be_read_is_a_verdict(tmp_path: Path, bad: str, form: str) -> None:
    texts = [GOOD, bad, GOOD, bad]
    text = f"[{', '.join(texts)}]" if form == "array" else "\n".join(texts) + "\n"
    data = gzip.compress(text.encode()) if form == "gz" else text.encode()
    (tmp_path / "a.json").write_bytes(data)
    found = reasons(tmp_path, annotations="a.json", max_record_bytes=2000)
    assert found == [None, Reason.SCHEMA, None, Reason.SCHEMA]


def test_the_bound_of_a_record_is_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(f"[{GOOD}]")
    size = len(GOOD)
    assert reasons(tmp_path, annotations="a.json", max_record_bytes=size) == [None]
    (entry,) = entries(tmp_path, annotations="a.json", max_record_bytes=size - 1)
    assert entry.verdict.detail == (
        f"a record of {size} bytes; `max_record_bytes` of its source is {size - 1}"
    )


def test_a_record_of_very_many_values_is_a_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 MB of `[]` would take 300 MB."""
    monkeypatch.setattr(bounds, "MOST_VALUES", 1000)
    monkeypatch.setattr(json_scanner, "WINDOW", 2000)
    (tmp_path / "a.json").write_text(f"[{GOOD}, [{'[],' * 4000}[]], {GOOD}]")
    assert reasons(tmp_path, annotations="a.json") == [None, Reason.SCHEMA, None]


def test_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    record = conversation("a\u2028b\x85c\x0b")
    text = json.dumps(record, ensure_ascii=False).replace("\\u000b", "\\u000b")
    (tmp_path / "a.jsonl").write_text(f"{text}\n{text}\r\n", encoding="utf-8", newline="")
    assert reasons(tmp_path, annotations="a.jsonl") == [None, None]


def zstd(data: bytes) -> bytes:
    return pa.compress(data, "zstd", asbytes=True)


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_a_packed_file_unpacks_to_a_bound(tmp_path: Path, pack: Any) -> None:
    (tmp_path / "a.jsonl").write_bytes(pack((GOOD + "\n").encode() + b"\n" * 100_000))
    assert reasons(tmp_path, annotations="a.jsonl") == [None]
    said = refused(tmp_path, annotations="a.jsonl", max_unpacked_bytes=50_000)
    assert "unpacks to more than 50000 bytes; raise `max_unpacked_bytes`" in said


@pytest.mark.parametrize("name", ["max_record_bytes", "max_unpacked_bytes"])
@pytest.mark.parametrize("value", [0, -1, 1 << 63])
def test_a_bound_is_a_number_of_bytes(name: str, value: int) -> None:
    with pytest.raises(DataError, match=rf"sources.{name}: {value} of source s; expected"):
        replace(SourceConfig("s", "a.json"), **{name: value})


def test_bounds_that_are_not_set_change_no_plan() -> None:
    assert "max_record_bytes" not in SourceConfig("s", "a.json").facts()
    assert SourceConfig("s", "a.json", max_record_bytes=7).facts()["max_record_bytes"] == 7


# ---- Parquet -----------------------------------------------------------------------------------


def write_table(root: Path, **columns: Any) -> None:
    rows = len(next(iter(columns.values())))
    talk = pa.array([TALK] * rows, TURNS)
    table = pa.table({"conversations": talk} | columns)
    pq.write_table(table, root / "t.parquet", compression="zstd", store_schema=False)


def parquet_reasons(root: Path, **config: Any) -> list[Reason | None]:
    return reasons(root, annotations="t.parquet", format="parquet", **config)


def test_text_that_is_not_utf_8_is_its_rows_verdict(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary())
    write_table(tmp_path, id=pa.Array.from_buffers(pa.string(), 3, raw.buffers()))
    assert parquet_reasons(tmp_path) == [None, Reason.SCHEMA, None]


@pytest.mark.parametrize("kind", [pa.timestamp("ms"), pa.timestamp("us", "UTC"), pa.date32()])
def test_a_date_that_python_has_none_for_is_its_rows_verdict(
    tmp_path: Path, kind: pa.DataType
) -> None:
    width = pa.int32() if kind == pa.date32() else pa.int64()
    far = 2**31 - 1 if kind == pa.date32() else 2**62
    numbers = pa.array([0, far, 1], width)
    write_table(tmp_path, id=pa.Array.from_buffers(kind, 3, numbers.buffers()))
    assert parquet_reasons(tmp_path) == [None, Reason.SCHEMA, None]


def test_a_zone_that_is_nowhere_is_a_verdict_and_nanoseconds_are_none(tmp_path: Path) -> None:
    write_table(tmp_path, id=pa.array([1, 2]).cast(pa.timestamp("ns")))
    assert parquet_reasons(tmp_path) == [None, None]


def bomb(root: Path, size: int, rows: int, **more: Any) -> None:
    one = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * size]))
    table = pa.table({"id": [str(n) for n in range(rows)], "conversations": one} | more)
    pq.write_table(table, root / "t.parquet", compression="zstd", store_schema=False)


BOMB = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (6_000_000_000,) * 2)
from pathlib import Path
from tests.data.test_hostile_files import parquet_reasons
from lapilli.data.images.buffers import peak_resident
from lapilli.data.record import Reason
found = parquet_reasons(Path(sys.argv[1]), max_record_bytes=4 << 20)
print(len(found), set(found) == {Reason.SCHEMA})
print(peak_resident() < 2 << 30)
"""


def test_a_value_that_many_rows_share_takes_its_memory_once(tmp_path: Path) -> None:
    """A few KB that unpack to 500 GB."""
    bomb(tmp_path, 8 << 20, 60_000)
    command = [sys.executable, "-c", BOMB, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.split() == ["60000", "True", "True"], done.stderr[-2000:]


def test_rows_that_unpack_to_too_much_are_one_line(tmp_path: Path) -> None:
    bomb(tmp_path, 1 << 20, 64)
    said = refused(tmp_path, annotations="t.parquet", format="parquet", max_unpacked_bytes=10 << 20)
    assert "unpacks to more than 10485760 bytes" in said


def test_a_large_row_is_a_verdict_and_others_are_read(tmp_path: Path) -> None:
    write_table(tmp_path, id=["a", "x" * 5000, "c"], other=["q"] * 3)
    assert parquet_reasons(tmp_path, max_record_bytes=4000) == [None, Reason.SCHEMA, None]


# ---- WebDataset --------------------------------------------------------------------------------


def test_a_large_member_is_its_samples_verdict(tmp_path: Path) -> None:
    files = {"0.jpg": JPEG, "0.txt": b"x" * 5000, "1.jpg": JPEG, "1.txt": b"a caption"}
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    config = {"annotations": "s.tar", "format": "webdataset", "max_record_bytes": 4000}
    assert reasons(tmp_path, **config) == [Reason.SCHEMA, None]


@pytest.mark.parametrize("mode", ["w:gz", "w:xz", "w:bz2"])
def test_a_compressed_tar_is_refused_before_it_is_unpacked(tmp_path: Path, mode: str) -> None:
    with tarfile.open(tmp_path / "s.tar", mode) as tar:  # type: ignore[call-overload]
        tar.addfile(tarfile.TarInfo("0.txt"))
    said = refused(tmp_path, annotations="s.tar", format="webdataset")
    assert "it is compressed, so that no member has a place: unpack it" in said


def test_the_check_names_a_bad_record_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(f"[{GOOD}, {BAD['deep']}]")
    (tmp_path / "r.yaml").write_text(
        "sources: [{name: s, annotations: a.json}]\ntemplate: v1\ntokenizer: ''\n"
        "views: {v: {size: 64, fill: [0, 0, 0]}}\n"
    )
    assert check([f"--config={tmp_path / 'r.yaml'}", f"--root={tmp_path}"]) == 1
    assert "schema 1, first s/@1: lists and objects nested too deeply" in capsys.readouterr().out
