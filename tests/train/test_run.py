"""Runs on real Ray Train and DeepSpeed: to the end, again, and with workers killed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lapilli.model.parts.trainable import trainable_parameters
from lapilli.model.vlm import build_model
from lapilli.train.checkpoint.find import find_checkpoints, latest_checkpoint
from lapilli.train.checkpoint.layout import forget_old
from lapilli.train.config import CheckpointConfig, OptimConfig, RecoveryConfig, RunConfig
from lapilli.train.driver.launching import launch
from lapilli.train.driver.preflight import preflight
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.metrics_file import MetricsFile, read_metrics
from tests.train.saved import saved_weights
from tests.train.small_run import made_step, small_dataset, small_run

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """An uninterrupted run."""
    config = small_run(dataset, tmp_path_factory.mktemp("finished") / "run")
    launch(preflight(config))
    return config


def losses(config: RunConfig) -> list[float]:
    rows = read_metrics(Path(config.output))
    assert [row.step for row in rows] == list(range(len(rows)))
    return [row.loss for row in rows]


def test_a_run_ends_with_metrics_and_a_checkpoint_and_the_loss_has_fallen(
    finished: RunConfig,
) -> None:
    found = losses(finished)
    assert len(found) == 14  # 4 global batches with images and 3 without, twice
    assert sum(found[-4:]) < 0.8 * sum(found[:4])
    steps = [checkpoint.step for checkpoint in find_checkpoints(Path(finished.output))]
    assert steps == [12, 14]
    resolved = json.loads((Path(finished.output) / "config.json").read_text())
    assert resolved["global_batch_size"] == 8
    workers = json.loads((Path(finished.output) / "workers.json").read_text())["workers"]
    assert [worker["rank"] for worker in workers] == [0, 1]
    for worker in workers:
        assert worker["reduced"] > 0
        assert worker["link"] > 0
        assert abs(worker["clock"]) < 1  # one machine, one clock
    assert workers[0]["written"] > 0
    assert not list(Path(finished.output).glob(".probe-*"))


def test_a_finished_run_does_no_work_again(finished: RunConfig) -> None:
    path = Path(finished.output) / "metrics.jsonl"
    before = path.stat().st_mtime_ns
    ready = preflight(finished)
    assert ready.start == ready.total_steps == 14
    launch(ready)
    assert path.stat().st_mtime_ns == before


def test_another_setting_in_the_same_folder_is_named(finished: RunConfig) -> None:
    with pytest.raises(TrainError, match=r"seed: .* was started with 42, now 7"):
        preflight(replace(finished, seed=7))


@pytest.mark.parametrize("own", [{"sampler": "llava"}, {"loss_reduction": "micro_batch_mean"}])
def test_micro_batches_that_decide_the_loss_may_not_change(
    own: dict[str, str], dataset: Path, tmp_path: Path
) -> None:
    config = small_run(
        dataset, tmp_path / "run", num_workers=1, launcher="process", max_steps=1, **own
    )
    launch(preflight(config))
    with pytest.raises(TrainError, match=r"micro_batch_size: .* was started with 2, now 4"):
        preflight(replace(config, micro_batch_size=4))
    # without them it is the machine's affair
    other = small_run(dataset, tmp_path / "other", num_workers=1, launcher="process", max_steps=1)
    launch(preflight(other))
    assert preflight(replace(other, micro_batch_size=4)).is_done


@pytest.mark.faults
def test_a_killed_worker_is_replaced_and_the_run_ends_as_if_nothing_had_been(
    finished: RunConfig, dataset: Path, tmp_path: Path
) -> None:
    config = small_run(dataset, tmp_path / "run")
    step = random.Random().randint(1, 11)
    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill_a_worker_at, Path(config.output), step)
        launch(preflight(config))
        killed.result()
    assert losses(config) == losses(finished), f"killed at step {step}"


def wait_for_step(run: Path, step: int) -> None:
    give_up = time.monotonic() + 200
    while len(read_metrics(run)) <= step:
        assert time.monotonic() < give_up, "the run never came to the step"
        time.sleep(0.01)


def kill_a_worker_at(run: Path, step: int) -> None:
    """kill -9 one of the two training processes once a step is done."""
    wait_for_step(run, step)
    os.kill(random.choice(train_workers()), signal.SIGKILL)


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, marks=pytest.mark.faults),
    ],
)
def test_a_stopped_run_saves_first_and_goes_on_from_there(
    number: signal.Signals, finished: RunConfig, dataset: Path, tmp_path: Path
) -> None:
    config = small_run(dataset, tmp_path / "run", checkpoint=CheckpointConfig(every=100))
    step = random.Random().randint(1, 9)
    told: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(signal_at, Path(config.output), step, number)
        with pytest.raises(KeyboardInterrupt, match=r"saved at step \d+") as raised:
            launch(preflight(config), on_stop=lambda: told.append("saving"))
        stopped.result()
    assert told == ["saving"]
    ready = preflight(config)
    assert ready.start > step
    assert str(raised.value) == f"saved at step {ready.start}"
    launch(ready)
    assert losses(config) == losses(finished), f"stopped at step {step}"


def signal_at(run: Path, step: int, number: signal.Signals) -> None:
    """Send this process a signal once a step is done."""
    wait_for_step(run, step)
    os.kill(os.getpid(), number)


def train_workers() -> list[int]:
    """Processes of Ray Train's workers that descend from this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            name = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if b"RayTrainWorker" in name and is_ours(int(path.name)):
            found.append(int(path.name))
    assert found, "no training worker is running"
    return found


def is_ours(pid: int) -> bool:
    """Whether a process was started, over however many others, by this one."""
    while pid > 1:
        if pid == os.getpid():
            return True
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        pid = int(status.partition("PPid:")[2].split()[0])
    return False


def test_one_process_without_ray_trains_the_same(
    finished: RunConfig, dataset: Path, tmp_path: Path
) -> None:
    config = small_run(dataset, tmp_path / "run", num_workers=1, launcher="process")
    launch(preflight(config))
    assert losses(config) == pytest.approx(losses(finished), abs=1e-4)
    assert latest_checkpoint(Path(config.output)) is not None


@pytest.mark.faults  # for its length
def test_weights_loaded_in_bf16_train(dataset: Path, tmp_path: Path) -> None:
    config = small_run(
        dataset, tmp_path / "run", num_workers=1, launcher="process", precision="bf16", max_steps=4
    )
    config = replace(config, model=replace(config.model, dtype="bf16"))
    launch(preflight(config))
    newest = latest_checkpoint(Path(config.output))
    assert newest is not None
    saved = saved_weights(newest.path)
    assert {value.dtype for value in saved.values()} == {torch.float32}
    for name, before in trainable_parameters(build_model(config.model)).items():
        assert not torch.equal(saved[name], before.float()), name


@pytest.mark.faults
@pytest.mark.parametrize("changes", [{"num_workers": 1}, {"zero_stage": 3}, {"zero_stage": 0}])
def test_a_run_goes_on_with_other_workers_and_another_stage(
    changes: dict[str, int], finished: RunConfig, dataset: Path, tmp_path: Path
) -> None:
    config = small_run(dataset, tmp_path / "run")
    cut_short(finished, Path(config.output), to_step=12)
    again = replace(config, **changes)  # type: ignore[arg-type]
    ready = preflight(again)
    assert ready.start == 12
    launch(ready)
    assert losses(again) == pytest.approx(losses(finished), abs=1e-4)


@pytest.mark.faults
def test_a_loss_that_is_no_number_ends_the_run_in_one_line(dataset: Path, tmp_path: Path) -> None:
    config = small_run(
        dataset,
        tmp_path / "run",
        recovery=RecoveryConfig(max_failures=1),
        optim=OptimConfig(lr=1e30, grad_clip=0.0),
    )
    with pytest.raises(TrainError, match=r"step \d+: loss .*, gradient norm .*; lower optim.lr"):
        launch(preflight(config))
    assert len(losses(config)) < 14


@pytest.mark.faults  # for its length
@pytest.mark.parametrize("stage", [2, 3])
def test_bf16_trains_and_keeps_fp32_weights(stage: int, dataset: Path, tmp_path: Path) -> None:
    config = small_run(dataset, tmp_path / "run", precision="bf16", zero_stage=stage)
    launch(preflight(config))
    found = losses(config)
    assert sum(found[-4:]) < 0.8 * sum(found[:4])
    newest = latest_checkpoint(Path(config.output))
    assert newest is not None
    for name, value in saved_weights(newest.path).items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, value.bfloat16().float()), name


@pytest.mark.faults
def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_it_goes_on_when_there_is_room(
    finished: RunConfig, dataset: Path, tiny_disk: Path
) -> None:
    config = small_run(dataset, tiny_disk / "run")
    with ThreadPoolExecutor(1) as pool:
        filled = pool.submit(fill_at, tiny_disk, Path(config.output), 5)
        with pytest.raises(TrainError, match=r"free space and (resume|run the same command again)"):
            launch(preflight(config))
        filled.result().unlink()
    ready = preflight(config)
    assert 0 < ready.start < ready.total_steps
    launch(ready)
    assert losses(config) == losses(finished)


def fill_at(disk: Path, run: Path, step: int) -> Path:
    """Take all space that is left once a step is done."""
    give_up = time.monotonic() + 200
    while len(read_metrics(run)) <= step:
        assert time.monotonic() < give_up, "the run never came to the step"
        time.sleep(0.01)
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(65536))
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
        while True:
            file.write(b"0")
    return filler


def cut_short(finished: RunConfig, run: Path, *, to_step: int) -> None:
    """A copy of a run as it was after a step."""
    shutil.copytree(finished.output, run, ignore=shutil.ignore_patterns("ray"))
    for checkpoint in find_checkpoints(run):
        if checkpoint.step > to_step:
            shutil.rmtree(checkpoint.path)
    MetricsFile(run, to_step).close()


@pytest.mark.parametrize(
    "file", ["part-00000-of-00002.safetensors", "part-00001-of-00002.safetensors", "state.json"]
)
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(
    file: str, damage: str, finished: RunConfig, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.output, run, ignore=shutil.ignore_patterns("ray"))
    newest = latest_checkpoint(run)
    assert newest is not None
    path = newest.path / file
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 0x80  # in JSON: no UTF-8 any more
        path.write_bytes(data)
    before = latest_checkpoint(run)
    assert before is not None
    assert (newest.step, before.step) == (14, 12)


def test_a_damaged_later_checkpoint_makes_no_room_for_itself(
    finished: RunConfig, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.output, run, ignore=shutil.ignore_patterns("ray"))
    (run / "checkpoints" / "step-00000014" / "state.json").unlink()
    forget_old(run, 12, keep=1)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000012"]


def test_a_run_needs_a_folder_of_its_own(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(TrainError, match="is not empty and no run"):
        preflight(small_run(dataset, tmp_path))
    with pytest.raises(TrainError, match="is a file"):
        preflight(small_run(dataset, tmp_path / "notes.txt"))


def test_a_disk_too_small_for_the_checkpoints_stops_before_step_0(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        TrainError, match=r"3 checkpoints need .* MB; free space or lower checkpoint"
    ):
        preflight(small_run(dataset, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_metrics_forget_the_steps_a_restart_takes_again(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path, 0)
    for step in range(5):
        metrics.write(made_step(step))
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # a kill in the middle of a line
    assert [row.step for row in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]
    MetricsFile(tmp_path, 3).close()
    assert [row.step for row in read_metrics(tmp_path)] == [0, 1, 2]
