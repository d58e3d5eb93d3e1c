"""Data as people publish it, through the commands: messages with media, tables, tars."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from lapilli.data.building.runners import run_here
from lapilli.data.dataset.dataset import open_dataset
from lapilli.data.images.view import ImageSpec, prepare
from pipelines import check, preprocess
from pipelines.cli.progress import build_line
from tests.data.source_files import write_parquet, write_tar
from tests.factories import CLIP_MEAN, conversation, image_bytes, make_tokenizer

RED, BLUE = image_bytes("png", 20, 12, seed=1), image_bytes("jpeg", 9, 31, seed=2)
VIEW = ImageSpec(16, CLIP_MEAN)


@dataclass(frozen=True)
class Outcome:
    """What both commands found of one source, and what they said.

    Attributes:
        counts: The manifest's.
        reasons: Reason by record id in `check`, and the same in `preprocess`.
        said: The words of `check`, and those of `preprocess`.
        output: The dataset.
    """

    counts: dict[str, Any]
    reasons: tuple[dict[str, str], dict[str, str]]
    said: tuple[str, str]
    output: Path

    def pixels(self) -> list[np.ndarray[Any, Any]]:
        """The pixels of the kept records with an image, in their order."""
        dataset = open_dataset(self.output, view="v", image_tokens=1)
        samples = [dataset.sample(place) for place in range(len(dataset))]
        return [image for sample in samples for image in sample.pixels]


Both = Callable[..., Outcome]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def both(
    tmp_path: Path,
    tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Both:
    """Runs `check` and `preprocess` on one source below `tmp_path`."""
    monkeypatch.setattr(preprocess, "build_line", lambda runner: build_line(run_here))

    def run(*, decode: bool = False, **source: Any) -> Outcome:
        recipe = {
            "sources": [{"name": "s", **source}],
            "template": "v1",
            "views": {"v": {"size": VIEW.size, "fill": list(VIEW.fill)}},
            "max_quarantined": 1.0,
        }
        path, output = tmp_path / "recipe.yaml", tmp_path / "out"
        path.write_text(yaml.safe_dump(recipe))
        flags = [f"--config={path}", f"--root={tmp_path}"]
        more = ["--decode", "--num_workers=1"] if decode else []
        code = check.main([*flags, *more, f"--output={tmp_path / 'bad.pq'}"])
        checked = _said(capsys)
        assert preprocess.main([*flags, f"--output={output}", f"--tokenizer={tokenizer}"]) == 0
        found = [_reasons(tmp_path / "bad.pq"), _reasons(output / "quarantine.parquet")]
        counts = json.loads((output / "manifest.json").read_text())["counts"]
        assert code == (1 if found[0] else 0)
        assert counts["read"] == counts["kept"] + counts["quarantined"]
        return Outcome(counts, (found[0], found[1]), (checked, _said(capsys)), output)

    return run


def _said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def _reasons(path: Path) -> dict[str, str]:
    return {row["record_id"]: row["reason"] for row in pq.read_table(path).to_pylist()}


def same(some: list[np.ndarray[Any, Any]], images: list[bytes]) -> bool:
    """Whether pixels are those that the images have."""
    expected = [prepare(data, VIEW) for data in images]
    return len(some) == len(expected) and all(map(np.array_equal, some, expected))


def test_llama_factorys_sharegpt_messages_with_images(tmp_path: Path, both: Both) -> None:
    """Its `mllm_demo.json`: `<image>` in the text, `images` beside the messages; and its others."""
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "blue.jpg").write_bytes(BLUE)

    def said(question: str, **fields: Any) -> dict[str, Any]:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "A goat."}]
        return {"messages": turns, **fields}

    records = [
        said("<image>Who are they?", id="one", images=["red.png"]),
        said("<image><image>Which?", id="two", images=["red.png", "blue.jpg"]),
        said("Hi", id="system", system="You are brief."),
        said("Hi", id="empty", system="", tools="[]", videos=[], audios=[], mood="calm"),
        said("<video>Why is it funny?", id="video", videos=["1.mp4"]),
        said("<audio>What is said?", id="audio", audios=["1.wav"]),
        said("How warm is it?", id="tools", tools='[{"name": "weather"}]'),
        {"id": "kto", **said("Hi"), "label": False},
        {"id": "dpo", **said("Hi"), "rejected": {"role": "assistant", "content": "No."}},
    ]
    (tmp_path / "mllm_demo.json").write_text(json.dumps(records))
    found = both(annotations="mllm_demo.json", format="messages")
    expected = dict.fromkeys(["video", "audio", "tools", "kto", "dpo"], "unsupported_field")
    assert found.reasons == (expected, expected)
    assert (found.counts["kept"], found.counts["fields"]) == (4, {"s": {"mood": 1}})
    assert same(found.pixels(), [RED, RED, BLUE])
    for said_by in found.said:
        assert "fields not read, by records: mood 1" in said_by


TEXTS = {"user": "What colour is the goat?", "assistant": "The goat is red."}


@pytest.mark.parametrize("group", [1, 2, 100])
def test_fine_vision(tmp_path: Path, both: Both, group: int) -> None:
    """HuggingFaceM4/FineVision: `images` of bytes, `texts` of pairs, ratings beside them."""
    rows = [
        {"images": [{"bytes": RED, "path": None}], "texts": [TEXTS, TEXTS]},
        {
            "images": [{"bytes": BLUE, "path": "1.jpg"}, {"bytes": RED, "path": None}],
            "texts": [TEXTS],
        },
        {"images": [], "texts": [TEXTS]},
        {"images": [{"bytes": b"no image", "path": None}], "texts": [TEXTS]},
    ]
    ratings = {"source": "a", "relevance_ratings": [5], "relevance_min": 5, "formatting_min": 4}
    write_parquet(
        tmp_path / "0.parquet", [{**row, **ratings} for row in rows], row_group_size=group
    )
    decode = group == 2  # processes of their own take seconds
    found = both(annotations="*.parquet", format="parquet", decode=decode)
    expected = {"@3": "image_undecodable"}
    assert found.reasons == (expected if decode else {}, expected)
    assert (found.counts["kept"], found.counts["images"], found.counts["fields"]) == (3, 4, {})
    assert same(found.pixels(), [RED, BLUE, RED])


def test_the_cauldron(tmp_path: Path, both: Both) -> None:
    """HuggingFaceM4/the_cauldron: the same with a `source` in each pair."""
    rows = [
        {"images": [{"bytes": data, "path": None}], "texts": [{**TEXTS, "source": "VQAv2"}]}
        for data in (RED, BLUE, RED)
    ]
    write_parquet(tmp_path / "train-00000-of-00001.parquet", rows, row_group_size=2)
    found = both(annotations="*.parquet", format="parquet")
    assert found.reasons == ({}, {})
    assert found.counts["fields"] == {}
    assert same(found.pixels(), [RED, BLUE, RED])


def test_llava_onevision(tmp_path: Path, both: Both) -> None:
    """lmms-lab/LLaVA-OneVision-Data: one image struct, null for text, conversations as lists."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [
        {**conversation("a", 1), "image": {"bytes": RED, "path": "a.png"}, "data_source": "x"},
        {**conversation("b"), "image": None, "data_source": "y"},
        {**conversation("c"), "image": {"bytes": BLUE, "path": "c.png"}, "data_source": "y"},
    ]
    turns = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("image", kind),
            ("conversations", turns),
            ("data_source", pa.string()),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "0.parquet")
    found = both(annotations="0.parquet", format="parquet")
    expected = {"c": "image_marker_count"}  # an image that no question marks is no text either
    assert found.reasons == (expected, expected)
    assert same(found.pixels(), [RED])


def test_a_tar_whose_names_have_dots(tmp_path: Path, both: Both) -> None:
    """As many samples as stems, though all of them are one to a rule of the first dot."""
    samples = [
        {"__key__": key, "png": RED, "txt": b"A goat."}
        for key in [*(f"{n:06d}" for n in range(3)), *(f"img.host.com_{n}" for n in range(5))]
    ]
    write_tar(tmp_path / "s.tar", samples)
    found = both(annotations="s.tar", format="webdataset")
    assert found.reasons == ({}, {})
    assert found.counts["kept"] == 8
    assert found.counts["members"]["s"] == {
        "total": 16,
        "used": {"png": 8, "txt": 8},
        "unused": {},
        "unknown": {},
    }
    for said_by in found.said:
        assert "16 members: 16 used (png 8, txt 8)" in said_by


def test_the_report_names_fields_and_members(tmp_path: Path, both: Both) -> None:
    sample = {"json": json.dumps({"caption": "A goat.", "mood": "calm"}).encode(), "npy": b"1"}
    write_tar(tmp_path / "s.tar", [{"__key__": "a", "jpg": BLUE, **sample}])
    found = both(annotations="s.tar", format="webdataset")
    page = (found.output / "report.html").read_text()
    for words in ("Fields not read", "mood", "Members of archives", "npy 1"):
        assert words in page
