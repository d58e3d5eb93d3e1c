"""Images inside zips and tars, unextracted: the bytes that zipfile and tarfile would unpack."""

from __future__ import annotations

import io
import os
import stat
import struct
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lapilli.data.errors import DataError
from lapilli.data.images.view import BadImage
from lapilli.data.mounts import Located, Mount, read_image
from lapilli.data.mounts.places import LARGEST_FILE
from lapilli.data.mounts.published import ARCHIVES_BY_FOLDER
from lapilli.data.record import Reason, Verdict
from tests.factories import image_bytes

STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


def write_zip(path: Path, members: dict[str, bytes], method: int = DEFLATED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def located(mount: Mount, key: str) -> Located:
    place = mount.locate(key)
    assert isinstance(place, Located), place
    return place


def read(mount: Mount, key: str) -> bytes:
    return read_image(mount.root, located(mount, key))


def refused(mount: Mount, key: str) -> Verdict:
    verdict = mount.locate(key)
    assert isinstance(verdict, Verdict), verdict
    return verdict


def bad_reading(mount: Mount, key: str) -> BadImage:
    with pytest.raises(BadImage) as caught:
        read(mount, key)
    return caught.value


# ---- in the place of a folder ------------------------------------------------------------------


@pytest.mark.parametrize("folder", ARCHIVES_BY_FOLDER)
@pytest.mark.parametrize("prefix", ["folder", "deep", "none"])
def test_a_published_archive_stands_in_for_its_folder(
    tmp_path: Path, folder: str, prefix: str
) -> None:
    """With the folder's name inside it, further down, or with the images at its top."""
    above, _, name = folder.rpartition("/")
    inner = {"folder": f"{name}/", "deep": f"data/{name}/", "none": ""}[prefix]
    archive = tmp_path / above / ARCHIVES_BY_FOLDER[folder].name
    write_zip(archive, {f"{inner}1.jpg": b"one", f"{inner}sub/2.jpg": b"two", "README": b"x"})
    mount = Mount(tmp_path)
    mount.require()
    assert read(mount, f"{folder}/1.jpg") == b"one"
    assert read(mount, f"{folder}/sub/2.jpg") == b"two"
    container = archive.relative_to(tmp_path).as_posix()
    assert located(mount, f"{folder}/1.jpg").image_id == f"{container}/{inner}1.jpg"
    assert not mount.repairs
    assert refused(mount, f"{folder}/3.jpg").reason == Reason.IMAGE_MISSING


def test_visual_genomes_two_archives_lie_side_by_side(tmp_path: Path) -> None:
    write_zip(tmp_path / "vg" / "images.zip", {"VG_100K/1.jpg": b"part 1"})
    write_zip(tmp_path / "vg" / "images2.zip", {"VG_100K_2/1.jpg": b"part 2"})
    mount = Mount(tmp_path)
    assert read(mount, "vg/VG_100K/1.jpg") == b"part 1"
    assert read(mount, "vg/VG_100K_2/1.jpg") == b"part 2"


@pytest.mark.parametrize("pack", [write_zip, write_tar])
def test_any_archive_called_as_its_folder_stands_in(tmp_path: Path, pack: object) -> None:
    kind = "zip" if pack is write_zip else "tar"
    pack(tmp_path / f"photos.{kind}", {"a/1.jpg": b"one"})  # type: ignore[operator]
    assert read(Mount(tmp_path, "photos"), "a/1.jpg") == b"one"


def test_archives_may_lie_in_the_root_but_images_zip_is_whose(tmp_path: Path) -> None:
    write_zip(tmp_path / "train2017.zip", {"train2017/1.jpg": b"coco"})
    write_zip(tmp_path / "images.zip", {"1.jpg": b"somebody's"})
    (tmp_path / "gqa").mkdir()
    assert read(Mount(tmp_path), "coco/train2017/1.jpg") == b"coco"
    assert refused(Mount(tmp_path), "gqa/images/1.jpg").reason == Reason.IMAGE_MISSING


def test_a_folder_comes_before_its_archive(tmp_path: Path) -> None:
    write_zip(tmp_path / "images.zip", {"1.jpg": b"packed"})
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(b"unpacked")
    assert read(Mount(tmp_path), "images/1.jpg") == b"unpacked"


def test_what_is_missing_says_how_to_get_it(tmp_path: Path) -> None:
    mount = Mount(tmp_path)
    verdicts = [mount.locate(f"coco/train2017/{n}.jpg") for n in range(3)]
    assert all(isinstance(v, Verdict) and v.reason == Reason.IMAGE_MISSING for v in verdicts)
    ((line, count),) = mount.lost.items()
    assert count == 3
    address = "http://images.cocodataset.org/zips/train2017.zip"
    assert f"wget -c -O {tmp_path}/coco/train2017.zip {address}" in line
    assert "19.3 GB" in line
    with pytest.raises(DataError, match="wget -c"):
        Mount(tmp_path, "coco/train2017").require()


# ---- a path through an archive -----------------------------------------------------------------


def test_a_path_goes_through_an_archive_it_names(tmp_path: Path) -> None:
    write_tar(tmp_path / "shards" / "00000.tar", {"000001.jpg": b"one", "./deep/2.png": b"two"})
    mount = Mount(tmp_path)
    assert read(mount, "shards/00000.tar/000001.jpg") == b"one"
    assert read(mount, "shards/00000.tar/deep/2.png") == b"two"
    assert located(mount, "shards/00000.tar/000001.jpg").image_id == "shards/00000.tar/000001.jpg"


def test_repairs_reach_into_an_archive(tmp_path: Path) -> None:
    write_zip(tmp_path / "images.zip", {"Deep/A.JPG": b"a", "text_vqa/b.png": b"b"})
    mount = Mount(tmp_path, "images")
    assert read(mount, "deep/a.jpg") == b"a"
    assert read(mount, "textvqa/b.jpg") == b"b"
    assert dict(mount.repairs) == {"case": 1, "alias": 1}


def test_names_in_an_archive_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    members = {"../secret": b"x", "/etc/passwd": b"y", "a/../../secret": b"z", "ok.jpg": b"ok"}
    write_zip(tmp_path / "root" / "images.zip", members)
    mount = Mount(tmp_path / "root", "images")
    for key in ("../secret", "/etc/passwd", "a/../../secret"):
        assert refused(mount, key).reason == Reason.IMAGE_OUTSIDE_ROOT
    assert read(mount, "ok.jpg") == b"ok"


def test_an_archive_in_an_archive_is_not_opened(tmp_path: Path) -> None:
    inner = write_zip(tmp_path / "inner.zip", {"1.jpg": b"one"}).read_bytes()
    write_zip(tmp_path / "outer.zip", {"inner.zip": inner})
    verdict = refused(Mount(tmp_path), "outer.zip/inner.zip/1.jpg")
    assert "an archive in an archive" in verdict.detail


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    members=st.dictionaries(
        st.text("abcdé火 .", min_size=1, max_size=8)
        .filter(lambda name: name.strip(". ") == name and ".." not in name)
        .map(lambda name: f"{name}.jpg"),
        st.binary(max_size=400),
        min_size=1,
        max_size=6,
    ),
    kind=st.sampled_from(["stored", "deflated", "tar"]),
)
def test_every_member_is_what_the_library_unpacks(
    tmp_path: Path, members: dict[str, bytes], kind: str
) -> None:
    """The yardstick is the standard library's reader of the same file."""
    root = tmp_path / str(len(list(tmp_path.iterdir())))
    if kind == "tar":
        with tarfile.open(write_tar(root / "a.tar", members)) as tar:
            unpacked = {i.name: tar.extractfile(i).read() for i in tar}  # type: ignore[union-attr]
    else:
        path = write_zip(root / "a.zip", members, STORED if kind == "stored" else DEFLATED)
        with zipfile.ZipFile(path) as archive:
            unpacked = {name: archive.read(name) for name in archive.namelist()}
    mount = Mount(root, "a")
    assert {name: read(mount, name) for name in unpacked} == unpacked == members


# ---- links -------------------------------------------------------------------------------------

LINKS = {"hard": tarfile.LNKTYPE, "soft": tarfile.SYMTYPE}


def write_linked(path: Path, *members: tuple[str, bytes | tuple[str, str]]) -> None:
    """A tar of bytes and of links, each a kind and what it leads to."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = LINKS[content[0]], content[1]
            info.size = len(content) if isinstance(content, bytes) else 0
            archive.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)


def test_links_in_a_tar_are_read_as_they_are_unpacked(tmp_path: Path) -> None:
    """The yardstick is what the standard library unpacks."""
    write_linked(
        tmp_path / "a.tar",
        ("early.jpg", ("soft", "data/1.jpg")),
        ("data/1.jpg", b"one"),
        ("data/2.jpg", b"two"),
        ("hard.jpg", ("hard", "data/1.jpg")),
        ("data/soft.jpg", ("soft", "2.jpg")),
        ("deep/er/up.jpg", ("soft", "../../data/./2.jpg")),
        ("of.jpg", ("soft", "hard.jpg")),
        ("all", ("soft", "data")),
        ("through.jpg", ("soft", "all/2.jpg")),
        ("deep/all", ("soft", "../all")),
    )
    with tarfile.open(tmp_path / "a.tar") as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    mount = Mount(tmp_path)
    keys = [f"{name}.jpg" for name in ("early", "hard", "data/soft", "deep/er/up", "of", "through")]
    for key in (*keys, "all/1.jpg", "all/soft.jpg", "deep/all/2.jpg", "data/1.jpg"):
        assert read(mount, f"a.tar/{key}") == (tmp_path / "unpacked" / key).read_bytes(), key
    for key in ("early.jpg", "hard.jpg", "of.jpg", "all/1.jpg"):
        assert located(mount, f"a.tar/{key}").image_id == "a.tar/data/1.jpg"


@pytest.mark.parametrize(
    "link",
    [
        ("soft", "../secret.jpg"),
        ("soft", "../a.tar/1.jpg"),
        ("soft", "/etc/passwd"),
        ("hard", "../secret.jpg"),
        ("soft", "nowhere.jpg"),
        ("hard", "nowhere.jpg"),
        ("soft", "link.jpg"),
        ("soft", "x/" * 600 + "1.jpg"),
    ],
)
def test_a_link_out_of_its_tar_or_to_nothing_is_a_verdict_that_names_it(
    tmp_path: Path, link: tuple[str, str]
) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    write_linked(tmp_path / "a.tar", ("1.jpg", b"one"), ("link.jpg", link), ("folder", link))
    mount = Mount(tmp_path)
    verdict = refused(mount, "a.tar/link.jpg")
    assert verdict.reason == Reason.IMAGE_UNDECODABLE
    assert "'a.tar/link.jpg' is a link to" in verdict.detail
    assert "'a.tar/folder' is a link to" in refused(mount, "a.tar/folder/2.jpg").detail
    assert read(mount, "a.tar/1.jpg") == b"one"


def test_links_in_circles_and_long_chains_end(tmp_path: Path) -> None:
    chain = [(f"{n}.jpg", ("soft", f"{n + 1}.jpg")) for n in range(30)]
    circle = [("a.jpg", ("soft", "b.jpg")), ("b.jpg", ("soft", "a.jpg"))]
    write_linked(tmp_path / "a.tar", *chain, ("30.jpg", b"end"), *circle)
    mount = Mount(tmp_path)
    assert read(mount, "a.tar/20.jpg") == b"end"
    for name in ("0.jpg", "a.jpg", "b.jpg"):
        assert f"'a.tar/{name}' is a link to" in refused(mount, f"a.tar/{name}").detail


def test_a_link_to_one_of_two_members_of_a_name_is_a_verdict(tmp_path: Path) -> None:
    write_linked(
        tmp_path / "a.tar",
        ("1.jpg", b"one"),
        ("link.jpg", ("hard", "1.jpg")),
        ("1.jpg", b"another"),
        ("2.jpg", b"two"),
        ("2.jpg", ("hard", "2.jpg")),
        ("3.jpg", ("soft", "2.jpg")),
        ("3.jpg", b"three"),
        ("4", b"four"),
        ("4", ("soft", "data")),
        ("data/5.jpg", b"five"),
    )
    mount = Mount(tmp_path)
    assert "is a link to '1.jpg'" in refused(mount, "a.tar/link.jpg").detail
    assert read(mount, "a.tar/1.jpg") == b"another"
    assert read(mount, "a.tar/2.jpg") == b"two"
    assert read(mount, "a.tar/3.jpg") == b"three"
    assert read(mount, "a.tar/4/5.jpg") == b"five"
    refused(mount, "a.tar/4")


def test_a_link_in_a_zip_is_a_verdict(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("1.jpg", b"one")
        info = zipfile.ZipInfo("2.jpg")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16  # as `zip --symlinks` writes it
        archive.writestr(info, "1.jpg")
    assert "'a.zip/2.jpg' is a link" in refused(Mount(tmp_path), "a.zip/2.jpg").detail


# ---- damaged, hostile --------------------------------------------------------------------------


def test_an_encrypted_member_is_a_verdict(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"1.jpg": b"one", "2.jpg": b"two"}, STORED)
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\1\2")  # of the first member; its flags stand 8 bytes on
    data[directory + 8] |= 1
    path.write_bytes(data)
    verdict = refused(Mount(tmp_path), "a.zip/1.jpg")
    assert verdict.reason == Reason.IMAGE_UNDECODABLE
    assert "encrypted" in verdict.detail
    assert read(Mount(tmp_path), "a.zip/2.jpg") == b"two"


def test_another_compression_is_a_verdict(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", {"1.jpg": b"one" * 99}, zipfile.ZIP_BZIP2)
    verdict = refused(Mount(tmp_path), "a.zip/1.jpg")
    assert verdict.reason == Reason.IMAGE_UNDECODABLE
    assert "stored or deflated" in verdict.detail


def test_a_member_that_says_it_is_huge_is_not_read(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"1.jpg": b"\0" * 5000})
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\1\2")
    struct.pack_into("<L", data, directory + 24, LARGEST_FILE + 1)
    path.write_bytes(data)
    assert refused(Mount(tmp_path), "a.zip/1.jpg").reason == Reason.IMAGE_TOO_LARGE


def test_a_member_that_unpacks_to_more_than_it_says_stops_there(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"1.jpg": b"\0" * 5_000_000})
    data = bytearray(path.read_bytes())
    struct.pack_into("<L", data, data.index(b"PK\1\2") + 24, 100)
    path.write_bytes(data)
    bad = bad_reading(Mount(tmp_path), "a.zip/1.jpg")
    assert bad.reason == Reason.IMAGE_UNDECODABLE
    assert "damaged" in bad.detail


@pytest.mark.parametrize("method", [STORED, DEFLATED])
def test_damage_inside_a_member_is_found_by_its_checksum(tmp_path: Path, method: int) -> None:
    content = image_bytes("bmp")
    path = write_zip(tmp_path / "a.zip", {"1.jpg": content, "2.jpg": content}, method)
    data = bytearray(path.read_bytes())
    data[200] ^= 0xFF
    path.write_bytes(data)
    mount = Mount(tmp_path)
    assert bad_reading(mount, "a.zip/1.jpg").reason == Reason.IMAGE_UNDECODABLE
    assert read(mount, "a.zip/2.jpg") == content


@pytest.mark.parametrize("name", ["a.zip", "a.tar"])
def test_half_a_download_is_named_with_what_to_do(tmp_path: Path, name: str) -> None:
    pack = write_zip if name == "a.zip" else write_tar
    members = {f"{n}.jpg": os.urandom(3000) for n in range(4)}
    path = pack(tmp_path / name, members)
    path.write_bytes(path.read_bytes()[:5000])
    verdict = refused(Mount(tmp_path), f"{name}/3.jpg")
    assert verdict.reason == Reason.IMAGE_MISSING
    assert "download it again" in verdict.detail


def test_a_compressed_tar_says_so(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"1.jpg": b"one"}, "w:gz")
    assert "no whole uncompressed tar" in refused(Mount(tmp_path), "a.tar/1.jpg").detail


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), kind=st.sampled_from(["zip", "tar"]))
def test_a_mutated_archive_gives_the_bytes_or_a_reason(
    tmp_path: Path, data: st.DataObject, kind: str
) -> None:
    pack = write_zip if kind == "zip" else write_tar
    path = pack(tmp_path / f"m.{kind}", {"1.jpg": b"one" * 50, "2.jpg": b"two" * 50})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    place = Mount(tmp_path).locate(f"m.{kind}/1.jpg")
    if isinstance(place, Verdict):
        assert place.detail
        return
    try:
        found = read_image(tmp_path, place)
    except BadImage:
        pass  # with a reason, by its type
    else:
        assert kind == "tar" or found == b"one" * 50


# ---- what changes between plan and reading -----------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_that_changes_after_the_plan_is_noticed(tmp_path: Path, packed: bool) -> None:
    key = "a.zip/1.jpg" if packed else "1.jpg"
    path = tmp_path / ("a.zip" if packed else "1.jpg")
    write_zip(path, {"1.jpg": b"one"}) if packed else path.write_bytes(b"one")
    place = located(Mount(tmp_path), key)
    assert read_image(tmp_path, place) == b"one"
    for change, words in (
        (lambda: os.utime(path, ns=(1, 1)), "written again"),
        (lambda: path.write_bytes(path.read_bytes() + b"!"), "bytes when the build was planned"),
        (path.unlink, "No such file" if not packed else ""),
    ):
        change()
        if packed and words == "":
            continue  # held open: a file that is gone by name is still whole
        with pytest.raises(BadImage, match=words) as caught:
            read_image(tmp_path, place)
        assert caught.value.reason == Reason.IMAGE_MISSING


def test_a_huge_file_is_not_read_as_an_image(tmp_path: Path) -> None:
    with (tmp_path / "1.jpg").open("wb") as file:
        file.truncate(LARGEST_FILE + 1)
    assert refused(Mount(tmp_path), "1.jpg").reason == Reason.IMAGE_TOO_LARGE


# ---- folders elsewhere -------------------------------------------------------------------------


def test_links_out_of_the_root_are_followed_where_the_user_says_so(tmp_path: Path) -> None:
    disk, root = tmp_path / "disk", tmp_path / "root"
    (disk / "train2017").mkdir(parents=True)
    (root / "coco").mkdir(parents=True)
    (disk / "train2017" / "1.jpg").write_bytes(b"one")
    (root / "coco" / "train2017").symlink_to(disk / "train2017")
    (disk / "train2017" / "passwd").symlink_to("/etc/passwd")
    key = "coco/train2017/1.jpg"
    verdict = refused(Mount(root), key)
    assert verdict.reason == Reason.IMAGE_OUTSIDE_ROOT
    assert "extra_roots" in verdict.detail
    mount = Mount(root, extra_roots=(str(disk),))
    assert read(mount, key) == b"one"
    assert located(mount, key).image_id == key
    strict = refused(mount, "coco/train2017/passwd")
    assert strict.reason == Reason.IMAGE_OUTSIDE_ROOT


def test_images_may_be_an_absolute_folder(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "1.jpg").write_bytes(b"one")
    (tmp_path / "secret").write_bytes(b"secret")
    (elsewhere / "link.jpg").symlink_to(tmp_path / "secret")
    (tmp_path / "root").mkdir()
    mount = Mount(tmp_path / "root", str(elsewhere))
    mount.require()
    assert read(mount, "1.jpg") == b"one"
    assert located(mount, "1.jpg").image_id == f"{elsewhere}/1.jpg"
    assert refused(mount, "link.jpg").reason == Reason.IMAGE_OUTSIDE_ROOT
    assert refused(mount, "../secret").reason == Reason.IMAGE_OUTSIDE_ROOT


@pytest.mark.parametrize(
    ("on_disk", "in_file", "repair"),
    [
        ("text_vqa/train_images", "textvqa/train_images", "alias"),
        ("OCR-VQA/images", "ocr_vqa/images", "alias"),
        ("COCO/train2017", "coco/train2017", "case"),
    ],
)
def test_a_folder_spelt_otherwise_is_found_by_itself(
    tmp_path: Path, on_disk: str, in_file: str, repair: str
) -> None:
    (tmp_path / on_disk).mkdir(parents=True)
    (tmp_path / on_disk / "1.jpg").write_bytes(b"one")
    mount = Mount(tmp_path)
    assert read(mount, f"{in_file}/1.jpg") == b"one"
    assert dict(mount.repairs) == {repair: 1}


def test_a_place_is_the_same_when_it_is_copied(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", {"1.jpg": b"one"})
    place = located(Mount(tmp_path), "a.zip/1.jpg")
    assert read_image(tmp_path, replace(place)) == b"one"
