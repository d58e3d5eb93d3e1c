"""Annotation files as people have them: compressed, in many parts, at an address, or none."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from lapilli.data.config import SourceConfig
from lapilli.data.images.view import ImageSpec
from lapilli.data.planning.scan import survey
from lapilli.data.record import Entry, Reason, element_json
from pipelines.check import CheckConfig
from pipelines.check import main as check_main
from tests.data.source_files import entries, refused
from tests.factories import conversation, image_bytes

RECORDS = [conversation(f"r{n}", turns=1 + n % 3) for n in range(40)]


def ids(found: list[Entry]) -> list[str]:
    return [entry.record_id for entry in found]


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


PACKERS: dict[str, Any] = {"gz": gzip.compress, "xz": lzma.compress, "zst": zstd}


@pytest.mark.parametrize("kind", PACKERS)
@pytest.mark.parametrize("form", ["array", "lines"])
@pytest.mark.parametrize("parts", [1, 2])
def test_compressed_files_are_read(tmp_path: Path, kind: str, form: str, parts: int) -> None:
    """Two packed files one behind the other are what `cat a.gz b.gz` makes."""
    text = json.dumps(RECORDS) if form == "array" else "\n".join(map(json.dumps, RECORDS))
    half = len(text) // parts
    pieces = [text[:half], text[half:]] if parts == 2 else [text]
    packed = b"".join(PACKERS[kind](piece.encode()) for piece in pieces)
    (tmp_path / f"a.json.{kind}").write_bytes(packed)
    (tmp_path / "named_otherwise.json").write_bytes(packed)
    for name in (f"a.json.{kind}", "named_otherwise.json"):
        assert ids(entries(tmp_path, annotations=name)) == ids_of(RECORDS)


def ids_of(records: list[dict[str, Any]]) -> list[str]:
    return [record["id"] for record in records]


@pytest.mark.parametrize("kind", PACKERS)
def test_compressed_files_that_are_cut_short_are_named(tmp_path: Path, kind: str) -> None:
    text = "\n".join(json.dumps(conversation(f"r{n}")) for n in range(3000)).encode()
    packed = PACKERS[kind](text)
    for size in (len(packed) // 2, 40, 12):
        (tmp_path / "a.jsonl").write_bytes(packed[:size])
        assert "a.jsonl" in refused(tmp_path, annotations="a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(packed[:30] + b"\xff" * 30 + packed[60:])
    assert "a.jsonl" in refused(tmp_path, annotations="a.jsonl")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (json.dumps(RECORDS).encode("utf-16"), "UTF-16 text: write it as UTF-8: iconv"),
        (json.dumps(RECORDS).encode("utf-16-le"), "UTF-16LE text"),
        (json.dumps({"data": RECORDS}).encode(), "records under `data`: write the list alone: jq"),
        (json.dumps({"data": RECORDS}, indent=1).encode(), "jq -c '.data[]'"),
        (gzip.compress(json.dumps({"data": RECORDS}).encode(), mtime=0), "jq -c '.data[]'"),
        (
            json.dumps(
                {
                    "info": {"year": 2017},
                    "images": [{"id": 7, "file_name": "7.jpg"}],
                    "annotations": [{"id": 1, "image_id": 7, "caption": "A square."}],
                }
            ).encode(),
            "COCO's form",
        ),
        (json.dumps(RECORDS[0], indent=2).encode(), "an object over several lines: write one a li"),
        ("\n".join(json.dumps(r, indent=1) for r in RECORDS).encode(), "jq -c . OLD > NEW.jsonl"),
        (gzip.compress(json.dumps(RECORDS[:2]).encode(), mtime=0)[:-20], "cut short: get it again"),
        (b"PAR1....", "a Parquet file: set `format: parquet` of its source"),
        (gzip.compress(b"", mtime=0), "empty"),
    ],
)
def test_what_is_no_list_of_records_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert words in refused(tmp_path, annotations="a.json")


def test_braces_stand_for_their_files_in_order(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        (tmp_path / f"part-{number:03d}.json").write_text(json.dumps(RECORDS[number : number + 1]))
    found = entries(tmp_path, annotations="part-{000..002}.json")
    assert ids(found) == ["r0", "r1", "r2"]
    assert ids(entries(tmp_path, annotations="part-{002,000}.*")) == ["r2", "r0"]
    assert "part-003.json: No such file" in refused(tmp_path, annotations="part-{000..003}.json")
    assert "more than 1000000" in refused(tmp_path, annotations="{1..2000000}.json")
    (tmp_path / "a{b.json").write_text(json.dumps(RECORDS[:1]))
    (tmp_path / "{0..1}.json").write_text(json.dumps(RECORDS[1:2]))
    assert ids(entries(tmp_path, annotations=["a{b.json", "{0..1}.json"])) == ["r0", "r1"]


def test_annotations_at_an_address(tmp_path: Path) -> None:
    """fsspec's `file://` is an address like `s3://`, which tests/data/test_storage.py serves."""
    (tmp_path / "a-0.json").write_text(json.dumps(RECORDS[:2]))
    (tmp_path / "a-1.jsonl.gz").write_bytes(gzip.compress(json.dumps(RECORDS[2]).encode()))
    start = f"file://{tmp_path}"
    assert ids(entries(tmp_path, annotations=f"{start}/a-*")) == ["r0", "r1", "r2"]
    braces = f"{start}/a-{{0.json,1.jsonl.gz}}"
    assert ids(entries(tmp_path, annotations=braces)) == ["r0", "r1", "r2"]
    assert "nowhere.json" in refused(tmp_path, annotations=f"{start}/nowhere.json")
    assert "no file matches" in refused(tmp_path, annotations=f"{start}/b-*")
    assert "unknown://" in refused(tmp_path, annotations="unknown://bucket/a.json")
    tars = refused(tmp_path, annotations=f"{start}/a.tar", format="webdataset")
    assert "is read from a disk" in tars


# ---- keys, ids and counts ------------------------------------------------------------------------


def test_path_prefix_is_taken_off_whole_folders_only(tmp_path: Path) -> None:
    keys = ["/d/coco/1.jpg", "/d/coco2017/1.jpg", "D:\\d\\a.jpg", "D:\\data\\a.jpg"]
    (tmp_path / "a.json").write_text(json.dumps([conversation(n, k) for n, k in enumerate(keys)]))

    def read(prefix: str) -> list[str]:
        found = entries(tmp_path, annotations="a.json", path_prefix=prefix)
        return [entry.record.images[0] for entry in found if entry.record]

    assert read("/d/coco") == ["1.jpg", *keys[1:]]
    assert read("/d/coco/") == ["1.jpg", *keys[1:]]
    assert read("D:\\d") == [*keys[:2], "a.jpg", keys[3]]
    assert read("/d/co") == keys


def test_an_empty_key_means_no_image(tmp_path: Path) -> None:
    text, marked = conversation("text"), conversation("marked", "")
    text["image"] = ""
    (tmp_path / "a.json").write_text(json.dumps([text, marked]))
    root, sources = str(tmp_path), [SourceConfig("s", "a.json")]
    bad: list[Entry] = []
    found = survey(CheckConfig(root=root, sources=sources, views=VIEWS), on_bad=bad.append)
    assert found.read.total() == 2
    assert [(e.record_id, e.verdict.reason) for e in bad] == [("marked", Reason.IMAGE_MISSING)]
    assert "means no image" in bad[0].verdict.detail


VIEWS = {"v": ImageSpec(8, (0, 0, 0))}


@pytest.mark.parametrize("content", ["[]", "\n"])
def test_a_source_without_a_record_is_an_error_of_check(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    (tmp_path / "b.json").write_text(content)
    for name in ("a.json", "b.json"):
        source = f"{{name: s, annotations: {name}}}"
        arguments = [
            f"--root={tmp_path}",
            f"--sources=[{source}]",
            "--views={v: {size: 8, fill: [0, 0, 0]}}",
        ]
        if name == "a.json":
            assert check_main(arguments) == 0
        else:
            with pytest.raises(Exception, match=r"b\.json.*(holds no record|white space)"):
                check_main(arguments)
    capsys.readouterr()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [float("-inf")], {"a": (1.5,)}])
def test_what_json_lacks_is_written_as_text(value: Any) -> None:
    def strict(name: str) -> None:
        raise AssertionError(name)

    parsed = json.loads(element_json({"x": value, "y": "é"}), parse_constant=strict)
    assert parsed["y"] == "é"
    assert parsed["x"] in ("nan", "inf", ["-inf"], {"a": [1.5]})


def test_images_are_looked_for_beside_the_annotation_file(tmp_path: Path) -> None:
    (tmp_path / "set" / "images").mkdir(parents=True)
    (tmp_path / "set" / "images" / "1.jpg").write_bytes(image_bytes("jpeg"))
    (tmp_path / "set" / "a.json").write_text(json.dumps([conversation("a", "images/1.jpg")]))
    config = CheckConfig(root=str(tmp_path), sources=[SourceConfig("s", "set/a.json")], views=VIEWS)
    found = survey(config)
    assert found.clean
    assert dict(found.repairs) == {"annotation_folder": 1}
    assert list(found.images) == ["set/images/1.jpg"]
