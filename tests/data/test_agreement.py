"""`check` and a build give each record of every format the same verdict, and count the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from lapilli.data.config import SourceConfig
from lapilli.data.planning.scan import survey
from lapilli.data.record import Entry
from lapilli.data.sources.tally import tally_facts
from tests.data.source_files import JPEG, message, write_lines, write_parquet, write_tar
from tests.factories import Mixture, build_config, build_dataset, conversation, make_tokenizer

PAIR = {"user": "What is it?", "assistant": "A goat."}
SAID = conversation("a", "x")["conversations"]


def elements(name: str, image: str) -> list[dict[str, Any]]:
    """Records of a form: good ones, and one of each kind of fault."""
    forms: dict[str, dict[str, Any]] = {
        "llava": {"conversations": SAID},
        "messages": message("<image>What?", "A goat."),
        "texts": {"texts": [PAIR]},
    }
    form = forms[name]
    return [
        {"id": "good", **form, "image": image},
        {"id": "mood", **form, "image": image, "mood": 1},
        {"id": "video", **form, "image": image, "video": "a.mp4"},
        {"id": "missing", **form, "image": "nowhere.jpg"},
        {"id": "schema", **dict.fromkeys(form)},
        {"id": "empty", **form, "image": "empty.jpg"},
    ]


def write(root: Path, form: str) -> SourceConfig:
    """A source of a format."""
    (root / "a.jpg").write_bytes(JPEG)
    (root / "empty.jpg").write_bytes(b"")
    if form in ("llava", "messages", "texts"):
        write_lines(root / "a.jsonl", elements(form, "a.jpg"))
        return SourceConfig("s", "a.jsonl", format=form)
    if form == "ai_challenger":
        rows = [
            {"image_id": "a.jpg", "caption": ["A goat.", " "], "mood": 1},
            {"image_id": 1},
            {"image_id": "nowhere.jpg", "caption": ["A."]},
        ]
        write_lines(root / "a.jsonl", rows)
        return SourceConfig("s", "a.jsonl", format=form)
    if form == "basic_vlm":
        images = {n: {"image_file": f"{n}.jpg", "ID": n, "mood": 1} for n in ("a", "nowhere", "b")}
        (root / "images.json").write_text(json.dumps(images))
        (root / "captions.json").write_text(
            json.dumps({n: {"q": "What?", "a": ["A goat."]} for n in ("a", "nowhere", "c")})
        )
        return SourceConfig("s", ["images.json", "captions.json"], format=form)
    if form == "parquet":
        rows = [
            {"mood": None, "video": None, **element, "image": {"bytes": data, "path": "a.jpg"}}
            for element, data in zip(elements("llava", ""), (JPEG, None, None), strict=False)
        ]
        write_parquet(root / "a.parquet", rows)
        return SourceConfig("s", "a.parquet", format=form)
    caption = {"jpg": JPEG, "txt": b"A goat."}
    samples: dict[str, dict[str, bytes]] = {
        "good": caption,
        "x.good": caption,
        "mask": {**caption, "seg.png": JPEG},
        "clear": {"png": JPEG, **caption},
        "empty": {**caption, "jpg": b""},
        "npy": {"npy": b"x"},
        "tools": {"json": json.dumps({**conversation("t"), "tools": [1]}).encode()},
    }
    if form == "webdataset of nothing":
        samples = {"npy": {"npy": b"x"}, "txt": {"txt": b"A goat."}}
    write_tar(root / "a.tar", [{"__key__": key, **members} for key, members in samples.items()])
    return SourceConfig("s", "a.tar", format="webdataset")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
    "form",
    ["llava", "messages", "texts", "ai_challenger", "basic_vlm", "parquet", "webdataset"],
)
def test_every_format_has_the_same_counts_and_verdicts(
    tmp_path: Path, tokenizer: Path, form: str
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    mixture = Mixture(root, [write(root, form)], {}, [])
    bad: list[Entry] = []
    config = build_config(mixture, tmp_path / "out", tokenizer)
    found = survey(config, on_bad=bad.append)
    counts = build_dataset(mixture, tmp_path / "out", tokenizer).manifest.counts
    rows: list[dict[str, str]] = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    ours = {e.sample_id: (str(e.verdict.reason), e.verdict.detail.partition(":")[0]) for e in bad}
    theirs = {r["sample_id"]: (r["reason"], r["detail"].partition(":")[0]) for r in rows}
    assert ours == theirs
    assert 0 < len(ours) < counts["read"]
    assert found.read["s"] == counts["read"] == counts["kept"] + counts["quarantined"]
    facts = tally_facts(found.tallies)
    assert facts == {name: counts[name] for name in ("fields", "members")}
    assert (facts["members"] if form == "webdataset" else facts["fields"]) != {}


def test_a_tar_without_a_usable_sample_is_all_quarantined(tmp_path: Path) -> None:
    """Its samples are records that are bad, and not records that nobody sees."""
    root = tmp_path / "root"
    root.mkdir()
    mixture = Mixture(root, [write(root, "webdataset of nothing")], {}, [])
    found = survey(build_config(mixture, tmp_path / "out", tmp_path))
    assert (found.read["s"], found.bad.total()) == (2, 2)
    members = found.tallies["s"].members
    assert members is not None
    assert (members.total, members.used) == (2, {"txt": 1})
