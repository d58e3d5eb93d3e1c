"""A machine is lost, and the run goes on with the workers that are left."""

from __future__ import annotations

from pathlib import Path

import pytest

from lapilli.train.config import CheckpointConfig, RecoveryConfig
from lapilli.train.driver.launching import launch
from lapilli.train.driver.preflight import preflight
from lapilli.train.run_folder.metrics_file import read_metrics
from tests.train.disturbed import driver, lose_machine, wait_for_step
from tests.train.small_run import small_dataset, small_run


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_lost_machine_leaves_one_worker_and_the_run_ends_as_if_it_had_been_one(
    tmp_path: Path,
) -> None:
    dataset = small_dataset(tmp_path)
    alone = small_run(dataset, tmp_path / "alone", epochs=4, num_workers=1, launcher="process")
    launch(preflight(alone))
    config = small_run(
        dataset,
        tmp_path / "run",
        epochs=4,
        recovery=RecoveryConfig(min_workers=1),
        checkpoint=CheckpointConfig(every=2),
    )
    with driver(config, cores="1+1") as running:
        wait_for_step(config, 5, running)
        lose_machine(running)  # the second one
        code, said, errors = running.end()
    assert code == 0, errors
    assert "2 workers on" in said
    assert "1 worker:" in said
    found, expected = read_metrics(Path(config.output)), read_metrics(Path(alone.output))
    assert [row.batch for row in found] == [row.batch for row in expected]
    losses = [row.loss for row in expected]
    assert [row.loss for row in found] == pytest.approx(losses, abs=1e-4)
