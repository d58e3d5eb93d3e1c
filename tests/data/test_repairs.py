"""Keys spelt otherwise than their files: never a file of another name, never one of two."""

from __future__ import annotations

import io
import json
import re
import tarfile
import unicodedata
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lapilli.data.building.driver import build
from lapilli.data.building.runners import run_here
from lapilli.data.config import SourceConfig
from lapilli.data.mounts import Located, Mount
from lapilli.data.planning.plan import plan_build
from lapilli.data.planning.scan import Survey, survey
from lapilli.data.record import Entry, Reason, Verdict
from tests.factories import (
    Mixture,
    build_config,
    conversation,
    image_bytes,
    make_tokenizer,
)

PHOTO = image_bytes("jpeg", 12, 8)


def put(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PHOTO)


def read(mount: Mount, key: str) -> tuple[str, str]:
    """The image's identity, and the repair that it took."""
    place = mount.locate(key)
    assert isinstance(place, Located), place
    return place.image_id, place.repair


def refused(mount: Mount, key: str, reason: Reason = Reason.IMAGE_MISSING) -> str:
    verdict = mount.locate(key)
    assert isinstance(verdict, Verdict), verdict
    assert verdict.reason == reason, verdict
    assert "\n" not in verdict.detail
    return verdict.detail


# ---- the rule, against an oracle of its own ------------------------------------------------------

IMAGES = ("jpg", "jpeg", "png", "gif", "webp", "JPG", "bmp", "tif")
KNOWN = re.compile(r"(?<=[^/])\.(jpe?g|png|gif|webp|bmp|tiff?)$", re.I | re.S)
PIECES = st.sampled_from(
    ["a", "B", "cat", "1", "11", "2", "24", "训", "练", "测", "é", "e\u0301", "ü", "ß", "ss", "д",
     "Д", "٣", "三", "十", "-", "_", " ", ".", "(", "5", "k", "\u212a"]
)  # fmt: skip
STEMS = st.lists(PIECES, min_size=1, max_size=5).map("".join).filter(lambda s: s.strip(". "))
NAMES = st.tuples(STEMS, st.sampled_from(["", *(f".{e}" for e in IMAGES)])).map("".join)
PATHS = st.lists(NAMES, min_size=1, max_size=2).map("/".join)


def oracle_runs(stem: str) -> list[str]:
    """Letters and numbers in order: marks belong to letters, separators part numbers only."""
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", stem).casefold())
    kinds = [
        "d"
        if unicodedata.category(c) in ("Nd", "Nl", "No")
        else "l"
        if unicodedata.category(c)[0] in "LM"
        else "-"
        for c in text
    ]
    runs: list[tuple[str, str]] = []
    last = "-"
    for c, kind in zip(text, kinds, strict=True):
        if kind == "-":
            last = "-"
            continue
        joins = runs and runs[-1][0] == kind and (kind == "l" or last == "d")
        if joins:
            runs[-1] = (kind, runs[-1][1] + c)
        else:
            runs.append((kind, c))
        last = kind
    return [run for _, run in runs]


def oracle_same(key: str, file: str) -> bool:
    """Whether each part of a path has the same runs, the last without a known extension."""
    ours, theirs = key.split("/"), file.split("/")
    if len(ours) != len(theirs):
        return False
    ours[-1], theirs[-1] = KNOWN.sub("", ours[-1]), KNOWN.sub("", theirs[-1])
    return all(
        a == b or (oracle_runs(a) == oracle_runs(b) != [])
        for a, b in zip(ours, theirs, strict=True)
    )


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(files=st.lists(PATHS, min_size=1, max_size=6), keys=st.lists(PATHS, max_size=4))
def test_whatever_the_tree_a_key_never_reads_a_file_of_another_name(
    tmp_path_factory: pytest.TempPathFactory, files: list[str], keys: list[str]
) -> None:
    root = tmp_path_factory.mktemp("tree")
    made: list[str] = []
    for name in files:
        try:
            put(root, name)
            made.append(name)
        except OSError:  # a file where a folder is wanted
            continue
    mount = Mount(root)
    asked = [*keys, *(name.swapcase() for name in files), *(f"{name}.png" for name in files)]
    asked += [unicodedata.normalize("NFD", name) for name in files]
    for key in asked:
        place = mount.locate(key)
        if isinstance(place, Verdict):
            assert key not in made or not (root / key).is_file()
            continue
        assert (root / place.image_id).is_file()
        assert place.repair or key == place.image_id
        assert oracle_same(key, place.image_id), (key, place.image_id)
        others = [n for n in set(made) if n != place.image_id and oracle_same(key, n)]
        if KNOWN.search(key):  # then only what is called an image may stand for it
            others = [name for name in others if KNOWN.search(name)]
        exact = unicodedata.normalize("NFC", key) == unicodedata.normalize("NFC", place.image_id)
        if others and not exact:  # only in folders that are themselves another spelling
            assert {n.rpartition("/")[0] for n in others} != {place.image_id.rpartition("/")[0]}


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(name=NAMES, how=st.sampled_from(["percent", "absolute", "backslash", "twice"]))
def test_what_is_encoded_is_read_exactly_or_not_at_all(
    tmp_path_factory: pytest.TempPathFactory, name: str, how: str
) -> None:
    root = tmp_path_factory.mktemp("encoded")
    put(root, f"sub/{name}")
    path = f"sub/{name}"
    key = {
        "percent": quote(path), "absolute": f"{root}/{path}", "backslash": path.replace("/", "\\"),
        "twice": quote(quote(path)),
    }[how]  # fmt: skip
    assert read(Mount(root), key)[0] == path
    (root / path).rename(root / "sub" / f"x{name}")
    assert isinstance(Mount(root).locate(key), Verdict)


# ---- one by one ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("测试/1.jpg", "训练/1.jpg"),
        ("2024-11-1/1.jpg", "2024-1-11/1.jpg"),
        ("20241-11.jpg", "2024-111.jpg"),
        ("二十-一.jpg", "二-十一.jpg"),
        ("f/12.jpg", "f/12.5"),
        ("f/125.jpg", "f/12.5"),
        ("поезд/1.jpg", "самолёт/1.jpg"),
        ("e.jpg", "é.jpg"),
        ("🐶.jpg", "🐱.jpg"),
        ("__.jpg", "--.jpg"),
        ("a.txt", "a.jpg"),
        ("١.jpg", "٢.jpg"),
        ("1.jpg", "１.jpg"),
        ("my 20a.jpg", "my%20a.jpg"),
        ("Img/a.jpg", "img\\a.jpg"),
    ],
)
def test_another_name_is_no_repair(tmp_path: Path, file: str, key: str) -> None:
    put(tmp_path, file)
    refused(Mount(tmp_path), key)


@pytest.mark.parametrize(
    "key",
    [
        "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBD", "iVBORw0KGgoAAAANSUhEUgAAAAEAAAAB" * 300,
        "R0lGODlhAQABAIAAAP///wAAACwAAAAA", "DATA:image/png;base64,iVBORw0KGgo",
    ],
)  # fmt: skip
def test_an_image_in_place_of_its_name_is_told(tmp_path: Path, key: str) -> None:
    assert "is the image itself" in refused(Mount(tmp_path), key, Reason.SCHEMA)


@pytest.mark.parametrize(
    ("file", "key", "kind"),
    [
        ("f/12.5.jpg", "f/12.5", "extension"),
        ("U\u0308bung.jpg", "\u00dcbung.jpg", "normal_form"),
        ("\u00dcbung.jpg", "%C3%9Cbung.jpg", "percent"),
        ("STRASSE.jpg", "straße.jpg", "case"),
        ("训_练/1.jpg", "训练/1.jpg", "alias"),
        ("my photo.jpg", "my-photo.jpg", "alias"),
        ("my a.jpg", "my%20a.jpg", "percent"),
        ("img/a.jpg", "img\\a.jpg", "backslash"),
        ("img/a.jpg", ".\\img\\a.jpg", "backslash"),
        ("a.jpg", "a.jpg\n", "white_space"),
        ("猫.jpg", "猫.jpg".encode("gbk").decode("cp437"), "code_page"),
        ("猫.jpg".encode().decode("cp437"), "猫.jpg", "code_page"),
        ("a.ppm", "a.jpg", "extension"),
        ("K.jpg", "\u212a.jpg", "normal_form"),
    ],
)
def test_the_same_name_is_read_and_counted(tmp_path: Path, file: str, key: str, kind: str) -> None:
    put(tmp_path, file)
    mount = Mount(tmp_path)
    image_id, repair = read(mount, key)
    assert (image_id, repair) == (file, kind)
    assert dict(mount.repairs) == {kind: 1}
    assert list(mount.repaired()) == [(key, file, kind, 1)]


def test_a_key_as_it_is_called_comes_before_what_it_decodes_to(tmp_path: Path) -> None:
    put(tmp_path, "my%20a.jpg", "my a.jpg")
    assert read(Mount(tmp_path), "my%20a.jpg") == ("my%20a.jpg", "")


@pytest.mark.parametrize(
    ("files", "key"),
    [
        (["a.png", "a.gif"], "a.jpg"),
        (["A.jpg", "a.png"], "a.jpg"),
        (["a_1.jpg", "a-1.jpg"], "a 1.jpg"),
        (["12.5.jpg", "12-5.png"], "12.5"),
        (["a_b/1.jpg", "a-b/1.jpg"], "ab/1.jpg"),
    ],
)
def test_two_candidates_are_a_verdict_that_names_them(
    tmp_path: Path, files: list[str], key: str
) -> None:
    put(tmp_path, *files)
    detail = refused(Mount(tmp_path), key, Reason.AMBIGUOUS_IMAGE)
    assert all(name.split("/")[0] in detail for name in files)


@pytest.mark.parametrize(
    ("key", "reason", "words"),
    [
        ("https://example.com/a.jpg", Reason.IMAGE_MISSING, "on the web; download it"),
        ("data:image/png;base64," + "/9j/" * 5000, Reason.SCHEMA, "write it to a file"),
        ("D:\\img\\x.jpg", Reason.IMAGE_OUTSIDE_ROOT, "absolute path of Windows"),
        ("\\\\server\\x.jpg", Reason.IMAGE_OUTSIDE_ROOT, "absolute path of Windows"),
        ("s3://bucket/x.jpg", Reason.IMAGE_MISSING, "is an address"),
        ("", Reason.IMAGE_MISSING, "the image key is empty"),
        (" \n", Reason.IMAGE_MISSING, "the image key is empty"),
        ("/etc/passwd", Reason.IMAGE_OUTSIDE_ROOT, "absolute path outside the root"),
        ("%2e%2e/%2e%2e/etc/passwd", Reason.IMAGE_OUTSIDE_ROOT, "leads outside the root"),
        ("HTTPS://example.com/a.jpg", Reason.IMAGE_MISSING, "on the web; download it"),
        ("..\\..\\secret.jpg", Reason.IMAGE_OUTSIDE_ROOT, "leads outside the root"),
        ("a/" * 3000 + "b.jpg", Reason.IMAGE_MISSING, "expected the path of a file"),
    ],
)
def test_what_is_no_path_is_named_for_what_it_is(
    tmp_path: Path, key: str, reason: Reason, words: str
) -> None:
    put(tmp_path, "img/a.jpg")
    assert words in refused(Mount(tmp_path), key, reason)


def test_an_absolute_key_inside_the_root_is_read(tmp_path: Path) -> None:
    put(tmp_path / "root", "img/a.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "root")
    mount = Mount(tmp_path / "link", "img")
    for start in (tmp_path / "link", tmp_path / "root"):
        assert read(mount, f"{start}/img/a.jpg") == ("img/a.jpg", "absolute")
    assert read(mount, f"file://{tmp_path}/root/img/a.jpg") == ("img/a.jpg", "absolute")
    assert dict(mount.repairs) == {"absolute": 3}
    refused(mount, f"{tmp_path}/root/img/b.jpg")
    refused(mount, f"{tmp_path}/root/img/a.png")  # what is decoded is there exactly
    refused(mount, f"{tmp_path}/rootless/a.jpg", Reason.IMAGE_OUTSIDE_ROOT)
    refused(mount, f"{tmp_path}/root/../secret.jpg", Reason.IMAGE_OUTSIDE_ROOT)


def test_a_missing_image_says_where_one_of_its_name_lies(tmp_path: Path) -> None:
    put(tmp_path, "img/a.jpg", "img/٣.jpg")
    assert "set `images: .`" in refused(Mount(tmp_path, "img"), "img/a.jpg")
    assert "`path_prefix: 'data/'`" in refused(Mount(tmp_path), "data/img/a.jpg")
    elsewhere = refused(Mount(tmp_path), "/home/u/img/a.jpg", Reason.IMAGE_OUTSIDE_ROOT)
    assert "`path_prefix: '/home/u/'`" in elsewhere
    put(tmp_path, "img/a１.jpg")
    assert "\\uff11" in refused(Mount(tmp_path), "img/a1.jpg")


def test_a_missing_image_is_read_from_the_annotations_folder(tmp_path: Path) -> None:
    put(tmp_path, "set/images/1.jpg", "all/set/2.jpg")
    mount = Mount(tmp_path, "all", beside="set")
    assert read(mount, "images/1.jpg") == ("set/images/1.jpg", "annotation_folder")
    refused(mount, "images/1.png")  # exactly there, or not at all
    put(tmp_path, "all/Images/1.jpg")
    refused(Mount(tmp_path, "all", beside="set"), "images/1.jpg", Reason.AMBIGUOUS_IMAGE)


# ---- archives in the root ------------------------------------------------------------------------


def pack(path: Path, *members: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tar":
        with tarfile.open(path, "w") as tar:
            for name in members:
                info = tarfile.TarInfo(name)
                info.size = len(PHOTO)
                tar.addfile(info, io.BytesIO(PHOTO))
        return
    with zipfile.ZipFile(path, "w") as archive:
        for name in members:
            archive.writestr(name, PHOTO)


def test_an_archive_in_the_root_needs_the_keys_own_path(tmp_path: Path) -> None:
    pack(tmp_path / "photos.zip", "photos/1.jpg")
    refused(Mount(tmp_path), "mine/photos/1.jpg")
    pack(tmp_path / "pictures.zip", "mine/pictures/1.jpg")
    mount = Mount(tmp_path)
    assert read(mount, "mine/pictures/1.jpg")[1] == "archive"
    assert dict(mount.repairs) == {"archive": 1}


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("above", ["", "set/"])
@pytest.mark.parametrize(
    ("member", "stands_in"),
    [("foo/1.jpg", True), ("1.jpg", True), ("bar/foo/1.jpg", False), ("Foo/1.jpg", False)],
)
def test_an_archive_beside_a_folder_needs_the_keys_own_path(
    tmp_path: Path, kind: str, above: str, member: str, stands_in: bool
) -> None:
    """As `unzip` would make it, into the folder above or into one of the archive's name."""
    archive = f"{above}foo.{kind}"
    pack(tmp_path / archive, member)
    mount = Mount(tmp_path)
    if stands_in:
        assert read(mount, f"{above}foo/1.jpg") == (f"{archive}/{member}", "archive")
        assert dict(mount.repairs) == {"archive": 1}
        assert not mount.settle()
    else:
        refused(mount, f"{above}foo/1.jpg")
        assert not mount.repairs


def test_the_folder_in_an_archive_comes_before_its_top(tmp_path: Path) -> None:
    pack(tmp_path / "foo.zip", "foo/1.jpg", "1.jpg", "2.jpg", "bar/foo/2.jpg")
    mount = Mount(tmp_path)
    assert read(mount, "foo/1.jpg") == ("foo.zip/foo/1.jpg", "archive")
    refused(mount, "foo/2.jpg")


@pytest.mark.parametrize("member", ["foo/1.jpg", "1.jpg"])
def test_a_key_that_an_archive_has_stays_beside_one_that_is_repaired(
    tmp_path: Path, member: str
) -> None:
    pack(tmp_path / "foo.zip", member)
    mount = Mount(tmp_path)
    read(mount, "foo/1.jpg")
    read(mount, "foo/1.png")
    assert set(mount.settle()) == {"foo/1.png"}


def test_a_published_archive_in_the_root_is_counted(tmp_path: Path) -> None:
    pack(tmp_path / "train2017.zip", "train2017/1.jpg")
    mount = Mount(tmp_path)
    place = read(mount, "coco/train2017/1.jpg")
    assert place == ("train2017.zip/train2017/1.jpg", "archive")
    read(mount, "other/coco/train2017/1.jpg")
    assert set(mount.settle()) == {"coco/train2017/1.jpg", "other/coco/train2017/1.jpg"}


@pytest.mark.parametrize("page", ["utf-8", "gbk"])
def test_names_of_a_zip_in_another_code_page(tmp_path: Path, page: str) -> None:
    name = "图/猫.jpg".encode(page).decode("cp437")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        info = zipfile.ZipInfo("x" * len(name.encode("cp437")))
        archive.writestr(info, PHOTO)
    data = (tmp_path / "a.zip").read_bytes()
    data = data.replace(b"x" * len(name.encode("cp437")), name.encode("cp437"))
    (tmp_path / "a.zip").write_bytes(data)
    mount = Mount(tmp_path)
    assert read(mount, "a.zip/图/猫.jpg") == (f"a.zip/{name}", "code_page")


def test_a_zip_with_backslashes(tmp_path: Path) -> None:
    pack(tmp_path / "a.zip", "sub\\b.jpg", "/c.jpg")
    mount = Mount(tmp_path)
    assert read(mount, "a.zip/sub/b.jpg")[1] == "backslash"
    assert read(mount, "a.zip/c.jpg") == ("a.zip/c.jpg", "")


# ---- two keys, one file --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "keys", "ambiguous"),
    [
        (["a b.jpg"], ["a-b.jpg", "a_b.jpg"], ["a-b.jpg", "a_b.jpg"]),
        (["a.jpg"], ["a.png", "a.gif"], ["a.png", "a.gif"]),
        (["a.jpg"], ["a.jpg", "a.png"], ["a.png"]),
        (["a.jpg"], ["A.JPG", "a.jpg", "A.jpg"], []),
        (["a.png"], ["A.JPG", "a.jpg"], []),
        (["x/a.jpg"], ["x\\a.jpg", "x/a.jpg", "x%2Fa.jpg"], []),
        (["text_vqa/a.jpg"], ["textvqa/a.jpg", "text_vqa/a.jpg"], []),
        (["text_vqa/a.jpg"], ["textvqa/a.jpg", "text-vqa/a.jpg"],
         ["textvqa/a.jpg", "text-vqa/a.jpg"]),
    ],
)  # fmt: skip
def test_two_keys_that_would_be_read_from_one_file(
    tmp_path: Path, files: list[str], keys: list[str], ambiguous: list[str]
) -> None:
    put(tmp_path, *files)
    mount = Mount(tmp_path)
    for key in keys:
        read(mount, key)
    assert sorted(mount.settle()) == sorted(ambiguous)
    for key in ambiguous:
        assert "would both be read from" in refused(mount, key, Reason.AMBIGUOUS_IMAGE)
    assert not {key for key, *_ in mount.repaired()} & set(ambiguous)


def test_the_recipes_aliases_are_the_users_word(tmp_path: Path) -> None:
    put(tmp_path, "textvqa/1.jpg")
    mount = Mount(tmp_path, aliases={"text_vqa": "textvqa", "elsewhere": "textvqa"})
    for key in ("text_vqa/1.jpg", "elsewhere/1.jpg", "textvqa/1.jpg"):
        read(mount, key)
    assert mount.settle() == {}
    assert dict(mount.repairs) == {"alias": 2}


# ---- through a check and a build -----------------------------------------------------------------


@pytest.fixture
def mended(tmp_path: Path) -> Mixture:
    """Records whose keys are mended, ambiguous, or need no repair."""
    root = tmp_path / "root"
    put(root, "one.png", "a b.jpg", "two.png", "plain.jpg", "my c.jpg")
    (root / "empty.png").write_bytes(b"")
    records = [
        conversation("good", "plain.jpg"),
        conversation("mended", "one.jpg"),
        conversation("mended again", "one.jpg"),
        conversation("encoded", "my%20c.jpg"),
        conversation("first", "a-b.jpg"),
        conversation("second", "a_b.jpg"),
        conversation("beside", ["plain.jpg", "a_b.jpg"]),
        conversation("lost too", ["a_b.jpg", "nowhere.jpg"]),
        conversation("empty too", ["a-b.jpg", "empty.jpg"]),
        conversation("no image", ""),
    ]
    records[-1]["conversations"][0]["value"] = "Why?"
    (root / "a.json").write_text(json.dumps(records))
    reasons: dict[str, Reason | None] = {f"s/{record['id']}": None for record in records}
    for name in ("first", "second", "beside", "empty too"):
        reasons[f"s/{name}"] = Reason.AMBIGUOUS_IMAGE
    reasons["s/lost too"] = Reason.IMAGE_MISSING
    return Mixture(root, [SourceConfig("s", "a.json")], reasons, [])


def test_check_and_preprocess_agree_and_list_every_repair(mended: Mixture, tmp_path: Path) -> None:
    config = build_config(mended, tmp_path / "out", make_tokenizer(tmp_path / "tokenizer"))
    bad: list[Entry] = []
    found: Survey = survey(config, on_bad=bad.append)
    expected = {name: reason for name, reason in mended.expected.items() if reason}
    assert {entry.sample_id: entry.verdict.reason for entry in bad} == expected
    plan = plan_build(config)
    planned = {e.sample_id: e.verdict for e in plan.entries if not e.verdict.kept}
    assert planned == {entry.sample_id: entry.verdict for entry in bad}
    assert {*plan.image_ids} == found.images.keys() == {"plain.jpg", "one.png", "my c.jpg"}
    counts = build(plan, runner=run_here).manifest.counts
    assert counts["repairs"] == dict(sorted(found.repairs.items()))
    rows: list[dict[str, Any]] = pq.read_table(tmp_path / "out" / "repairs.parquet").to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        ("s", "one.jpg", "one.png", "extension", 2),
        ("s", "my%20c.jpg", "my c.jpg", "percent", 1),
        ("s", "empty.jpg", "empty.png", "extension", 1),
    ]
    assert found.mended["percent"] == ("my%20c.jpg", "my c.jpg")


def test_a_tar_is_an_archive_like_any(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(PHOTO)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "x.jpg", "Ü/1.jpg")
    assert read(Mount(tmp_path), "a.tar/U\u0308/1.jpg")[1] == "normal_form"
