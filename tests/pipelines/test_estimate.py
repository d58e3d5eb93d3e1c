"""`train --estimate` ends without Ray, weights or a run's folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipelines.train import main

RECIPE = Path(__file__).parents[2] / "pipelines" / "recipes" / "tiny" / "pretrain.yaml"


def test_it_tells_memory_and_disk_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    flags = [f"--config={RECIPE}", f"--dataset={tmp_path / 'none'}", f"--output={tmp_path / 'run'}"]
    assert main([*flags, "--micro_batch=0", "--estimate"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "rows of max_length, 512 tokens" in said
    assert "ZeRO-0 ZeRO-1 ZeRO-2 ZeRO-3" in said
    assert "global batch 32 = 2 workers x micro-batch 8 x accumulation 2" in said
    assert "a checkpoint" in said
    assert not list(tmp_path.iterdir())
