"""Text in a whole build: LLaVA's treatment, cuts, markers of a template, warnings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lapilli.data.building.driver import BuildReport, build
from lapilli.data.building.runners import run_here
from lapilli.data.config import BuildConfig, SourceConfig
from lapilli.data.errors import DataError
from lapilli.data.images.view import ImageSpec
from lapilli.data.planning.plan import plan_build
from lapilli.data.text.encode import IMAGE_TOKEN_INDEX
from tests.data.text_material import goldens
from tests.factories import CLIP_MEAN, image_bytes, make_tokenizer

VIEW = {"square": ImageSpec(8, CLIP_MEAN)}


def write_source(root: Path, elements: list[Any]) -> SourceConfig:
    """Write the elements, and a small picture for each image they name."""
    root.mkdir(exist_ok=True)
    (root / "text.json").write_text(json.dumps(elements))
    for element in elements:
        if "image" in element:
            path = root / element["image"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image_bytes("png", 8, 8))
    return SourceConfig("text", "text.json")


def make(tmp_path: Path, elements: list[Any], tokenizer: Path, **changes: Any) -> BuildReport:
    source = write_source(tmp_path / "root", elements)
    settings: dict[str, Any] = {
        "root": str(tmp_path / "root"),
        "output": str(tmp_path / "out"),
        "sources": [source],
        "tokenizer": str(tokenizer),
        "template": "v1",
        "views": VIEW,
        "max_quarantined": 1.0,
        **changes,
    }
    return build(plan_build(BuildConfig(**settings)), runner=run_here)


def token_rows(report: BuildReport, output: Path) -> dict[str, dict[str, Any]]:
    """The token rows of what is kept, by the file's own id."""
    tables = [
        pa.ipc.open_file(str(output / shard.path)).read_all().to_pylist()
        for shard in report.manifest.tokens
    ]
    with pa.ipc.open_file(str(output / "selection.arrow")) as file:
        kept = file.read_all().to_pylist()
    rows = [tables[row["token_shard"]][row["token_row"]] for row in kept]
    return {row["sample_id"].partition("/")[2]: row for row in rows}


def reasons(output: Path) -> dict[str, str]:
    table = pq.read_table(output / "quarantine.parquet").to_pylist()
    return {row["record_id"]: row["reason"] for row in table}


def labels(row: dict[str, Any]) -> list[int]:
    found = np.full(len(row["input_ids"]), -100)
    for start, end in np.reshape(row["label_spans"], (-1, 2)).astype(int):
        found[start:end] = row["input_ids"][start:end]
    return found.tolist()


def test_a_build_with_compat_holds_what_llava_trains_on(mistral: Any, tmp_path: Path) -> None:
    elements = [
        {key: element[key] for key in ("id", "conversations", "image") if key in element}
        for element in goldens("llava_text_mistral")
    ]
    report = make(tmp_path, elements, Path(mistral.name_or_path), compat="llava")
    rows = token_rows(report, tmp_path / "out")
    assert reasons(tmp_path / "out") == {
        "adv_two_human_in_a_row": "turn_order",
        "adv_image_in_two_turns": "image_marker_count",
    }
    masked = 0
    for element in goldens("llava_text_mistral"):
        if element["id"] not in rows:
            continue
        row, theirs = rows[element["id"]], element["golden"]["v1"]
        # LLaVA's collator cuts what its tokenizer's call left whole.
        assert row["input_ids"] == theirs["input_ids"][:2048], element["id"]
        assert labels(row) == theirs["labels"][:2048], element["id"]
        assert len(row["image_ids"]) == row["input_ids"].count(IMAGE_TOKEN_INDEX)
        masked += row["num_trained"] == 0
    assert masked == 6, "a sample that trains nothing is one of the sampler's"
    assert report.manifest.views["square"].codecs["resizer"] == "pillow"
    assert report.manifest.plan["compat"] == "llava"


def said(record_id: str, *values: str, **fields: Any) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(values)]
    return {"id": record_id, "conversations": turns, **fields}


def test_a_cut_leaves_images_whole_and_quarantines_what_trains_nothing(tmp_path: Path) -> None:
    long = "word " * 200
    elements = [
        said("short", "Why?", "So."),
        said("long answer", "Why?", long),
        said("long question", long, "So."),
        said("late image", "Why?", long, "<image>And?", "Yes.", image="a.png"),
        said("early image", "<image>Why?", long, image="a.png"),
    ]
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    report = make(tmp_path, elements, tokenizer, max_text_length=150, template="chatml_like.yaml")
    rows = token_rows(report, tmp_path / "out")
    assert set(rows) == {"short", "long answer", "early image"}
    assert reasons(tmp_path / "out") == dict.fromkeys(
        ("long question", "late image"), "no_trained_token"
    )
    assert len(rows["short"]["input_ids"]) < 150
    for key in ("long answer", "early image"):
        assert len(rows[key]["input_ids"]) == 150
        assert rows[key]["label_spans"][-1] == 150
    assert rows["early image"]["input_ids"].count(IMAGE_TOKEN_INDEX) == 1


@pytest.fixture(autouse=True)
def template_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("chatml_like.yaml").write_text("before_user: 'Q:'\nbefore_answer: 'A:'\n")


def test_a_templates_marker_is_an_images_place(tmp_path: Path) -> None:
    elements = [
        said("marked", "<|extra_0|>\nWhat is it?", "A kite.", image="a.png"),
        said("not marked", "What is it?", "A kite.", image="a.png"),
    ]
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    Path("marked.yaml").write_text("base: v1\nimage_marker: '<|extra_0|>'\n")
    report = make(tmp_path, elements, tokenizer, template="marked.yaml")
    rows = token_rows(report, tmp_path / "out")
    assert rows["marked"]["input_ids"].count(IMAGE_TOKEN_INDEX) == 1
    assert rows["marked"]["image_ids"] == ["a.png"]
    assert reasons(tmp_path / "out") == {"not marked": "image_marker_count"}


def test_a_record_that_a_chat_template_refuses_is_quarantined(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    Path("refusing.yaml").write_text(
        "chat: \"{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none') }}"
        '{% endif %}{{ m.content + eos_token }}{% endfor %}"'
    )
    ruled = said("ruled", "Why?", "So.")
    ruled["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    elements = [said("plain", "Why?", "So."), said("four", "Why?", "So.", "And?", "Yes."), ruled]
    report = make(tmp_path, elements, tokenizer, template="refusing.yaml", max_quarantined=1.0)
    assert list(token_rows(report, tmp_path / "out")) == ["plain", "four"]
    assert reasons(tmp_path / "out") == {"ruled": "template_refuses"}
    assert report.manifest.counts["reasons"] == {"template_refuses": 1}
    with pytest.raises(DataError, match=r"nothing is kept: .* the chat template refuses it: none"):
        make(tmp_path, [ruled], tokenizer, template="refusing.yaml", output="none")
    assert not Path("none").exists()


def test_what_is_wrong_with_a_template_is_said_before_the_work(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    with pytest.warns(UserWarning, match="template phi_hf_masked: its end marker"):
        make(tmp_path, [said("a", "Why?", "So.")], tokenizer, template="phi_hf_masked")
    for changes, message in (
        ({"template": "tokenizer"}, "brings no chat template"),
        ({"template": "chatml", "compat": "llava"}, "knows the templates"),
        ({"max_text_length": -1}, "max_text_length: -1; expected 0"),
    ):
        with pytest.raises(DataError, match=message):
            make(tmp_path, [said("a", "Why?", "So.")], tokenizer, output="none", **changes)
        assert not Path("none").exists()
