"""The columns that a plan is held in, against Python's own dicts and lists."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lapilli.data.config import BuildConfig
from lapilli.data.mounts import Located
from lapilli.data.mounts.places import Cell, Member
from lapilli.data.numbered import NamesByForm, NumberedNames
from lapilli.data.planning.incremental import Previous, image_stamp
from lapilli.data.planning.originals import Originals
from lapilli.data.planning.parts.image_slots import SlotPlaces, arrange_slots
from lapilli.data.planning.parts.image_table import Images
from lapilli.data.planning.parts.read_sources import Reading
from lapilli.data.planning.parts.run_scans import scan_here
from lapilli.data.planning.plan import plan_build
from tests.factories import build_config, conversation, make_mixture, make_tokenizer

NAMES = st.lists(st.text(st.characters(), max_size=4) | st.sampled_from(["\ud800", "a", "ab"]))


@settings(max_examples=60, deadline=None)
@given(names=NAMES, asked=NAMES)
@example(names=[f"{n}.jpg" for n in range(3000)], asked=["7.jpg", "3000.jpg", ""])
def test_names_are_numbered_as_a_dict_does(names: list[str], asked: list[str]) -> None:
    numbered, expected = NumberedNames(), dict[str, int]()
    assert [numbered.add(name) for name in names] == [
        expected.setdefault(name, len(expected)) for name in names
    ]
    assert list(numbered) == list(expected)
    assert [numbered.find(name) for name in (*asked, *names)] == [
        expected.get(name, -1) for name in (*asked, *names)
    ]


@settings(max_examples=40, deadline=None)
@given(names=st.lists(st.text("abAB", max_size=3), unique=True))
def test_names_of_a_form_come_in_order(names: list[str]) -> None:
    by_form = NamesByForm(names, str.lower)
    for form in ("", "a", "ab", "bb", "c"):
        assert by_form.get(form) == [name for name in names if name.lower() == form]


def places() -> list[Located]:
    """Files, members of two archives, a cell, and bytes in a dataset's own shard."""
    member = Member(offset=5, stored=7, size=9, method=8, crc=3)
    cell = Cell(column="image", group=1, row=2, entry=-1, size=11)
    archive: dict[str, Any] = {"container": "b.zip", "size": 50, "mtime_ns": 6}
    return [
        Located("a.jpg", "a.jpg", 1, 2),
        Located(image_id="b.zip/é.jpg", member=member, **archive),
        Located("c.jpg", "c.jpg", 1 << 40, 1 << 62),
        Located(image_id="b.zip/2.jpg", member=member._replace(method="tar", crc=0), **archive),
        Located("t.parquet/image/2", "t.parquet", 3, 4, cell),
        Located("d.jpg", "/out/shard.arrow", 3, 4),
    ]


def test_a_table_gives_back_each_place_and_stamp() -> None:
    images, given_places = Images(), places()
    assert [images.number(place) for place in [*given_places, *given_places]] == [*range(6)] * 2
    table = images.table()
    assert table.places(0, 6) == given_places
    stamps = table.stamps(Originals(None, Path()))
    assert [one.tobytes() for one in stamps] == [*map(image_stamp, given_places)]
    assert table.source_bytes == 1 + 9 + (1 << 40) + 9 + 11 + 3
    some = table.only(np.array([4, 1]))
    assert some.places(0, 2) == [given_places[4], given_places[1]]
    pairs = [[place.image_id, image_stamp(place).hex()] for place in given_places]
    text = json.dumps(pairs, ensure_ascii=False, separators=(",", ":"))
    assert table.digest(stamps) == hashlib.sha256(text.encode()).hexdigest()


@settings(max_examples=40, deadline=None)
@given(before=st.lists(st.sampled_from("abcdefgh"), unique=True), now=st.permutations("defghij"))
def test_slots_stay_and_new_images_come_behind(before: list[str], now: Sequence[str]) -> None:
    found = [Located(name, name, ord(name), 1) for name in now]
    images = Images()
    for place in found:
        images.number(place)
    table = images.table()
    stamps = table.stamps(Originals(None, Path()))
    previous: Any = Previous.__new__(Previous)
    object.__setattr__(previous, "slots", [(name, b"then") for name in before])
    for there in (None, previous):
        slots = arrange_slots(table, stamps, there)
        by_name = {place.image_id: image_stamp(place) for place in found}
        old = dict.fromkeys(before if there else [])
        expected = [(name, by_name.get(name, b"")) for name in old]
        expected += [pair for pair in by_name.items() if pair[0] not in old]
        assert list(slots) == expected
        assert slots[1:4] == expected[1:4]
        assert slots.unused == sum(not stamp for _, stamp in expected)
        numbers = slots.of_images().tolist()
        assert [expected[slot][0] for slot in numbers] == [*now]
        in_slots = SlotPlaces(slots, 0, len(slots))
        assert [(p.image_id, bool(p.container)) for p in in_slots] == [
            (name, bool(stamp)) for name, stamp in expected
        ]
        assert pickle.loads(pickle.dumps(in_slots[1:3])) == tuple(in_slots)[1:3]
        assert in_slots[-1] == tuple(in_slots)[-1]
        assert slots.stamp_column().to_pylist() == [stamp for _, stamp in expected]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> BuildConfig:
    """Two sources of one folder of images."""
    folder = tmp_path_factory.mktemp("columns")
    mixture = make_mixture(folder / "mix")
    first = replace(mixture.sources[0], annotations="drawn.json")
    sources = [first, replace(first, name="again", annotations="drawn.json")]
    tokenizer = make_tokenizer(folder / "tokenizer")
    return build_config(replace(mixture, sources=sources), folder / "out", tokenizer)


@settings(max_examples=12, deadline=None)
@given(
    ids=st.lists(st.sampled_from(["", "a", "a#2", "a#3", "b", "b#2#2"]), min_size=4, max_size=30),
    images=st.lists(st.integers(-1, 3), min_size=30, max_size=30),
    range_bytes=st.integers(1, 9000),
)
def test_ids_and_images_repeat_across_ranges(
    config: BuildConfig, ids: list[str], images: list[int], range_bytes: int
) -> None:
    root = Path(config.root)
    keys = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*.*")
        if path.suffix in (".png", ".jpg")
    )
    keys = [keys[0], keys[1], keys[1].upper(), "images/none.png"]
    records = [
        conversation(record_id, keys[image] if image >= 0 else None, seed=number)
        for number, (record_id, image) in enumerate(zip(ids, images, strict=False))
    ]
    records.append(conversation("last"))
    (root / "drawn.json").write_text(json.dumps(records), encoding="utf-8")
    plan = plan_build(config, reading=Reading(range_bytes, scan_here))
    whole = plan_build(config, reading=Reading(1 << 40))
    assert plan.digests == whole.digests
    assert list(plan.slots) == list(whole.slots)
    assert list(plan.entries) == list(whole.entries)
    rows = range(len(plan.entries))
    assert [*map(plan.entries.images, rows)] == [*map(whole.entries.images, rows)]
    assert [task.name for task in plan.tasks()] == [task.name for task in whole.tasks()]
    names = plan.entries.sample_ids.to_pylist()
    assert len(set(names)) == len(names) == 2 * len(records)
