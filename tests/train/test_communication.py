"""ZeRO's collectives: DeepSpeed's settings by the model's size, and what a step sends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lapilli.train.config import CommunicationConfig, RecoveryConfig
from lapilli.train.driver.communication import communication_seconds, sent_bytes
from lapilli.train.engine.communication import communication_settings
from lapilli.train.engine.deepspeed_engine import deepspeed_settings
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.messages import notes_from
from lapilli.train.run_folder.metrics_file import read_metrics
from tests.train.gang import train_together
from tests.train.small_run import small_dataset, small_run
from tests.train.tiny import model_config, run_config


def test_settings_follow_the_formulas_and_what_a_run_sets_wins() -> None:
    own = CommunicationConfig(overlap_comm=False, stage3_prefetch_bucket_size=7)
    third = run_config(model_config(), zero_stage=3, communication=own)
    assert communication_settings(third, 4096, "cuda") == {
        "overlap_comm": False, "contiguous_gradients": True, "reduce_bucket_size": 16_777_216,
        "stage3_prefetch_bucket_size": 7, "stage3_param_persistence_threshold": 40_960,
    }  # fmt: skip
    second = run_config(model_config(), zero_stage=2)
    assert communication_settings(second, 4096, "cuda") == {
        "overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": 201_326_592,
        "allgather_bucket_size": 201_326_592,
    }  # fmt: skip
    assert communication_settings(second, 8192, "cuda")["reduce_bucket_size"] == 500_000_000
    assert communication_settings(second, 4096, "cpu") == {}
    assert communication_settings(run_config(model_config(), zero_stage=0), 4096, "cuda") == {}
    found = deepspeed_settings(third, communication_settings(third, 4096, "cuda"))
    assert found["zero_optimization"]["stage"] == 3
    assert found["zero_optimization"]["stage3_prefetch_bucket_size"] == 7


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"zero_stage": 2}, "zero_hpz_partition_size: 2 with zero_stage 2"),
        ({"num_workers": 3}, "num_workers 3 .* divides num_workers"),
        ({"recovery": RecoveryConfig(min_workers=1)}, "recovery.min_workers 1"),
    ],
)
def test_groups_that_do_not_cut_the_workers_are_one_line(
    values: dict[str, Any], message: str
) -> None:
    own = CommunicationConfig(zero_hpz_partition_size=2)
    run_config(model_config(), zero_stage=3, communication=own)
    changed: dict[str, Any] = {"zero_stage": 3, "communication": own, **values}
    with pytest.raises(TrainError, match=message):
        run_config(model_config(), **changed)
    with pytest.raises(TrainError, match=r"communication.link_gbps: -1"):
        CommunicationConfig(link_gbps=-1)


def test_a_step_sends_what_zeros_authors_count() -> None:
    """Volumes in numbers over 4 workers: psi reduced or gathered once sends 3/4 psi."""
    parts = {"vision": (300, 0), "projector": (20, 20), "language": (700, 680)}
    sent = {
        stage: sent_bytes(
            run_config(
                model_config(), num_workers=4, micro_batch_size=1, global_batch_size=8,
                zero_stage=stage,
            ),
            parts,
        )
        for stage in (0, 1, 2, 3)
    }  # fmt: skip
    trained, accumulation = 700, 2
    assert sent[0] == 4 * 0.75 * 2 * trained
    assert sent[1] == 4 * 0.75 * 2 * trained
    assert sent[2] == 4 * 0.75 * (accumulation + 1) * trained
    assert sent[3] == 4 * 0.75 * accumulation * (300 + 2 * (20 + 700) + trained)
    config = run_config(model_config(), zero_stage=1)
    assert communication_seconds(config, {"language": (10**9, 10**9)}, 32.0) == pytest.approx(1.0)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_with_settings_of_its_own_has_the_losses_of_one_without(
    stage: int, tmp_path: Path
) -> None:
    dataset = small_dataset(tmp_path)
    own = CommunicationConfig(
        overlap_comm=False, reduce_bucket_size=900, allgather_bucket_size=900,
        stage3_prefetch_bucket_size=500, stage3_param_persistence_threshold=30,
    )  # fmt: skip
    losses: list[list[float]] = []
    for name, communication in (("plain", CommunicationConfig()), ("own", own)):
        run = tmp_path / name
        config = small_run(dataset, run, zero_stage=stage, max_steps=4, communication=communication)
        assert train_together(config) == [0, 0]
        losses.append([row.loss for row in read_metrics(run)])
        said = [line for line in notes_from(run, 0)[0] if line.startswith("communication: ")]
        assert ("reduce_bucket_size 900" in said[0]) is (name == "own")
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
