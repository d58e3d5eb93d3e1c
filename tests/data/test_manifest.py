"""manifest.json: written and read alike; what is none says so in one line."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapilli.data.errors import DataError
from lapilli.data.io.atomic import ShardFacts
from lapilli.data.shards.manifest import (
    FORMAT,
    Manifest,
    ViewFacts,
    digest,
    read_manifest,
    write_manifest,
)

SHARD = ShardFacts("tokens/0.arrow", 3, 100, "ab" * 32)
SPEC = {"size": 8, "fill": [0, 0, 0], "aspect": "pad", "mode": "exact"}
CODECS = {"decoder": "pillow 12", "resizer": "pillow", "resizer_version": "12"}
MANIFEST = Manifest(
    format=FORMAT,
    fingerprint="f" * 64,
    plan={"format": "1"},
    tokenizer={
        "name": "é",
        "fingerprint": "f" * 64,
        "vocab_size": 8,
        "bos_id": 1,
        "eos_id": None,
        "pad_id": None,
    },
    template="v1",
    image_token=-200,
    counts={
        "read": 3,
        "kept": 3,
        "quarantined": 0,
        "images": 2,
        "reasons": {},
        "sources": {"s": 3},
        "repairs": {},
        "fields": {"s": {"\ud800": 1}},
    },
    mixture={"unit": "records", "records": 3, "tokens": 9, "held_out": 0, "sources": {}},
    tokens=[SHARD],
    views={"pad": ViewFacts(SPEC, CODECS, 2, [SHARD, SHARD])},
    selection=replace(SHARD, path="selection.arrow"),
    versions={"pyarrow": "26"},
)


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_manifest(tmp_path, MANIFEST)
    assert read_manifest(tmp_path) == MANIFEST
    assert json.loads((tmp_path / "manifest.json").read_text()) == asdict(MANIFEST)


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in asdict(MANIFEST).items() if key != name}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no manifest .*; run the same preprocess again"),
        ('{"format": 1', "no manifest"),
        ("[]", "no manifest"),
        ("{}", "no manifest"),
        (json.dumps({**asdict(MANIFEST), "format": 99}), f"format 99, this version reads {FORMAT}"),
        (json.dumps(without("views")), "no manifest"),
        (json.dumps(without("counts")), "no manifest"),
        (json.dumps({**asdict(MANIFEST), "tokens": [{"path": "x"}]}), "no manifest"),
        (json.dumps({**asdict(MANIFEST), "views": {"pad": {}}}), "no manifest"),
    ],
)
def test_what_is_no_manifest_says_so(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=rf"manifest.json: {message}") as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_manifest_without_views_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path, replace(MANIFEST, views={}))
    with pytest.raises(DataError, match="views: empty; expected one at least"):
        read_manifest(tmp_path)


def test_a_folder_without_one_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no dataset; give the --output of a preprocess"):
        read_manifest(tmp_path)
    with pytest.raises(DataError, match="no dataset"):
        read_manifest(tmp_path / "nowhere")
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(DataError, match="an unfinished build: run the same preprocess again"):
        read_manifest(tmp_path)


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(DataError, match=r"data/manifest.json: Not a directory; check the path"):
        read_manifest(tmp_path / "data")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(one=values, other=values)
def test_digests_are_equal_just_where_the_json_is(one: Any, other: Any) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (digest(one) == digest(other)) == same


def test_a_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})
