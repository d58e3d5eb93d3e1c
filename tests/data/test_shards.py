"""Shards: whole or absent, the same bytes for the same rows, damage noticed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lapilli.data.errors import DataError
from lapilli.data.io.atomic import ShardFacts, sha256_file, write_atomic, write_json
from lapilli.data.shards.files import begin_shard, finished_facts, open_table, write_shard
from lapilli.data.shards.schemas import IMAGE_SCHEMA, TOKEN_SCHEMA

ROWS: dict[str, list[Any]] = {
    "image_id": ["a.png", "b.png"],
    "status": ["ok", "image_undecodable"],
    "detail": ["", "truncated"],
    "source_width": [4, None],
    "source_height": [3, None],
    "encoding": ["raw", "raw"],
    "pixels": [bytes(range(48)), None],
}
NAME = "images/view/00000.arrow"


def test_a_shard_that_was_begun_has_no_name_until_it_is_finished(tmp_path: Path) -> None:
    finish = begin_shard(tmp_path, NAME, ROWS, IMAGE_SCHEMA)
    begun = [path.name for path in (tmp_path / NAME).parent.iterdir()]
    assert len(begun) == 1
    assert begun[0].endswith(".tmp")
    assert finished_facts(tmp_path, NAME) is None
    facts = finish()
    assert (
        finished_facts(tmp_path, NAME) == facts == write_shard(tmp_path, NAME, ROWS, IMAGE_SCHEMA)
    )
    assert not list((tmp_path / NAME).parent.glob(".*"))


def test_a_shard_is_an_arrow_file_that_others_read(tmp_path: Path) -> None:
    facts = write_shard(tmp_path, NAME, ROWS, IMAGE_SCHEMA)
    with pa.ipc.open_file(str(tmp_path / NAME)) as reader:
        assert reader.num_record_batches == 1  # so that a row is reached by its number
        assert reader.read_all().to_pydict() == ROWS
    data = (tmp_path / NAME).read_bytes()
    assert facts == ShardFacts(NAME, 2, len(data), hashlib.sha256(data).hexdigest())


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    first = write_shard(tmp_path / "one", NAME, ROWS, IMAGE_SCHEMA)
    assert write_shard(tmp_path / "two", NAME, ROWS, IMAGE_SCHEMA) == first


def test_a_shard_is_read_from_the_memory_map(tmp_path: Path) -> None:
    rows = {**ROWS, "pixels": [bytes(1_000_000), bytes(1_000_000)]}
    facts = write_shard(tmp_path, NAME, rows, IMAGE_SCHEMA)
    before = pa.total_allocated_bytes()
    table = open_table(tmp_path, facts, IMAGE_SCHEMA)
    view = table["pixels"][1].as_buffer()
    assert view.size == 1_000_000
    assert pa.total_allocated_bytes() - before < 100_000


def test_only_a_finished_shard_has_facts(tmp_path: Path) -> None:
    assert finished_facts(tmp_path, NAME) is None
    facts = write_shard(tmp_path, NAME, ROWS, IMAGE_SCHEMA)
    assert finished_facts(tmp_path, NAME) == facts
    (tmp_path / f"{NAME}.json").unlink()
    assert finished_facts(tmp_path, NAME) is None


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cuts=st.booleans())
def test_any_damage_is_noticed(tmp_path: Path, place: float, bit: int, cuts: bool) -> None:
    write_shard(tmp_path, NAME, ROWS, IMAGE_SCHEMA)
    path = tmp_path / NAME
    data = bytearray(path.read_bytes())
    at = int(place * len(data))
    data[at] ^= 1 << bit
    path.write_bytes(data[:at] if cuts else data)
    assert finished_facts(tmp_path, NAME) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"path": 1}', '{"other": 2}'])
def test_damaged_facts_are_no_facts(tmp_path: Path, content: str) -> None:
    write_shard(tmp_path, NAME, ROWS, IMAGE_SCHEMA)
    (tmp_path / f"{NAME}.json").write_text(content)
    assert finished_facts(tmp_path, NAME) is None


def test_facts_of_another_shard_are_no_facts(tmp_path: Path) -> None:
    write_shard(tmp_path, NAME, ROWS, IMAGE_SCHEMA)
    other = "images/view/00001.arrow"
    for ending in ("", ".json"):
        (tmp_path / f"{other}{ending}").write_bytes((tmp_path / f"{NAME}{ending}").read_bytes())
    assert finished_facts(tmp_path, other) is None


def test_opening_names_the_file_and_the_remedy(tmp_path: Path) -> None:
    facts = write_shard(tmp_path, NAME, ROWS, IMAGE_SCHEMA)
    path = tmp_path / NAME
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(DataError, match=rf"{len(data) - 1} bytes, the manifest says {len(data)}"):
        open_table(tmp_path, facts, IMAGE_SCHEMA)
    path.write_bytes(bytes(len(data)))
    with pytest.raises(DataError, match=r"00000.arrow: damaged .*; run preprocess again"):
        open_table(tmp_path, facts, IMAGE_SCHEMA)
    path.unlink()
    with pytest.raises(DataError, match=r"00000.arrow: missing; run preprocess again"):
        open_table(tmp_path, facts, IMAGE_SCHEMA)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def half(temporary: Path) -> None:
        temporary.write_text("ha")
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"file: cannot be written .*No space left.*; free space"):
        write_atomic(path, half)
    assert path.read_text() == "before"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_a_bug_leaves_nothing_half_written(tmp_path: Path) -> None:
    rows: dict[str, list[Any]] = {field.name: [] for field in TOKEN_SCHEMA} | {"sample_id": ["a"]}
    with pytest.raises(ValueError, match="same length"):
        write_shard(tmp_path, "tokens/x.arrow", rows, TOKEN_SCHEMA)
    assert not list(tmp_path.rglob("*"))


def test_json_is_written_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "deep" / "a.json", {"a": ["é"]})
    assert (tmp_path / "deep" / "a.json").read_text() == '{\n "a": [\n  "\\u00e9"\n ]\n}'


def test_checksums_are_those_of_hashlib(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"x" * 3_000_000).hexdigest()
