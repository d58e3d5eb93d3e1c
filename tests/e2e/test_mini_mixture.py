"""The published layout, with other people's photos and planted defects, through the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.preprocess import main

RECIPES = Path(__file__).parents[2] / "pipelines" / "recipes" / "llava15"
STAGES = {"projector_training": "pretrain_data", "instruction_finetuning": "finetune_data"}


def expected_verdicts(fixtures: Path, stage: str) -> dict[str, str | None]:
    """By id: None to keep, or the reason; written by those who planted the defects."""
    stages = json.loads((fixtures / "mini_mixture" / "expected.json").read_text())
    verdicts: dict[str, str] = stages[stage]
    return {
        record_id: verdict.removeprefix("quarantine:") if ":" in verdict else None
        for record_id, verdict in verdicts.items()
    }


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("stage", STAGES)
def test_every_record_gets_the_verdict_that_was_planted(
    fixtures_dir: Path, tmp_path: Path, stage: str
) -> None:
    output = tmp_path / "dataset"
    main(
        [
            f"--config={RECIPES / STAGES[stage]}.yaml",
            f"--root={fixtures_dir / 'mini_mixture' / stage}",
            f"--output={output}",
            f"--tokenizer={fixtures_dir / 'tokenizers' / 'llama2-32k'}",
            "--max_quarantined=0.3",
        ]
    )
    with pa.ipc.open_file(str(output / "selection.arrow")) as reader:
        kept: list[str] = reader.read_all()["sample_id"].to_pylist()
    quarantined: list[dict[str, Any]] = pq.read_table(output / "quarantine.parquet").to_pylist()
    expected = expected_verdicts(fixtures_dir, stage)
    assert len(kept) + len(quarantined) == len(expected)
    verdicts: dict[str, str | None] = dict.fromkeys(kept)
    verdicts |= {row["sample_id"]: row["reason"] for row in quarantined}
    found = {sample_id.partition("/")[2]: verdict for sample_id, verdict in verdicts.items()}
    assert found == expected
    counts = json.loads((output / "manifest.json").read_text())["counts"]
    assert counts["read"] == counts["kept"] + counts["quarantined"] == len(expected)
