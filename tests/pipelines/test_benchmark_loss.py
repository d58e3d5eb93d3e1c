"""The benchmarks of loss and merge: every way is measured, and memory where it shows."""

from __future__ import annotations

import re

import pytest

from pipelines.benchmarks import loss, merge


def test_chunks_take_less_memory_than_all_logits(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--positions=1024 --hidden=8 --vocabulary=16384 --chunk=64 --rounds=1 --save=false"
    assert loss.main(sizes.split()) == 0
    told = capsys.readouterr().out
    found = dict(re.findall(r"(plain|chunked): (\d+) MiB above its inputs \(logits 64\)", told))
    assert int(found["plain"]) > 100  # the logits and their gradient
    assert int(found["chunked"]) < 0.6 * int(found["plain"])


def test_each_way_to_merge_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--rows=2 --image_tokens=4 --text_tokens=6 --hidden=8 --vocabulary=32 --rounds=1"
    for trains in ("true", "false"):
        flags = [*sizes.split(), f"--trains_embedding={trains}", "--compiled=false", "--save=false"]
        assert merge.main(flags) == 0
        told = capsys.readouterr().out
        assert re.findall(r"^ *(\w+): forward", told, re.MULTILINE) == [
            "torch",
            "masked_scatter",
            "index_copy",
        ]
