"""Real photos and captions with planted defects, from their folder to twenty training steps."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import pipelines.preprocess
import pipelines.train
from lapilli.data.shards.manifest import read_manifest
from lapilli.train.run_folder.metrics_file import read_metrics

ROOT = Path(__file__).parents[2]


@pytest.mark.faults  # for its length: photos at 336 px and 32,000 token ids on a CPU
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize(
    ("recipe", "folder", "view", "read"),
    [
        ("pretrain_data", "projector_training", "clip336_crop", 45),
        ("finetune_data", "instruction_finetuning", "clip336_pad", 130),
    ],
)
def test_both_stages_train_twenty_steps_and_lose_nothing(
    recipe: str, folder: str, view: str, read: int, fixtures_dir: Path, tmp_path: Path
) -> None:
    dataset, output = tmp_path / "dataset", tmp_path / "run"
    pipelines.preprocess.main(
        [
            f"--config={ROOT}/pipelines/recipes/llava15/{recipe}.yaml",
            f"--root={fixtures_dir}/mini_mixture/{folder}",
            f"--output={dataset}",
            f"--tokenizer={fixtures_dir}/tokenizers/llama2-32k",
            "--max_quarantined=0.3",
        ]
    )
    counts = read_manifest(dataset).counts
    quarantined = pq.read_table(dataset / "quarantine.parquet").num_rows
    assert counts["read"] == read == counts["kept"] + quarantined
    pipelines.train.main(
        [
            f"--config={ROOT}/pipelines/recipes/tiny/pretrain.yaml",
            f"--dataset={dataset}",
            f"--output={output}",
            f"--view={view}",
            "--global_batch_size=8",
            "--micro_batch_size=2",
            "--epochs=20",
            "--max_steps=20",
            "--max_length=2048",
            "--device=cpu",
            "--model.vision.settings.image_size=336",
            "--model.vision.settings.patch_size=48",
            "--model.language.settings.vocab_size=32000",
            "--model.language.settings.max_position_embeddings=2048",
            "--model.language.settings.num_hidden_layers=1",
        ]
    )
    losses = [row.loss for row in read_metrics(output)]
    assert len(losses) == 20
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
