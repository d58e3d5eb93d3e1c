"""Images in a bucket, on a real S3 server: rclone, serving a folder on loopback."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lapilli.data.config import SourceConfig
from lapilli.data.errors import DataError
from lapilli.data.images.view import BadImage
from lapilli.data.mounts import Located, Mount, read_image
from lapilli.data.record import Reason, Verdict
from lapilli.data.sources.validation import read_entries
from tests.data.test_archives import write_tar, write_zip
from tests.factories import Mixture, build_dataset, conversation, image_bytes, make_tokenizer
from tests.object_store import serve_s3

PHOTO = image_bytes("jpeg", 30, 20)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder behind `s3://photos`, served until the tests of this file are done."""
    folder = tmp_path_factory.mktemp("s3")
    bucket = folder / "photos"
    for name in ("coco/1.jpg", "coco/Two.JPG", "coco/sub/3.png"):
        (bucket / name).parent.mkdir(parents=True, exist_ok=True)
        (bucket / name).write_bytes(PHOTO + name.encode())
    (bucket / "coco" / "empty.jpg").write_bytes(b"")
    write_zip(bucket / "gqa" / "images.zip", {f"images/{n}.jpg": PHOTO for n in range(5)})
    write_tar(bucket / "shards" / "0.tar", {"000.jpg": PHOTO, "001.jpg": b"one"})
    with serve_s3(folder):
        yield bucket


def located(mount: Mount, key: str) -> Located:
    place = mount.locate(key)
    assert isinstance(place, Located), place
    return place


def test_an_object_is_found_and_read(bucket: Path, tmp_path: Path) -> None:
    mount = Mount(tmp_path, "s3://photos/coco")
    mount.require()
    for key in ("1.jpg", "sub/3.png"):
        place = located(mount, key)
        assert place.image_id == f"s3://photos/coco/{key}"
        assert read_image(tmp_path, place) == (bucket / "coco" / key).read_bytes()


def test_repairs_and_verdicts_are_those_of_a_folder(bucket: Path, tmp_path: Path) -> None:
    mount = Mount(tmp_path, "s3://photos")
    assert located(mount, "coco/two.jpg").image_id == "s3://photos/coco/Two.JPG"
    assert located(mount, "coco/1.png").image_id == "s3://photos/coco/1.jpg"
    assert dict(mount.repairs) == {"case": 1, "extension": 1}
    for key, reason in (
        ("coco/nowhere.jpg", Reason.IMAGE_MISSING),
        ("elsewhere/1.jpg", Reason.IMAGE_MISSING),
        ("../other/1.jpg", Reason.IMAGE_OUTSIDE_ROOT),
        ("coco", Reason.IMAGE_MISSING),
    ):
        verdict = mount.locate(key)
        assert isinstance(verdict, Verdict)
        assert verdict.reason == reason
    assert bucket.is_dir()


def test_members_of_archives_are_read_by_their_place(bucket: Path, tmp_path: Path) -> None:
    mount = Mount(tmp_path, "s3://photos")
    assert read_image(tmp_path, located(mount, "gqa/images/3.jpg")) == PHOTO
    assert located(mount, "gqa/images/3.jpg").image_id == "s3://photos/gqa/images.zip/images/3.jpg"
    assert read_image(tmp_path, located(mount, "shards/0.tar/001.jpg")) == b"one"
    assert bucket.is_dir()


def test_an_object_that_changes_after_the_plan_is_noticed(bucket: Path, tmp_path: Path) -> None:
    path = bucket / "coco" / "changing.jpg"
    path.write_bytes(b"before")
    place = located(Mount(tmp_path, "s3://photos"), "coco/changing.jpg")
    path.write_bytes(b"after that")
    with pytest.raises(BadImage, match="6 bytes when the build was planned, now 10"):
        read_image(tmp_path, place)
    path.unlink()
    with pytest.raises(BadImage, match="was there when the build was planned"):
        read_image(tmp_path, place)


def test_annotations_lie_in_a_bucket_too(bucket: Path, tmp_path: Path) -> None:
    for number in range(2):
        text = json.dumps([conversation(f"r{number}")])
        (bucket / f"part-{number}.json.gz").write_bytes(gzip.compress(text.encode()))
    for pattern in ("s3://photos/part-{0,1}.json.gz", "s3://photos/part-*.json.gz"):
        found = read_entries(SourceConfig("s", pattern), tmp_path)
        assert [entry.record_id for entry in found] == ["r0", "r1"]
    with pytest.raises(DataError, match=r"s3://photos/nowhere\.json"):
        list(read_entries(SourceConfig("s", "s3://photos/nowhere.json"), tmp_path))


def test_a_build_reads_its_images_from_a_bucket(bucket: Path, tmp_path: Path) -> None:
    keys = ["coco/1.jpg", "coco/two.jpg", "gqa/images/0.jpg", "shards/0.tar/000.jpg", "no.jpg"]
    root = tmp_path / "root"
    root.mkdir()
    records = [conversation(f"r{place}", key) for place, key in enumerate(keys)]
    (root / "a.json").write_text(json.dumps(records))
    source = SourceConfig("s", "a.json", "s3://photos")
    mixture = Mixture(root, [source], {}, [])
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    report = build_dataset(mixture, tmp_path / "out", tokenizer)
    counts = report.manifest.counts
    rows: list[dict[str, str]] = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert [(row["record_id"], row["detail"]) for row in rows] == [
        ("r4", "no file 'no.jpg' below 's3://photos'")
    ]
    assert (counts["kept"], counts["reasons"]) == (4, {"image_missing": 1})
    assert bucket.is_dir()
