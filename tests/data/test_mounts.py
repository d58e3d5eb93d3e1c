"""Keys of annotation files to files: never out of the root, mended where there is one answer."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lapilli.data.errors import DataError
from lapilli.data.mounts import Located, Mount
from lapilli.data.record import Reason, Verdict


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """`root/images` with a few files, and a file outside of the root."""
    root = tmp_path / "root"
    for name in ("a.jpg", "sub/b.png", "sub/c.d.png", "Upper.JPG", "text_vqa.d/x.jpg"):
        path = root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    (tmp_path / "outside.jpg").write_bytes(b"secret")
    return root


def found(mount: Mount, key: str) -> str:
    place = mount.locate(key)
    assert isinstance(place, Located), place
    return place.image_id


def refused(mount: Mount, key: str) -> Verdict:
    verdict = mount.locate(key)
    assert isinstance(verdict, Verdict), verdict
    assert verdict.detail
    return verdict


def test_a_file_is_found_with_its_size_and_time(root: Path) -> None:
    path = root / "images" / "a.jpg"
    os.utime(path, ns=(5, 12_345))
    assert Mount(root, "images").locate("a.jpg") == Located(
        "images/a.jpg", "images/a.jpg", 5, 12_345
    )


def test_two_spellings_are_one_image(root: Path) -> None:
    (root / "images" / "link.jpg").symlink_to(root / "images" / "a.jpg")
    (root / "other").symlink_to(root / "images")
    keys = ["a.jpg", "./a.jpg", "link.jpg"]
    assert {found(Mount(root, "images"), key) for key in keys} == {"images/a.jpg"}
    assert found(Mount(root, "other"), "a.jpg") == "images/a.jpg"
    assert found(Mount(root), "images/a.jpg") == "images/a.jpg"


@pytest.mark.parametrize(
    ("key", "expected", "repair"),
    [
        ("a.png", "images/a.jpg", "extension"),
        ("a", "images/a.jpg", "extension"),
        ("sub/c.d.jpeg", "images/sub/c.d.png", "extension"),
        ("A.JPG", "images/a.jpg", "case"),
        ("upper.jpg", "images/Upper.JPG", "case"),
        ("upper.png", "images/Upper.JPG", "extension"),
        ("textvqa/x.jpg", "images/text_vqa.d/x.jpg", "alias"),
    ],
)
def test_repairs_are_made_and_counted(root: Path, key: str, expected: str, repair: str) -> None:
    mount = Mount(root, "images", {"textvqa": "text_vqa.d"})
    assert found(mount, key) == expected
    assert dict(mount.repairs) == {repair: 1}


def test_a_file_as_it_is_called_needs_no_repair(root: Path) -> None:
    mount = Mount(root, "images", {"sub": "text_vqa.d"})
    assert found(mount, "sub/b.png") == "images/sub/b.png"
    assert not mount.repairs


def test_two_candidates_are_no_repair(root: Path) -> None:
    for name in ("b.gif", "B.PNG", "twice.JPG", "Twice.jpg"):
        (root / "images" / "sub" / name).write_bytes(b"")
    mount = Mount(root, "images")
    assert refused(mount, "sub/b.jpg").reason == Reason.AMBIGUOUS_IMAGE
    assert refused(mount, "sub/TWICE.jpg").reason == Reason.AMBIGUOUS_IMAGE
    assert found(mount, "sub/b.png") == "images/sub/b.png"


def test_a_caption_beside_the_image_is_not_the_image(root: Path) -> None:
    (root / "images" / "lost.txt").write_text("a caption")
    assert refused(Mount(root, "images"), "lost.jpg").reason == Reason.IMAGE_MISSING


@pytest.mark.parametrize(
    "key", ["", ".", "sub", "sub/", "nowhere.jpg", "a.jpg/b.jpg", "x" * 300 + ".jpg", "\ud800.jpg"]
)
def test_what_is_no_file_is_missing(root: Path, key: str) -> None:
    assert refused(Mount(root, "images"), key).reason == Reason.IMAGE_MISSING


@pytest.mark.parametrize(
    "key", ["../outside.jpg", "../../outside.jpg", "sub/../../../outside.jpg", "a\0.jpg"]
)
def test_a_key_never_leads_outside(root: Path, key: str) -> None:
    assert refused(Mount(root, "images"), key).reason == Reason.IMAGE_OUTSIDE_ROOT


def test_nor_does_an_absolute_one_or_a_link(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.jpg"
    (root / "images" / "link.jpg").symlink_to(outside)
    (root / "images" / "folder").symlink_to(tmp_path)
    mount = Mount(root, "images")
    for key in (str(outside), "link.jpg", "folder/outside.jpg", "link.png"):
        assert refused(mount, key).reason == Reason.IMAGE_OUTSIDE_ROOT


def test_links_in_a_circle_are_missing(root: Path) -> None:
    (root / "images" / "one.jpg").symlink_to("two.jpg")
    (root / "images" / "two.jpg").symlink_to("one.jpg")
    assert refused(Mount(root, "images"), "one.jpg").reason == Reason.IMAGE_MISSING


def test_a_file_that_may_not_be_read_is_missing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system is asked by a stand-in: for root every file is readable."""

    def access(path: Path, mode: int) -> bool:
        return not (mode == os.R_OK and Path(path).name == "a.jpg")

    monkeypatch.setattr(os, "access", access)
    verdict = refused(Mount(root, "images"), "a.jpg")
    assert verdict == Verdict(Reason.IMAGE_UNREADABLE, "'images/a.jpg': no permission to read it")


def test_a_name_that_is_no_utf8_is_not_taken_by_a_repair(root: Path) -> None:
    try:
        (root / "images" / os.fsdecode(b"odd\xff")).mkdir()
        (root / "images" / os.fsdecode(b"odd\xff") / "z.jpg").write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (root / "images" / "z.jpg").symlink_to(os.fsdecode(b"odd\xff/z.jpg"))
    assert "no UTF-8" in refused(Mount(root, "images"), "z.jpg").detail


def test_a_missing_folder_is_named(root: Path) -> None:
    with pytest.raises(DataError, match=r"root/imgs does not exist.*check --root"):
        Mount(root, "imgs").require()


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    key=st.one_of(
        st.text(max_size=40),
        st.lists(st.sampled_from(["..", ".", "sub", "a.jpg", "", "folder"]), max_size=6).map(
            "/".join
        ),
    )
)
def test_whatever_the_key_what_is_found_lies_below_the_root(root: Path, key: str) -> None:
    link = root / "images" / "folder"
    if not link.is_symlink():
        link.symlink_to("/")
    place = Mount(root, "images").locate(key)
    if isinstance(place, Located):
        assert ".." not in PurePosixPath(place.image_id).parts
        assert (root / place.image_id).resolve().is_relative_to(root.resolve())
        assert (root / place.image_id).is_file()
    else:
        assert place.reason in (Reason.IMAGE_MISSING, Reason.IMAGE_OUTSIDE_ROOT)
