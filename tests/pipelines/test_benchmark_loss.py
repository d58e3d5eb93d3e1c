"""The loss's benchmark: both ways are measured, and memory where it shows."""

from __future__ import annotations

import re

import pytest

from pipelines.benchmarks import loss


def test_chunks_take_less_memory_than_all_logits(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--positions=1024 --hidden=8 --vocabulary=16384 --chunk=64 --rounds=1 --save=false"
    assert loss.main(sizes.split()) == 0
    told = capsys.readouterr().out
    found = dict(re.findall(r"(plain|chunked): (\d+) MiB above its inputs \(logits 64\)", told))
    assert int(found["plain"]) > 100  # the logits and their gradient
    assert int(found["chunked"]) < 0.6 * int(found["plain"])
