"""Ends of a run: a node to be taken away, a job that is stopped, a folder that is removed."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from lapilli.train.config import CheckpointConfig
from lapilli.train.driver import ray_internals
from lapilli.train.driver.workers import join_alone
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.metrics_file import read_metrics
from lapilli.train.worker import loop
from lapilli.train.worker.loop import fit
from lapilli.train.worker.setup import setup
from pipelines.train import train
from tests.train.small_run import small_dataset, small_run


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("ends"), images=16, text_only=8)


def test_each_notice_of_a_node_saves_once_and_training_goes_on(
    dataset: Path, tmp_path: Path
) -> None:
    losses: dict[str, list[float]] = {}
    for name in ("undisturbed", "noticed"):
        run = tmp_path / name
        run.mkdir()
        config = small_run(
            dataset, run, num_workers=1, launcher="process",
            checkpoint=CheckpointConfig(every=100, keep_last=9),
        )  # fmt: skip
        join_alone("cpu")
        ready = setup(config, "cpu", rank=0, world_size=1)
        notices = iter([None, "first", "first", "first", "second"] if name == "noticed" else [])
        last = "second" if name == "noticed" else None
        fit(ready, partial(next, notices, last))
        losses[name] = [row.loss for row in read_metrics(run)]
    assert losses["noticed"] == losses["undisturbed"]
    assert len(losses["noticed"]) == 6
    saved = [path.name for path in sorted((tmp_path / "noticed" / "checkpoints").glob("step-*"))]
    # asked with steps 2 and 5, known and saved a step later
    assert saved == [f"step-{step:08d}" for step in (3, 6)]
    said = (tmp_path / "noticed" / "notes.txt").read_text()
    assert said.count("a node is to be taken away: saving a checkpoint") == 2


@pytest.mark.parametrize("every", [2, 100])
def test_a_folder_that_vanishes_is_one_line(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    config = small_run(
        dataset, tmp_path / "run", num_workers=1, launcher="process",
        checkpoint=CheckpointConfig(every=every),
    )  # fmt: skip
    take: Callable[..., Any] = loop.take_step

    def losing(ready: Any, batches: Any, **asked: Any) -> Any:
        if batches.step == 3:
            shutil.rmtree(config.output)
        return take(ready, batches, **asked)

    monkeypatch.setattr(loop, "take_step", losing)
    with pytest.raises(TrainError, match=r"^output: .*/run was removed while it was trained"):
        train(config)


def test_rays_notice_is_read_where_its_watcher_puts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train import get_preemption_info  # the public half, a barrier of all workers
    from ray.train.v2._internal.execution import context
    from ray.train.v2._internal.execution.preemption import PreemptionContext
    from ray.train.v2._internal.execution.worker_group import worker
    from ray.train.v2.api.preemption import PreemptionInfo

    assert callable(get_preemption_info)
    assert ray_internals.preemption_notice() is None, "no worker of Ray's"
    made = SimpleNamespace(preemption_context=PreemptionContext())
    monkeypatch.setattr(context, "get_train_context", lambda: made)
    assert ray_internals.preemption_notice() is None
    notice = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"node": [0]})
    made.preemption_context.preemption_info = notice
    assert ray_internals.preemption_notice() == notice
    assert "train_context.preemption_context.preemption_info = info" in inspect.getsource(worker)


def test_a_stopped_job_has_time_to_save() -> None:
    from ray.dashboard.modules.job import job_supervisor

    environment = yaml.safe_load(Path("pipelines/cluster/runtime_env.yaml").read_text())
    assert int(environment["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 300
    assert '"RAY_JOB_STOP_WAIT_TIME_S"' in inspect.getsource(job_supervisor)
