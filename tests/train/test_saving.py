"""Saving that is cut short: processes killed in the middle of it, and what is on the disk then."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from lapilli.train.checkpoint import find
from lapilli.train.checkpoint.find import latest_checkpoint
from lapilli.train.checkpoint.save_load import write_checkpoint
from lapilli.train.checkpoint.tidy import tidy
from lapilli.train.config import CheckpointConfig, RunConfig
from lapilli.train.driver.launching import launch
from lapilli.train.driver.preflight import preflight
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.checkpoint_state import CheckpointState
from lapilli.train.run_folder.metrics_file import read_metrics
from tests.train.earlier_run import write_earlier
from tests.train.ready_processes import process
from tests.train.saved import parts, pieces, saved_tensors, write_small
from tests.train.small_run import small_dataset, small_run

SIZE = 1_500_000  # numbers in each of two weights: writing takes some 50 ms
KILLS = 8


def state(step: int) -> CheckpointState:
    return CheckpointState(step=step, files={})


def values(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(SIZE, generator=generator) for name in ("a", "b")}


def save_on_and_on(run: Path, step: int, told: Connection) -> None:
    """Save step after step, and say which ones are done, until killed."""
    torch.set_num_threads(1)
    while True:
        step += 1
        made = pieces(values(step))
        told.send(("saving", step))
        shapes = {name: [SIZE] for name in ("a", "b")}
        write_checkpoint(made, run, replace(state(step), shapes=shapes), keep=2)
        told.send(("saved", step))


def kill_while_saving(run: Path, start: int, wait: float) -> int:
    """Kill -9 a process so many seconds after its second save began; the last step it had saved."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = process(save_on_and_on, run, start, sender)
    child.start()
    sender.close()
    while receiver.recv() != ("saving", start + 2):
        pass
    time.sleep(wait)
    child.kill()
    child.join()
    saved = start + 1
    try:
        while True:
            word, step = receiver.recv()
            saved = step if word == "saved" else saved
    except EOFError:
        return saved


def test_kills_in_the_middle_of_saving_leave_the_checkpoint_before(tmp_path: Path) -> None:
    """At random points of the save, one after the other in one folder."""
    run = tmp_path / "run"
    randomly = random.Random()
    cut, step = 0, 0
    for _ in range(KILLS):
        wait = randomly.uniform(0.0, 0.06)
        saved = kill_while_saving(run, step, wait)
        found = latest_checkpoint(run)
        assert found is not None
        assert found.step in (saved, saved + 1), wait  # renamed, and killed before it said so
        step = found.step
        assert found.path.name == f"step-{step:08d}"
        loaded = saved_tensors(found.path)
        for name, value in values(step).items():
            assert torch.equal(loaded[f"{name}/weight"], value)
            assert torch.equal(loaded[f"{name}/exp_avg"], -value)
        lines = tidy(run, step)
        for line in lines:
            assert line == (
                f"checkpoints/step-{step + 1:08d}: cut short while it was saved; removed, the run "
                f"resumes from step {step}"
            )
        cut += len(lines)
        left = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert left[-1] == f"step-{step:08d}"
        assert all(name.startswith("step-") for name in left)
        assert not tidy(run, step)
    assert cut >= 1, "no kill came in the middle of a save"


def test_what_no_run_goes_on_from_is_passed_over_and_said(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3, 4, 5):
        write_small(tmp_path, {"a": torch.ones(3)}, state(step))
    (part,) = parts(folder / "step-00000002")
    part.write_bytes(part.read_bytes()[:-1] + b"!")
    (part,) = parts(folder / "step-00000003")
    part.write_bytes(part.read_bytes()[:-1])
    (part,) = parts(folder / "step-00000004")
    part.unlink()
    write_earlier(folder / "step-00000005", {"a": torch.ones(3)}, moments=False)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    size = parts(folder / "step-00000002")[0].stat().st_size
    whys = [
        f"{part.name} has changed since it was written (SHA-256 ",
        f"{part.name} has {size - 1} bytes of {size}; ",
        f"{part.name} is missing; ",
        "has no optimizer moments; ",
    ]
    for step, line, why in zip(range(2, 6), tidy(tmp_path, 1), whys, strict=True):
        assert line.startswith(f"checkpoints/step-{step:08d}: {why}")
        assert line.endswith("the run resumes from step 1 and removes it at the next save")


def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(tiny_disk: Path) -> None:
    run = tiny_disk / "run"
    write_small(run, {"a": torch.ones(3)}, state(1))
    with pytest.raises(TrainError, match=r"cannot be written .* free space and resume"):
        write_small(run, {"a": torch.ones(6_000_000)}, state(2))
    found = latest_checkpoint(run)
    assert found is not None
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000001"]


def test_names_are_flushed_after_the_rename_and_bytes_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of the calls to the system; a power cut cannot be had in a test."""
    calls: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def flushed(descriptor: int) -> None:
        calls.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        calls.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", renamed)
    folder = tmp_path / "run" / "checkpoints"
    write_small(tmp_path / "run", {"a": torch.ones(3)}, state(1))
    temporary = folder / ".step-00000001.tmp"
    *before, last = calls[: calls.index("rename")]
    files = ("state.json", "part-00000-of-00001.safetensors")
    assert {*before} == {str(temporary / name) for name in files}
    assert last == str(temporary)
    assert calls[calls.index("rename") + 1 :] == [str(folder), str(folder.parent)]


@pytest.mark.faults
def test_a_run_killed_while_it_saves_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    """Kill -9 at random points of random saves; each start resumes from the newest whole one."""
    dataset = small_dataset(tmp_path)
    whole = run_of(dataset, tmp_path / "whole")
    started(whole).join()
    config = run_of(dataset, tmp_path / "killed")
    for _ in range(2):
        kill_in_a_save(config, after=random.randint(1, 3))
    last = started(config)
    last.join()
    assert last.exitcode == 0
    rows = [read_metrics(Path(one.output)) for one in (whole, config)]
    assert [row.loss for row in rows[1]] == [row.loss for row in rows[0]]
    left = sorted(path.name for path in (Path(config.output) / "checkpoints").iterdir())
    assert left == ["step-00000013", "step-00000014"]


def kill_in_a_save(config: RunConfig, *, after: int) -> None:
    """Start a run, let it save so many times, and kill it at some point of the next save."""
    folder = Path(config.output) / "checkpoints"
    before = {path.name for path in folder.glob("step-*")}
    runner = started(config)
    while runner.is_alive() and len({p.name for p in folder.glob("step-*")} - before) < after:
        time.sleep(0.001)
    while runner.is_alive() and not any(folder.glob(".step-*.tmp")):
        pass
    time.sleep(random.uniform(0, 0.01))
    assert runner.is_alive()
    runner.kill()
    runner.join()


def run_of(dataset: Path, output: Path) -> RunConfig:
    """A run in one process that saves after every step."""
    return small_run(
        dataset, output, num_workers=1, launcher="process", checkpoint=CheckpointConfig(every=1)
    )


def started(config: RunConfig) -> BaseProcess:
    """A process that runs it, or goes on with it."""
    runs = process(run_to_end, config)
    runs.start()
    return runs


def run_to_end(config: RunConfig) -> None:
    torch.set_num_threads(1)
    launch(preflight(config))


def test_a_reader_of_a_run_that_goes_on_finds_what_has_replaced_the_checkpoint_it_saw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `keep: 1` the newest may be gone before it has been hashed."""
    weights = {"a": torch.zeros(2)}

    def save(step: int) -> None:
        write_small(tmp_path, weights, state(step), keep=1)

    save(1)
    hashed, later = find.sha256_file, [2, 3]

    def slow(path: Path) -> str:
        if later:
            save(later.pop(0))
        return hashed(path)

    monkeypatch.setattr(find, "sha256_file", slow)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 3
