"""The topic `feed` at a small size: every way runs and has a row, and another dataset is timed."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest
import torch

from lapilli.train.steps import feed as feed_module
from pipelines.benchmarks import feed, harness
from pipelines.benchmarks.__main__ import main
from pipelines.benchmarks.material.large import write_large
from pipelines.benchmarks.sides.llava_way import IGNORED, IMAGE, LlavaSamples
from tests.factories import make_tokenizer


def test_feed_adds_a_row_for_each_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("skimage", "sklearn"):
        pytest.importorskip(package, reason=f"{package}, for its photos, is in the bench extra")
    monkeypatch.setattr(feed, "add_row", lambda t, row: harness.add_row(t, row, tmp_path))
    monkeypatch.setattr(feed_module, "THREADS", feed_module.THREADS)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", os.environ.get("TOKENIZERS_PARALLELISM", "false"))
    threads = torch.get_num_threads()
    # Corpus records are up to thousands of letters long and this tokenizer knows few words.
    tokenizer = make_tokenizer(tmp_path / "small")
    other = write_large(tmp_path / "other", records=4000, shards=1, per_shard=8)
    flags = ["--records=60", "--images=3", "--micro_batch_size=2", "--seconds=0.2", "--rounds=1"]
    folders = [f"--folder={tmp_path / 'kept'}", f"--tokenizer={tokenizer}", f"--dataset={other}"]
    try:
        assert main(["feed", *folders, *flags]) == 0
    finally:
        torch.set_num_threads(threads)
    with (tmp_path / "feed.csv").open(newline="") as file:
        rows = {row["way"]: row for row in csv.DictReader(file)}
    ours = {"ours, 1 thread", "ours, 2 threads", "ours, 2 workers"}
    assert set(rows) == {"llava, 2 workers", "mock"} | ours
    assert rows["llava, 2 workers"]["of_llava"] == "1.0"
    for row in rows.values():
        assert float(row["per_second"]) > 0
        assert float(row["first_batch_seconds"]) > 0
        assert 3900 < int(row["samples"]) <= 4000  # what is longer than 2048 tokens is left out
    elements = json.loads((tmp_path / "kept" / "root" / "mix_60_3.json").read_text())
    check_llavas_samples(LlavaSamples(elements, tmp_path / "kept" / "root", str(tokenizer), 336))


def check_llavas_samples(samples: LlavaSamples) -> None:
    """What is trained is the text that each answer has, and only that."""
    checked = 0
    for number, element in enumerate(samples.elements):
        if "image" not in element or checked == 3:
            continue
        checked += 1
        row = samples[number]
        assert row["images"].shape == (3, 336, 336)
        assert int((row["input_ids"] == IMAGE).sum()) == 1
        trained = row["labels"] != IGNORED
        assert torch.equal(row["labels"][trained], row["input_ids"][trained])
        assert 0 < int(trained.sum()) < trained.numel()
    assert checked == 3
