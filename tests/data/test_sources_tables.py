"""WebDataset tars and Parquet: what is read of each, and what is wrong with one."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from lapilli.data.record import Entry, Reason, Record
from lapilli.data.sources import llava
from tests.data.source_files import (
    JPEG,
    MIXED,
    as_bytes,
    entries,
    image_url,
    message,
    records,
    refused,
    said,
    write_lines,
    write_parquet,
    write_tar,
)
from tests.factories import conversation

# ---- WebDataset --------------------------------------------------------------------------------


def shards(root: Path, *samples: dict[str, Any], **config: Any) -> list[Entry]:
    write_tar(root / "shards" / "0.tar", list(samples))
    return entries(root, annotations="shards/*.tar", format="webdataset", **config)


def test_an_image_and_a_text_are_a_caption(tmp_path: Path) -> None:
    sample = {"__key__": "0001", "jpg": JPEG, "txt": b"A goat.\n", "npy": b"x"}
    (record,) = records(shards(tmp_path, sample))
    assert record.record_id == "0001"
    assert record.images == ("shards/0.tar/0001.jpg",)
    assert said(record) == [("user", "<image>"), ("assistant", "A goat.")]
    (asked,) = records(shards(tmp_path, sample, prompts=["<image>\nDescribe."]))
    assert said(asked)[0] == ("user", "<image>\nDescribe.")


def test_an_image_and_a_json_are_a_conversation(tmp_path: Path) -> None:
    swapped = message([image_url("k4.1.jpg"), image_url("k4.0.jpg")], "So.")
    found = records(
        shards(
            tmp_path,
            {"__key__": "k0", "jpg": JPEG, "json": as_bytes(conversation("a", "x/y.jpg"))},
            {"__key__": "k1", "png": JPEG, "json": as_bytes({"caption": "Goat."})},
            {"__key__": "k2", "json": as_bytes(conversation("b"))},
            {
                "__key__": "k3",
                "10.jpg": JPEG,
                "2.jpg": JPEG,
                "json": as_bytes(conversation("c", ["p", "q"])),
            },
            {"__key__": "k4", "0.jpg": JPEG, "1.jpg": JPEG, "json": as_bytes(swapped)},
        )
    )
    assert [(r.record_id, [i.rpartition("/")[2] for i in r.images]) for r in found] == [
        ("a", ["k0.jpg"]),
        ("k1", ["k1.png"]),
        ("b", []),
        ("c", ["k3.2.jpg", "k3.10.jpg"]),
        ("k4", ["k4.1.jpg", "k4.0.jpg"]),
    ]
    assert said(found[0]) == said(Record("", "", "", *_llava(conversation("a", "x/y.jpg"))))


def _llava(element: Any) -> Any:
    return llava.normalise(element)


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        ({"jpg": JPEG}, "schema"),
        ({"txt": b"A goat."}, "schema"),
        ({"jpg": JPEG, "json": b"{no json"}, "schema"),
        ({"jpg": JPEG, "json": b"[1]"}, "schema"),
        ({"jpg": JPEG, "txt": b"\xff\xfe"}, "schema"),
        ({"jpg": JPEG, "txt": b" "}, "empty_answer"),
        ({"json": as_bytes(conversation("a", "x.jpg"))}, "image_marker_count"),
        ({"jpg": JPEG, "json": as_bytes(conversation("a"))}, "image_marker_count"),
    ],
)
def test_what_is_wrong_with_a_sample(tmp_path: Path, sample: dict[str, Any], reason: str) -> None:
    good = {"__key__": "1", "jpg": JPEG, "txt": b"A goat."}
    bad, kept = shards(tmp_path, {"__key__": "0", **sample}, good)
    assert bad.verdict.reason == reason
    assert kept.verdict.kept
    assert json.loads(bad.raw_json)


def test_keys_name_members_of_the_tar(tmp_path: Path) -> None:
    """Also where tar was given a folder, and where the images' folder is not the root."""
    path = tmp_path / "shards" / "0.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name, data in (("./b/A.JPG", JPEG), ("./b/A.txt", b"One."), ("__meta__", b"x")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    (record,) = records(
        entries(tmp_path, annotations="shards/0.tar", images="shards", format="webdataset")
    )
    shard, _, member = record.images[0].partition("/")
    assert (shard, record.record_id) == ("0.tar", "b/A")
    with tarfile.open(tmp_path / "shards" / shard) as tar:
        assert member in [name.removeprefix("./") for name in tar.getnames()]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no whole tar after 0 members"),
        (b"<html>", "this is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (None, "after 5 members (unexpected end of data)"),
    ],
)
def test_a_file_that_is_no_tar_is_one_line(
    tmp_path: Path, content: bytes | None, said: str
) -> None:
    path = tmp_path / "0.tar"
    if content is None:
        write_tar(path, [{"__key__": f"{n}", "jpg": JPEG, "txt": b"A."} for n in range(3)])
        content = path.read_bytes()
        content = content[: content.rindex(JPEG) + 10]
    path.write_bytes(content)
    message = refused(tmp_path, annotations="0.tar", format="webdataset")
    assert said in message
    assert str(path) in message


def test_a_name_that_is_twice_in_a_sample_is_its_verdict(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a.jpg", "a.JPG"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    (entry,) = entries(tmp_path, annotations="0.tar", format="webdataset")
    assert entry.verdict.reason == Reason.SCHEMA
    assert "'a.JPG' twice" in entry.verdict.detail


def test_a_tar_outside_the_images_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    write_tar(tmp_path / "0.tar", [{"__key__": "a", "jpg": JPEG, "txt": b"A."}])
    assert "set `images` to a folder above" in refused(
        tmp_path, annotations="0.tar", images="images", format="webdataset"
    )


# ---- Parquet -----------------------------------------------------------------------------------


def test_rows_of_parquet_are_records(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.json", [MIXED[0], MIXED[1]])
    write_parquet(tmp_path / "a.parquet", [MIXED[0], {**MIXED[1], "image": None}])
    text_columns = [{**r, "conversations": json.dumps(r["conversations"])} for r in MIXED[:2]]
    write_parquet(tmp_path / "b.parquet", text_columns, row_group_size=1)
    as_messages = [
        {
            "id": r["id"],
            "images": [r["image"]] if "image" in r else [],
            "messages": [{"role": t["from"], "content": t["value"]} for t in r["conversations"]],
        }
        for r in MIXED[:2]
    ]
    write_parquet(tmp_path / "c.parquet", as_messages)
    expected = records(entries(tmp_path, annotations="a.json"))
    for name in ("a.parquet", "b.parquet", "c.parquet"):
        assert records(entries(tmp_path, annotations=name, format="parquet")) == expected


def test_what_is_no_parquet_is_one_line(tmp_path: Path) -> None:
    where = {"annotations": "a.parquet", "format": "parquet"}
    path = tmp_path / "a.parquet"
    assert "No such file" in refused(tmp_path, **where)
    path.write_bytes(b"<!DOCTYPE html>")
    assert "this is a web page" in refused(tmp_path, **where)
    write_parquet(path, [{"id": "a", "text": "b"}])
    line = refused(tmp_path, **where)
    assert "has the columns id, text, none of which is known to hold the image" in line
    assert "or put conversations into one of messages" in line
    write_parquet(path, [{"conversations": b"[]"}])
    assert "column conversations holds bytes" in refused(tmp_path, **where)
    write_parquet(path, [{"conversations": json.dumps(MIXED[0]["conversations"])}] * 5000)
    path.write_bytes(path.read_bytes()[:-100])
    assert "is no whole Parquet file" in refused(tmp_path, **where)


def test_text_that_is_no_json_has_a_verdict(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"id": "a", "conversations": "[no json"}])
    (entry,) = entries(tmp_path, annotations="a.parquet", format="parquet")
    assert entry.verdict.reason == Reason.SCHEMA
    assert "[no json" in entry.raw_json
