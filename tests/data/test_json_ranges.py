"""Reading JSON files by byte ranges: the elements, and the plan, of reading them whole."""

from __future__ import annotations

import hashlib
import itertools
import json
import marshal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.data.config import BuildConfig, SourceConfig
from lapilli.data.errors import DataError
from lapilli.data.planning.build_plan import BuildPlan
from lapilli.data.planning.parts.read_sources import Reading
from lapilli.data.planning.parts.run_scans import scan_here
from lapilli.data.planning.parts.scan_part import Part, ScanSettings
from lapilli.data.planning.plan import plan_build
from lapilli.data.record import Reason, pack
from lapilli.data.sources.reading.bounds import BOUNDS
from lapilli.data.sources.reading.json_ranges import BadCut, JsonRange, cut_file, read_range
from lapilli.data.sources.validation import read_entries
from tests.factories import build_config, conversation, make_mixture, make_tokenizer

# What looks like a border between elements and is none, and what borders may be hidden in.
TEXTS = st.one_of(
    st.sampled_from(['"},{"id": 1', "}, {", '\\"}, {\\"id\\":', "]}", "\\", "\n", "é\u2028", "🌋"]),
    st.text(max_size=6),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
ELEMENTS = st.lists(
    st.dictionaries(TEXTS, VALUES, max_size=3).map(lambda rest: {"id": 0} | rest)
    | st.dictionaries(TEXTS, VALUES, max_size=2)
    | VALUES.filter(lambda value: not isinstance(value, float)),
    max_size=9,
)


def ranged(path: Path, range_bytes: int) -> list[Any] | None:
    """The elements of a file by its ranges; None for one that is to be streamed."""
    ranges = cut_file(path, range_bytes)
    if ranges is None:
        return None
    assert all(a.end == b.start for a, b in itertools.pairwise(ranges))
    return [element for part in ranges for element in read_range(part.load(), part, BOUNDS)]


@settings(max_examples=60, deadline=None)
@given(
    elements=ELEMENTS,
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    bom=st.booleans(),
    space=st.sampled_from(["", "\n", " \r\n\t"]),
    range_bytes=st.integers(1, 120),
)
def test_an_arrays_ranges_are_its_elements(
    tmp_path_factory: pytest.TempPathFactory, elements: list[Any], indent: int | None,
    ascii_only: bool, bom: bool, space: str, range_bytes: int,
) -> None:  # fmt: skip
    text = space + json.dumps(elements, indent=indent, ensure_ascii=ascii_only) + space
    path = tmp_path_factory.getbasetemp() / "array.json"
    path.write_bytes(b"\xef\xbb\xbf" * bom + text.encode("utf-8", "surrogatepass"))
    try:
        found = ranged(path, range_bytes)
    except BadCut:  # an element holds another that looks like one; the file is then streamed
        assert '{"id"' in "".join(text.split())[2:]
        return
    assert found is None or found == elements
    if elements and isinstance(elements[0], dict) and "id" in elements[0]:
        assert found is not None


@settings(max_examples=30, deadline=None)
@given(
    elements=st.lists(st.dictionaries(TEXTS, VALUES, max_size=3), min_size=1, max_size=9),
    end=st.sampled_from(["\n", "\r\n", "\n\n"]),
    closed=st.booleans(),
    range_bytes=st.integers(1, 120),
)
def test_the_ranges_of_lines_are_their_elements(
    tmp_path_factory: pytest.TempPathFactory, elements: list[Any], end: str, closed: bool,
    range_bytes: int,
) -> None:  # fmt: skip
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_text(end.join(map(json.dumps, elements)) + end * closed, encoding="utf-8")
    assert ranged(path, range_bytes) in (elements, None)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "[1, 2]", '[{"id": 1}', '[{"id": 1}] more', '[{"id": 1},]', '[{"id" 1}]'],
)
def test_what_is_not_whole_has_no_ranges(tmp_path: Path, text: str) -> None:
    (path := tmp_path / "a.json").write_text(text, encoding="utf-8")
    try:
        assert ranged(path, 4) is None
    except BadCut:
        with pytest.raises(json.JSONDecodeError):
            json.loads(text)


def entangled(root: Path) -> list[Any]:
    """Records whose ids, images and fields depend on those before them."""
    found: list[Any] = json.loads((root / "mixture.json").read_text(encoding="utf-8"))
    good = [one for one in found if isinstance(one, dict) and one.get("image")][:6]
    for number in range(40):
        record = conversation(f"r{number % 7}", turns=1 + number % 3, seed=number)
        record[f"field{number % 5}"] = "said"
        match number % 8:
            case 0:
                del record["id"]
            case 1:
                record["id"] = f"r{number % 7}#2"
            case 2:
                record = good[number % len(good)] | {"id": f"r{number}"}
            case 3:
                record["image"] = f"images/none{number}.png"
                record["conversations"][0]["value"] = "<image>\nWhat?"
            case 4:
                key = str(good[number % len(good)]["image"])
                record["image"] = key.upper() if number % 3 else f"/{key}"
                record["conversations"][0]["value"] = "<image>\nWhat?"
            case 5:
                record["conversations"][-1]["value"] = " "
            case _:
                pass
        found.append(record)
    return found


def described(plan: BuildPlan) -> tuple[Any, ...]:
    """All that a plan says, but for where its records lie."""
    return (
        plan.digests,
        list(plan.entries),
        [*map(plan.entries.images, range(len(plan.entries)))],
        list(plan.slots),
        plan.repairs,
        plan.repaired.to_pylist(),
        {name: (tally.fields, tally.members) for name, tally in plan.tallies.items()},
        [task.name for task in plan.tasks()],
        [[*task.packed] for task in plan.token_tasks()],
        [[*task.image_ids] for task in plan.token_tasks()],
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> BuildConfig:
    """Two sources of the same records, an array and lines."""
    folder = tmp_path_factory.mktemp("ranges")
    mixture = make_mixture(folder / "mix", defects=True)
    records = entangled(mixture.root)
    (mixture.root / "mixture.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    lines = "".join(f"{json.dumps(record)}\n" for record in records)
    (mixture.root / "lines.jsonl").write_text(lines, encoding="utf-8")
    tokenizer = make_tokenizer(folder / "tokenizer")
    first = mixture.sources[0]
    sources = [first, replace(first, name="lines", annotations="lines.jsonl")]
    return build_config(replace(mixture, sources=sources), folder / "out", tokenizer)


def whole(config: BuildConfig) -> BuildPlan:
    return plan_build(config, reading=Reading(1 << 40))


@pytest.mark.parametrize("range_bytes", [150, 2000, 20_000])
def test_a_plan_does_not_depend_on_the_ranges(config: BuildConfig, range_bytes: int) -> None:
    scanned: list[int] = []

    def scanner(ranges: Sequence[JsonRange], settings: ScanSettings) -> Iterator[Part]:
        scanned.append(len(ranges))
        return scan_here(ranges, settings)

    excluded = replace(config, exclude=["lines/r1#2", f"{config.sources[0].name}/r2"])
    for one in (config, excluded):
        found = plan_build(one, reading=Reading(range_bytes, scanner))
        assert described(found) == described(whole(one))
    assert len(scanned) == 4
    assert min(scanned) > 1


def test_entries_are_those_of_reading_one_after_the_other(config: BuildConfig) -> None:
    plan = plan_build(config, reading=Reading(333, scan_here))
    entries = iter(plan.entries)
    for source in config.sources:
        for expected in read_entries(source, Path(config.root)):
            found = next(entries)
            assert (found.sample_id, found.record_id) == (expected.sample_id, expected.record_id)
            assert found.digest == expected.pack().digest
            assert expected.verdict.kept or found.verdict == expected.verdict
            assert found.verdict.kept or found.raw_json in (None, expected.pack().raw_json,
                                                            expected.raw_json)  # fmt: skip
            assert not found.verdict.kept or found.record == expected.record
    assert next(entries, None) is None
    assert plan.repairs
    assert plan.entries.copies
    reasons = {verdict.reason for verdict in plan.entries.verdicts.values()}
    assert {Reason.IMAGE_MISSING, Reason.EMPTY_ANSWER} <= reasons


def test_stamps_tell_a_record_with_its_images(config: BuildConfig) -> None:
    """As they were written into datasets: of marshal's oldest format, 8 bytes of BLAKE2."""
    plan = plan_build(config, reading=Reading(333, scan_here))
    for group in plan.token_groups:
        for (name, stamp), place in zip(group.rows, group.kept, strict=True):
            assert place is not None
            entry = plan.entries[int(plan.entries.kept[place])]
            images = plan.entries.images(int(plan.entries.kept[place]))
            assert entry.record is not None
            assert entry.sample_id == name
            value = marshal.loads(pack(entry.record)), images
            hashed = hashlib.blake2b(marshal.dumps(value, 0), digest_size=8)
            assert stamp == hashed.digest()


def test_ray_scans_as_this_process_does(config: BuildConfig, ray_local: None) -> None:
    del ray_local
    assert described(plan_build(config, reading=Reading(999))) == described(whole(config))


@pytest.mark.parametrize("cut", [1, 5, 400])
def test_a_damaged_file_is_told_of_as_when_it_is_streamed(config: BuildConfig, cut: int) -> None:
    path = Path(config.root) / "damaged.json"
    path.write_text((path.parent / "mixture.json").read_text()[:-cut], encoding="utf-8")
    damaged = replace(config, sources=[SourceConfig("damaged", path.name)])
    with pytest.raises(DataError) as streamed:
        whole(damaged)
    with pytest.raises(DataError, match="no valid JSON after") as by_ranges:
        plan_build(damaged, reading=Reading(2000, scan_here))
    assert str(by_ranges.value) == str(streamed.value)


def test_elements_in_elements_are_read_whole(config: BuildConfig) -> None:
    """They look like elements, so that every cut is wrong, and the file is streamed."""
    nested = [conversation(f"n{n}") | {"meta": [{"id": m} for m in range(9)]} for n in range(30)]
    path = Path(config.root) / "nested.json"
    path.write_text(json.dumps(nested), encoding="utf-8")
    own = replace(config, sources=[SourceConfig("nested", path.name)])
    assert described(plan_build(own, reading=Reading(300, scan_here))) == described(whole(own))
