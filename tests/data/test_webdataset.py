"""WebDataset tars: every member is counted, every sample is read right or has a verdict."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_iterator

from lapilli.data.config import SourceConfig
from lapilli.data.errors import DataError
from lapilli.data.mounts import Located, Mount, read_image
from lapilli.data.record import Entry, Record, Verdict
from lapilli.data.sources.tally import Members, Tally
from lapilli.data.sources.validation import read_entries
from tests.data.source_files import JPEG, as_bytes, said
from tests.factories import conversation, image_bytes

PNG = image_bytes("png", 6, 5)
Content = bytes | tuple[str, str]  # bytes, or how a link is made and what it leads to
LINKS = {"hard": tarfile.LNKTYPE, "soft": tarfile.SYMTYPE}


def write(path: Path, members: Iterable[tuple[str, Content | None]]) -> Path:
    """A tar of these members in this order; None is a folder."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            elif isinstance(content, tuple):
                info.type, info.linkname = LINKS[content[0]], content[1]
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def read(root: Path, **config: Any) -> tuple[list[Entry], Members]:
    """The entries of `s.tar`, and its members."""
    tally = Tally()
    source = SourceConfig("s", "s.tar", format="webdataset", **config)
    found = list(read_entries(source, root, tally=tally))
    assert tally.members is not None
    return found, tally.members


def records(found: list[Entry]) -> dict[str, Record]:
    return {e.record_id: e.record for e in found if e.verdict.kept and e.record is not None}


def images_of(root: Path, record: Record) -> list[bytes]:
    """The bytes behind a record's keys."""
    places = [Mount(root).locate(key) for key in record.images]
    return [read_image(root, place) for place in places if isinstance(place, Located)]


# ---- names -------------------------------------------------------------------------------------


def test_names_with_dots_are_as_many_samples_as_stems(tmp_path: Path) -> None:
    """A rule of the first dot makes one sample of 300: `img`, with 600 suffixes."""
    keys = [f"{n:06d}" for n in range(300)] + [f"img.host.com_{n:06d}" for n in range(300)]
    members = [(key + end, data) for key in keys for end, data in ((".png", PNG), (".txt", b"A"))]
    write(tmp_path / "s.tar", members)
    found, counted = read(tmp_path)
    assert [entry.record_id for entry in found if entry.verdict.kept] == keys
    assert counted.used == {"png": 600, "txt": 600}
    assert counted.total == len(members)
    assert [e.record.images for e in found if e.record] == [(f"s.tar/{key}.png",) for key in keys]


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["a.0.jpg", "a.1.jpg", "a.json"], ["a"]),
        (["a.0.jpg", "a.0.txt", "a.1.jpg", "a.json"], ["a"]),  # the exact json comes first
        (["a.jpg", "a.txt", "a.caption.txt"], ["a"]),
        (["a.jpg", "a.meta.json", "a.txt"], ["a"]),
        (["x.y.0.jpg", "x.y.1.jpg", "x.y.json", "x.z.json", "x.z.0.jpg"], ["x.y", "x.z"]),
        (["x.y.jpg", "x.y.seg.png", "x.y.txt"], ["x.y"]),
        (["x.1.json", "x.2.json", "x.3.json"], ["x.1", "x.2", "x.3"]),
        (["img.jpg", "img.txt", "img.b.jpg", "img.b.txt"], ["img", "img.b"]),
        (["v1.0/a.jpg", "v1.0/a.txt", "v1.0/b.jpg", "v1.0/b.txt"], ["v1.0/a", "v1.0/b"]),
        (["x.A.jpg", "x.A.txt", "x.a.jpg", "x.a.txt"], ["x.A", "x.a"]),
    ],
)
def test_which_members_are_a_sample(tmp_path: Path, names: list[str], keys: list[str]) -> None:
    text = as_bytes(conversation("r"))
    ends = {"json": text, "txt": b"A goat.", "jpg": JPEG, "png": PNG}
    write(tmp_path / "s.tar", [(name, ends[name.rpartition(".")[2]]) for name in names])
    found, counted = read(tmp_path)
    shards = [json.loads(entry.raw_json) for entry in found]
    ids = [entry["id"] if "json" not in entry else None for entry in shards]
    assert len(found) == len(keys)
    assert [key for key, given in zip(keys, ids, strict=True) if given not in (None, key)] == []
    assert counted.total == len(names)


# ---- what is beside the images -----------------------------------------------------------------


def test_masks_links_order_and_suffixes_nobody_knows(tmp_path: Path) -> None:
    named = as_bytes(conversation("r", "x.jpg"))
    write(
        tmp_path / "s.tar",
        [
            ("folder", None),
            ("0.jpg", JPEG),
            ("0.seg.png", PNG),
            ("0.depth.png", PNG),
            ("0.txt", b"A goat."),
            ("1.jpg", ("hard", "0.jpg")),
            ("1.txt", b"Linked."),
            ("2.png", ("soft", "./0.seg.png")),
            ("2.txt", ("hard", "1.txt")),
            ("3.img", JPEG),
            ("3.caption", b"Never read."),
            ("4.jpg", JPEG),
            ("5.png", PNG),
            ("4.json", named),
            ("5.json", named),
            ("__meta__/shard.json", b"{}"),
            ("LICENSE", b"free"),
        ],
    )
    found, counted = read(tmp_path)
    verdicts = {
        json.loads(entry.raw_json)["images"][0]
        if json.loads(entry.raw_json)["images"]
        else entry.record_id: str(entry.verdict.reason)
        for entry in found
    }
    assert verdicts == {
        "0.jpg": "None",
        "0.seg.png": "None",
        "3": "schema",
        "4.jpg": "None",
        "5.png": "None",
    }
    assert [said(record)[1][1] for record in records(found).values()][:3] == [
        "A goat.",
        "Linked.",
        "Linked.",
    ]
    pictures = [images_of(tmp_path, e.record) for e in found if e.record is not None]
    assert pictures == [[JPEG], [JPEG], [PNG], [JPEG], [PNG]]
    bad = next(entry for entry in found if not entry.verdict.kept)
    assert "not read: img, caption" in bad.verdict.detail
    assert counted.total == 17
    assert counted.unused == {
        "seg.png": 1,
        "depth.png": 1,
        "img": 1,
        "caption": 1,
        "(folder)": 1,
        "(meta)": 1,
        "(no suffix)": 1,
    }
    assert counted.unknown == {"img": 1, "caption": 1}


@pytest.mark.parametrize(
    ("suffixes", "images"),
    [
        ([], ["a.jpg"]),
        (["jpg"], ["a.jpg"]),
        (["seg.png"], ["a.seg.png"]),
        (["seg.png", "jpg"], ["a.seg.png", "a.jpg"]),
        ([".SEG.PNG"], ["a.seg.png"]),
        (["img"], ["a.img"]),
    ],
)
def test_a_setting_says_which_members_are_the_images(
    tmp_path: Path, suffixes: list[str], images: list[str]
) -> None:
    members = [("a.jpg", JPEG), ("a.seg.png", PNG), ("a.img", JPEG), ("a.txt", b"A goat.")]
    write(tmp_path / "s.tar", members)
    (entry,), counted = read(tmp_path, image_suffixes=suffixes)
    assert entry.record is not None
    assert entry.record.images == tuple(f"s.tar/{name}" for name in images)
    assert counted.used.total() == len(images) + 1
    assert len(images_of(tmp_path, entry.record)) == len(images)


def test_a_suffix_stands_for_its_numbered_ones(tmp_path: Path) -> None:
    names = ["a.10.left.png", "a.2.left.png", "a.0.png"]
    write(tmp_path / "s.tar", [*((name, PNG) for name in names), ("a.txt", b"A goat.")])
    (entry,), _ = read(tmp_path, image_suffixes=["left.png"])
    assert entry.record is not None
    assert entry.record.images == ("s.tar/a.2.left.png", "s.tar/a.10.left.png")


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("a.jpg", JPEG), ("a.png", PNG)], "each of jpg, png may be the image"),
        ([("a.jpg", JPEG), ("a.0.jpg", JPEG)], "each of 0.jpg, jpg may be the image"),
        ([("a.0.jpg", JPEG), ("a.0.png", PNG)], "each of 0.jpg, 0.png may be the image"),
        ([("a.jpg", JPEG), ("a.jpg", PNG)], "'a.jpg' twice"),
        ([("a.jpg", JPEG), ("a.txt", b"Another.")], "'a.txt' twice"),
        ([("a.jpg", ("hard", "b.jpg"))], "'a.jpg' is a link to no one file"),
        ([("a.jpg", ("soft", "../../b.jpg"))], "'a.jpg' is a link to no one file"),
        ([("a.jpg", ("soft", "a.jpg"))], "'a.jpg' is a link to no one file"),
        ([("a.seg.png", PNG)], "not read: seg.png"),
        ([("b.jpg", JPEG)], "expected an image and a txt"),
        ([("a.jpg", JPEG), ("a.json", b"{")], "'a.json' is no valid JSON"),
        ([("a.jpg", JPEG), ("a.json", b"\xff\xfe{\0}\0")], "'a.json': this is UTF-16 text"),
        ([("a.jpg", JPEG), ("a.json", b'{"caption": "\xe9"}')], "this is no UTF-8 text"),
    ],
)
def test_what_is_not_clear_is_a_verdict_that_names_it(
    tmp_path: Path, members: list[tuple[str, Content]], words: str
) -> None:
    write(tmp_path / "s.tar", [("a.txt", b"A goat."), *members])
    found, counted = read(tmp_path)
    (entry,) = (entry for entry in found if entry.record_id == "a")
    assert str(entry.verdict.reason) == "schema"
    assert words in entry.verdict.detail
    assert counted.total == len(members) + 1


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    members = [("a.jpg", JPEG), ("a.txt", mark + b"A goat."), ("b.jpg", JPEG)]
    write(tmp_path / "s.tar", [*members, ("b.json", mark + as_bytes({"caption": "A cat."}))])
    found, _ = read(tmp_path)
    assert [said(record)[-1] for record in records(found).values()] == [
        ("assistant", "A goat."),
        ("assistant", "A cat."),
    ]


THREE = [("a.jpg", JPEG), ("a.txt", b"A goat."), ("b.jpg", JPEG), ("b.txt", b"A cat."),
         ("c.jpg", JPEG), ("c.txt", b"A cow.")]  # fmt: skip


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda tar, at: tar[: at + 100], "cut short in the header at byte"),
        (lambda tar, at: tar[:at] + b"\xff" * 512 + tar[at + 512 :], "damaged header at byte"),
        (lambda tar, at: tar + tar, "bytes follow behind its end"),
    ],
)
def test_a_tar_that_goes_on_behind_its_apparent_end_is_an_error(
    tmp_path: Path, harm: Callable[[bytes, int], bytes], words: str
) -> None:
    """`tarfile` ends there without a word; so does an archive of images."""
    path = write(tmp_path / "s.tar", THREE)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        at = tar.getmember("b.txt").offset
    path.write_bytes(harm(whole, at))
    with pytest.raises(DataError, match=words) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)
    assert "this is a tar" not in str(caught.value)
    verdict = Mount(tmp_path).locate("s.tar/a.jpg")
    assert isinstance(verdict, Verdict)
    assert words in verdict.detail


@pytest.mark.parametrize("blocks", [0, 2, 20, 64])
def test_a_tar_may_be_padded_or_have_no_end_marker(tmp_path: Path, blocks: int) -> None:
    path = write(tmp_path / "s.tar", THREE)
    path.write_bytes(path.read_bytes().rstrip(b"\0") + b"\0" * 512)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size - size % 512] + b"\0" * 512 * blocks)
    found, counted = read(tmp_path)
    assert len(records(found)) == 3
    assert counted.total == 6


def test_a_key_that_comes_back_is_no_second_record(tmp_path: Path) -> None:
    members: list[tuple[str, Content]] = [("a.jpg", JPEG), ("a.txt", b"One.")]
    write(tmp_path / "s.tar", [*members, ("b.jpg", JPEG), ("b.txt", b"Two."), *members])
    found, counted = read(tmp_path)
    assert [(e.record_id, str(e.verdict.reason)) for e in found] == [("a", "schema"), ("b", "None")]
    assert counted.unused == {"(repeated)": 2}


def test_of_a_conversation_the_caption_beside_it_is_counted_as_not_used(tmp_path: Path) -> None:
    members = [("a.json", as_bytes(conversation("r"))), ("a.txt", b"A goat.")]
    write(tmp_path / "s.tar", members)
    found, counted = read(tmp_path)
    assert list(records(found)) == ["r"]
    assert (counted.used, counted.unused) == ({"json": 1}, {"txt": 1})


def test_of_two_captions_the_one_in_the_json_is_counted_as_not_read(tmp_path: Path) -> None:
    captioned = as_bytes({"caption": "A sheep."})
    members = [
        ("a.jpg", JPEG),
        ("a.txt", b"A goat."),
        ("a.json", captioned),
        ("b.jpg", JPEG),
        ("b.json", captioned),
    ]
    write(tmp_path / "s.tar", members)
    tally = Tally()
    source = SourceConfig("s", "s.tar", format="webdataset")
    found = records(list(read_entries(source, tmp_path, tally=tally)))
    assert [said(found[key])[1][1] for key in ("a", "b")] == ["A goat.", "A sheep."]
    assert tally.fields == {"caption": 1}


@pytest.mark.parametrize("images", [1, 2])
def test_pairs_without_a_marker_have_their_images_in_front_as_in_parquet(
    tmp_path: Path, images: int
) -> None:
    pairs = {"texts": [{"user": "What is it?", "assistant": "A goat."}, {"user": "Sure?",
             "assistant": "Yes."}], "file_name": "goat.jpg"}  # fmt: skip
    pictures = [JPEG, PNG][:images]
    members = [(f"a.{n}.jpg", data) for n, data in enumerate(pictures)]
    write(tmp_path / "s.tar", [*members, ("a.json", as_bytes(pairs))])
    cells = [[{"bytes": data, "path": None} for data in pictures]]
    pq.write_table(
        pa.table({"images": cells, "texts": [pairs["texts"]], "file_name": ["goat.jpg"]}),
        tmp_path / "s.parquet",
    )
    (packed,) = records(read(tmp_path)[0]).values()
    (entry,) = read_entries(SourceConfig("s", "s.parquet", format="parquet"), tmp_path)
    assert entry.record is not None
    assert packed.turns == entry.record.turns
    assert images_of(tmp_path, packed) == images_of(tmp_path, entry.record) == pictures


def test_settings_of_other_formats_are_refused() -> None:
    with pytest.raises(DataError, match=r"sources.image_suffixes: source s has the format llava"):
        SourceConfig("s", "a.json", image_suffixes=["jpg"])
    with pytest.raises(DataError, match=r"sources.roles: source s has the format basic_vlm"):
        SourceConfig("s", "a.json", format="basic_vlm", roles={"bot": "assistant"})
    with pytest.raises(DataError, match=r"sources.image_suffixes: '\.' of source s"):
        SourceConfig("s", "s.tar", format="webdataset", image_suffixes=["."])


# ---- any tar -----------------------------------------------------------------------------------

parts = st.sampled_from(["a", "b", "0", "1", "a.b", "a.1", "img.host", "d/a", "d.e/a", ".x", ""])
suffixes = st.sampled_from(
    ["jpg", "JPG", "png", "0.jpg", "1.jpg", "seg.png", "json", "txt", "npy", "cls", "x.txt", ""]
)
names = st.one_of(
    st.builds(lambda a, b: f"{a}.{b}" if b else a, parts, suffixes),
    st.text(st.sampled_from("ab./_0é\n"), min_size=1, max_size=6),
    st.sampled_from(["__meta__/a.json", "LICENSE", "./a.jpg", "a/"]),
).filter(lambda name: name.strip("/") not in ("", "."))
contents = st.one_of(
    st.sampled_from([JPEG, b"A goat.", b"{}", b"", as_bytes(conversation("r", "q.jpg")), None]),
    st.tuples(st.sampled_from(sorted(LINKS)), names),
)


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(members=st.lists(st.tuples(names, contents), max_size=12))
@example(members=[("img.a.jpg", JPEG), ("img.a.txt", b"A"), ("img.b.jpg", JPEG)])
def test_every_member_is_counted_and_every_sample_has_one_verdict(
    tmp_path: Path, members: list[tuple[str, Content | None]]
) -> None:
    """read = kept + quarantined, used + unused = the members that Python's tarfile finds."""
    with tarfile.open(write(tmp_path / "s.tar", members)) as tar:
        there = tar.getmembers()
    found, counted = read(tmp_path)
    assert counted.used.total() + counted.unused.total() == counted.total == len(there)
    assert counted.unknown <= counted.unused
    ids = [entry.sample_id for entry in found]
    assert len(set(ids)) == len(ids)
    used: Counter[str] = Counter()
    for entry in found:
        assert entry.verdict.kept == (entry.verdict.reason is None)
        sample = json.loads(entry.raw_json)
        used.update({"text": "json" in sample} | {"text2": "txt" in sample})
        used["images"] += len(sample["images"])
    assert used.total() == counted.used.total()


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    samples=st.dictionaries(
        st.sampled_from(["a", "b", "00", "d/a", "d.e/a", "x-y_z"]),
        st.dictionaries(
            st.sampled_from(["jpg", "png", "0.jpg", "1.jpg", "seg.png", "json", "txt", "npy"]),
            st.sampled_from([JPEG, b"A goat.", b"{}"]),
            min_size=1,
        ),
        min_size=1,
    )
)
def test_samples_are_those_of_the_webdataset_library(
    tmp_path: Path, samples: dict[str, dict[str, bytes]]
) -> None:
    """Where no name has further dots and members are adjacent, its own reader says which."""
    members = [(f"{k}.{end}", data) for k, ends in samples.items() for end, data in ends.items()]
    path = write(tmp_path / "s.tar", members)
    with path.open("rb") as file:
        stream = ({**item, "__url__": "s"} for item in tar_file_iterator(file))  # type: ignore[arg-type]
        theirs = [
            (sample["__key__"], {name for name in sample if not name.startswith("__")})
            for sample in group_by_keys(stream)
        ]
    found, counted = read(tmp_path)
    ours = [
        (
            element["id"],
            {name for name in ("json", "txt") if name in element}
            | {image.removeprefix(f"{element['id']}.") for image in element["images"]}
            | set(element.get("unused", [])),
        )
        for element in (json.loads(entry.raw_json) for entry in found)
    ]
    assert ours == theirs
    assert counted.total == sum(map(len, samples.values()))
