"""Captions: AI Challenger's file and Basic-VLM's pair."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lapilli.data.errors import DataError
from lapilli.data.record import Entry, Reason
from lapilli.data.sources.reading import json_scanner, json_stream
from tests.data.source_files import (
    entries,
    pair,
    records,
    refused,
    said,
)

# ---- captions ----------------------------------------------------------------------------------

CHINESE = ["一个人", "一位先生", "男人", "有人", "他"]
PROMPTS = ["<image>\n描述", "说说<image>"]


def challenger(root: Path, count: int = 40, **config: Any) -> list[Entry]:
    elements = [{"image_id": f"{n}.jpg", "caption": CHINESE, "url": "http"} for n in range(count)]
    (root / "a.json").write_text(json.dumps(elements))
    return entries(root, annotations="a.json", format="ai_challenger", prompts=PROMPTS, **config)


def test_each_caption_of_ai_challenger_is_a_record(tmp_path: Path) -> None:
    found = records(challenger(tmp_path))
    answers: dict[str, list[str]] = {}
    for record in found:
        question, answer = said(record)
        assert question[1] in PROMPTS
        answers.setdefault(record.images[0], []).append(answer[1])
    assert answers == {f"{n}.jpg": CHINESE for n in range(40)}
    assert [r.sample_id for r in found[:2]] == ["src/0.jpg", "src/0.jpg#2"]
    assert {said(record)[0][1] for record in found} == set(PROMPTS)


def test_one_caption_is_one_fixed_choice_of_the_seed(tmp_path: Path) -> None:
    once = [said(r) for r in records(challenger(tmp_path, captions="one", seed=1))]
    again = [said(r) for r in records(challenger(tmp_path, captions="one", seed=1))]
    other = [said(r) for r in records(challenger(tmp_path, captions="one", seed=2))]
    assert once == again != other
    assert len(once) == 40
    assert {answer for _, (_, answer) in once} == set(CHINESE)
    more = [said(r) for r in records(challenger(tmp_path, count=50, captions="one", seed=1))]
    assert more[:40] == once


def test_a_blank_caption_is_not_chosen_where_there_is_another(tmp_path: Path) -> None:
    elements = [{"image_id": f"{n}.jpg", "caption": ["", "词", " "]} for n in range(20)]
    (tmp_path / "a.json").write_text(json.dumps(elements))
    where = {"annotations": "a.json", "format": "ai_challenger"}
    assert len(records(entries(tmp_path, captions="one", **where))) == 20
    every = Counter(entry.verdict.reason for entry in entries(tmp_path, **where))
    assert every == {None: 20, Reason.EMPTY_ANSWER: 40}


@pytest.mark.parametrize(
    "element", [{"image_id": "a.jpg"}, {"image_id": "a.jpg", "caption": []}, {"caption": ["a"]}, 7,
                {"image_id": 7, "caption": ["a"]}, {"image_id": "a.jpg", "caption": [7]}]
)  # fmt: skip
def test_what_is_no_caption_has_a_verdict(tmp_path: Path, element: Any) -> None:
    (tmp_path / "a.json").write_text(json.dumps([element]))
    (entry,) = entries(tmp_path, annotations="a.json", format="ai_challenger")
    assert entry.verdict.reason == Reason.SCHEMA
    assert json.loads(entry.raw_json)


def mapped(**ids: Any) -> str:
    """An image map as Basic-VLM's preparation writes it."""
    path = "/home/u/data/coco/"
    return json.dumps(
        {f"{n}.jpg": {"path": path, "iamge_file": f"{n}.jpg", "ID": i} for n, i in ids.items()}
    )


def test_all_answers_of_the_pair_are_read(tmp_path: Path) -> None:
    captions = {"0": {"q": "What?<|extra_0|>", "a": ["A.", "B."]}, "1": {"q": "Who?", "a": "C."}}
    found = records(
        pair(tmp_path, mapped(x=0, y=1), json.dumps(captions), path_prefix="/home/u/data")
    )
    assert [(r.images, *said(r)) for r in found] == [
        (("coco/x.jpg",), ("user", "What?<image>"), ("assistant", "A.")),
        (("coco/x.jpg",), ("user", "What?<image>"), ("assistant", "B.")),
        (("coco/y.jpg",), ("user", "<image>\nWho?"), ("assistant", "C.")),
    ]
    assert [r.sample_id for r in found] == ["src/0", "src/0#2", "src/1"]


def test_keys_that_stand_twice_in_the_pair_are_two(tmp_path: Path) -> None:
    image_map = (
        '{"a.jpg": {"image_file": "a.jpg", "ID": 0}, "a.jpg": {"image_file": "a.jpg", "ID": 1}}'
    )
    captions = (
        '{"0": {"q": "1", "a": ["A"]}, "0": {"q": "2", "a": ["B"]}, "1": {"q": "3", "a": ["C"]}}'
    )
    found = records(pair(tmp_path, image_map, captions))
    assert [said(r)[1][1] for r in found] == ["A", "B", "C"]


def test_an_id_of_several_images_is_reported_and_nothing_is_lost(tmp_path: Path) -> None:
    captions = {
        "0": {"q": "?", "a": ["A"]},
        "1": {"q": "?", "a": ["B"]},
        "7": {"q": "?", "a": ["D"]},
    }
    found = pair(tmp_path, mapped(x=0, y=0, z=1, w=2), json.dumps(captions))
    assert [entry.verdict.kept for entry in found] == [False, False, True, False, False]
    assert "ID 0 is given to 2 images (/home/u/data/coco/x.jpg, /home" in found[0].verdict.detail
    assert "no captions under ID 2" in found[3].verdict.detail
    assert "no image has the ID 7" in found[4].verdict.detail
    lost = " ".join(entry.raw_json for entry in found)
    assert all(f'"{answer}"' in lost for answer in "ABD")  # the quarantine holds what was read


@pytest.mark.parametrize(
    ("image_map", "captions"),
    [
        ('{"a": 7}', "{}"),
        ('{"a": {"ID": 0}}', "{}"),
        ("{}", '{"0": 7}'),
        ('{"a": {"image_file": "a", "ID": 0}}', '{"0": {"q": 7, "a": ["A"]}}'),
        ('{"a": {"image_file": "a", "ID": 0}}', '{"0": {"q": "?", "a": []}}'),
        ('{"a": {"image_file": "a", "ID": 0}}', '{"0": ["A"]}'),
    ],
)
def test_what_is_wrong_in_the_pair_has_a_verdict(
    tmp_path: Path, image_map: str, captions: str
) -> None:
    (entry,) = pair(tmp_path, image_map, captions)
    assert entry.verdict.reason == Reason.SCHEMA


def test_the_pair_is_two_objects(tmp_path: Path) -> None:
    assert "has 1 files; format basic_vlm expects two" in refused(
        tmp_path, annotations="a.json", format="basic_vlm"
    )
    with pytest.raises(DataError, match=r"starts with '\['; expected a JSON object"):
        pair(tmp_path, "[]", "{}")
    with pytest.raises(DataError, match=r"no valid JSON after 1 records \(expected :"):
        pair(tmp_path, '{"a": 1, "b" 2}', "{}")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    items=st.dictionaries(st.text(max_size=3), st.none() | st.integers() | st.text(max_size=3)),
    window=st.integers(1, 9),
)
def test_an_object_is_read_as_json_reads_it(
    tmp_path: Path, items: dict[str, Any], window: int
) -> None:
    (tmp_path / "a.json").write_text(json.dumps(items, indent=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_scanner, "WINDOW", window)
        assert list(json_stream.read_items(tmp_path / "a.json")) == list(items.items())
