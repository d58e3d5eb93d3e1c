"""A driver that is killed: nothing of it is left working, and the same command may start."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from lapilli.data.io.lease import EXPIRES
from lapilli.train.config import CheckpointConfig
from lapilli.train.driver.launching import only_trainer
from tests.object_store import failing_proxy, serve, use_endpoint
from tests.pipelines.builds import but_agents
from tests.train.disturbed import driver, train_workers, wait_for_step
from tests.train.small_run import small_dataset, small_run

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

WITHIN = 60.0  # seconds


def test_workers_of_a_killed_driver_end_and_the_same_command_may_start(tmp_path: Path) -> None:
    """Its folder is locked and its store leased, both by the process that is killed."""
    (tmp_path / "store" / "bucket").mkdir(parents=True)
    dataset = small_dataset(tmp_path)
    config = small_run(
        dataset, tmp_path / "run", epochs=40, num_workers=1,
        checkpoint=CheckpointConfig(every=3, upload="s3://bucket/run"),
    )  # fmt: skip
    with (
        serve(tmp_path / "store", remembers="1h") as server,
        failing_proxy(server, lambda number: False) as (port, _),
        use_endpoint(port),
    ):
        with driver(config) as running:
            wait_for_step(config, 6, running)
            assert len(train_workers(running)) == 1
            working = but_agents(running.driver.children(recursive=True))
            running.driver.kill()
            _, alive = psutil.wait_procs(working, timeout=WITHIN)
            assert alive == []
        assert (tmp_path / "store" / "bucket" / "run" / ".lock").exists()  # of the dead one
        began = time.monotonic()
        with only_trainer(config):  # as the same command does first
            assert time.monotonic() - began < EXPIRES / 2, "waited for a dead owner"
