"""Whatever a file holds: kept + quarantined = read, in every format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.source_files import entries, pair, write_lines, write_tar

turns = st.lists(
    st.fixed_dictionaries(
        {
            "from": st.sampled_from(["human", "gpt", "system", "narrator"]),
            "value": st.text(max_size=6) | st.sampled_from(["<image>", "Why? <image>", " ", "\0"]),
        }
    ),
    max_size=4,
)
well_formed = st.builds(
    lambda count: [
        {"from": who, "value": what}
        for _ in range(count)
        for who, what in (("human", "Why?"), ("gpt", "So."))
    ],
    st.integers(1, 3),
)
drawn = st.fixed_dictionaries(
    {"id": st.text(max_size=3), "conversations": turns | well_formed},
    optional={"image": st.lists(st.sampled_from(["a.jpg", "b/c.png"]), max_size=2)},
)


def as_messages(element: dict[str, Any]) -> dict[str, Any]:
    """The same with OpenAI's names; a role that nobody knows stays one."""
    return {
        **{name: element[name] for name in ("id", "image") if name in element},
        "messages": [
            {"role": turn["from"], "content": turn["value"]} for turn in element["conversations"]
        ],
    }


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(elements=st.lists(drawn, min_size=1, max_size=6))
def test_every_format_keeps_or_quarantines_each_conversation(
    tmp_path: Path, elements: list[dict[str, Any]]
) -> None:
    """kept + quarantined = read, and a conversation has one verdict whatever it is written in."""
    (tmp_path / "llava.json").write_text(json.dumps(elements))
    write_lines(tmp_path / "messages.jsonl", [as_messages(element) for element in elements])
    spelt = [{**e, "conversations": json.dumps(e["conversations"])} for e in elements]
    rows = [{"image": None, **element} for element in spelt]
    types = {"id": pa.string(), "image": pa.list_(pa.string()), "conversations": pa.string()}
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(types)), tmp_path / "rows.parquet")
    write_tar(
        tmp_path / "0.tar",
        [
            {
                "__key__": f"{place}",
                "json": json.dumps(element).encode(),
                **{f"{n}.jpg": b"" for n in range(len(element.get("image", [])))},
            }
            for place, element in enumerate(elements)
        ],
    )
    reference = entries(tmp_path, annotations="llava.json")
    expected = [entry.verdict.reason for entry in reference]
    assert len(expected) == len(elements)
    for name, form in (
        ("messages.jsonl", "messages"),
        ("rows.parquet", "parquet"),
        ("0.tar", "webdataset"),
    ):
        found = entries(tmp_path, annotations=name, format=form)
        assert len({entry.sample_id for entry in found}) == len(elements)
        assert [entry.verdict.reason for entry in found] == expected
        for entry, other in zip(found, reference, strict=True):
            assert entry.verdict.kept == (entry.verdict.reason is None)
            assert entry.verdict.kept or (entry.verdict.detail and json.loads(entry.raw_json))
            if entry.record is not None and other.record is not None:
                assert entry.record.turns == other.record.turns
                assert len(entry.record.images) == len(other.record.images)


anything = st.recursive(
    st.none() | st.integers() | st.text(max_size=4) | st.sampled_from(["a.jpg", "\ud800", "data:"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["id", "image", "images", "conversations", "messages", "role", "content", "from",
             "value", "type", "text", "image_url", "url", "image_id", "caption", "q", "a", "ID"]
        ),
        inner,
        max_size=4,
    ),
    max_leaves=15,
)  # fmt: skip


@pytest.mark.parametrize("form", ["llava", "messages", "ai_challenger", "webdataset"])
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(elements=st.lists(anything, max_size=5))
def test_no_element_is_lost_whatever_it_is(tmp_path: Path, form: str, elements: list[Any]) -> None:
    name = "0.tar" if form == "webdataset" else "a.json"
    if form == "webdataset":
        write_tar(
            tmp_path / name,
            [{"__key__": f"{n}", "json": json.dumps(e).encode()} for n, e in enumerate(elements)],
        )
    else:
        (tmp_path / name).write_text(json.dumps(elements))
    found = entries(tmp_path, annotations=name, format=form)
    captions = sum(_captions(element) for element in elements)
    assert len(found) == (captions if form == "ai_challenger" else len(elements))
    for entry in found:
        assert entry.verdict.kept != bool(entry.verdict.reason)
        assert entry.sample_id.encode()
        assert entry.verdict.detail.isprintable()
        assert json.loads(entry.raw_json) is not NotImplemented


def _captions(element: Any) -> int:
    """How many records AI Challenger's format makes of an element: one a caption, at least one."""
    if not isinstance(element, dict) or not isinstance(element.get("image_id"), str):
        return 1
    captions = element.get("caption")
    return max(1, len(captions)) if isinstance(captions, list) else 1


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    image_map=st.dictionaries(
        st.text(max_size=2),
        st.fixed_dictionaries(
            {"image_file": st.sampled_from(["a", "b", "\ud800\n"]), "ID": st.integers(0, 3)}
        )
        | anything,
        max_size=5,
    ),
    captions=st.dictionaries(
        st.sampled_from(["0", "1", "2", "3", "None"]),
        st.fixed_dictionaries({"q": st.text(max_size=3), "a": st.lists(st.text(), max_size=3)})
        | anything,
        max_size=4,
    ),
)
def test_no_answer_of_the_pair_is_lost(
    tmp_path: Path, image_map: dict[str, Any], captions: dict[str, Any]
) -> None:
    found = pair(tmp_path, json.dumps(image_map), json.dumps(captions))
    assert len(found) >= len(image_map)
    assert all(entry.verdict.detail.isprintable() for entry in found)
    raw = " ".join(entry.raw_json for entry in found)
    for entry in captions.values():
        answers = entry.get("a") if isinstance(entry, dict) else None
        for answer in answers if isinstance(answers, list) else []:
            if isinstance(answer, str):
                assert json.dumps(answer) in raw
