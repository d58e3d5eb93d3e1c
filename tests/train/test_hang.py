"""Workers that are stuck or slow, and what is measured of them before they start."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapilli.train.config import RecoveryConfig
from lapilli.train.health.network_check import Worker, probe_line, probe_warnings, save_warning
from lapilli.train.health.straggler import slow_line, slow_ranks
from lapilli.train.health.watchdog import (
    HangWatch,
    collectives_text,
    hang_line,
    stack_path,
    where,
)
from lapilli.train.run_folder.messages import note, notes_end, notes_from
from tests.train.disturbed import driver, train_workers, wait_for_step
from tests.train.gang import train_together
from tests.train.small_run import small_dataset, small_run

PLANTED = "tests.train.planted:projector"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("hang"))


@pytest.mark.long
def test_a_rank_that_sleeps_for_ever_is_named_with_all_stacks_and_the_run_ends(
    dataset: Path, tmp_path: Path
) -> None:
    config = small_run(
        dataset, tmp_path / "run", recovery=RecoveryConfig(step_timeout=20.0, max_failures=0)
    )
    config = replace(config, model=replace(config.model, projector=PLANTED))
    with driver(config, PLANTED="hang:1:6") as running:
        wait_for_step(config, 0, running)
        workers = train_workers(running)
        assert len(workers) == 2
        code, said, errors = running.end()
        assert [worker for worker in workers if worker.is_running()] == []
    assert code == 2, errors
    line = errors.splitlines()[-1]
    assert line.startswith("error: a step took longer than recovery.step_timeout: rank 0 at "), (
        errors
    )
    assert "rank 1 at train/planted.py" in line
    assert "rank 1 is at train/planted.py" in said
    waiting = stack_path(tmp_path / "run", 0).read_text()
    assert "lapilli/train/worker/loop.py" in waiting
    assert "planted.py" not in waiting
    assert "planted.py" in stack_path(tmp_path / "run", 1).read_text()


@pytest.mark.long
def test_a_rank_that_sleeps_in_every_step_is_named_and_no_other(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANTED", "slow:1:0.3")
    config = small_run(dataset, tmp_path / "run", epochs=4, max_steps=22)  # a window is 20
    config = replace(config, model=replace(config.model, projector=PLANTED))
    assert train_together(config) == [0, 0]
    said = [line for line in notes_from(tmp_path / "run", 0)[0] if "is slow" in line]
    assert len(said) == 1
    assert said[0].startswith("rank 1 on ")


def test_stacks_are_written_of_a_step_that_is_too_long_and_of_no_other(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with HangWatch(tmp_path, 3, 0.5) as watch:
            watch.beat(7)
            time.sleep(60)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 17
    assert "in test_stacks_are_written" in stack_path(tmp_path, 3).read_text()
    (said,), _ = notes_from(tmp_path, 0)
    assert said.startswith("step 8 has taken more than 0.5 s: rank 3 is at ")
    assert "rank 3 at " in str(hang_line(tmp_path, since=0.0))
    assert hang_line(tmp_path, since=time.time() + 60) is None
    with HangWatch(tmp_path / "other", 0, 0.5) as watch:
        for step in range(5):
            watch.beat(step)
            time.sleep(0.2)
    assert list((tmp_path / "other" / "stacks").iterdir()) == []


STUCK = """
import sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from lapilli.train.health.watchdog import HangWatch

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
dist.broadcast(torch.ones(5), 0)
dist.all_reduce(torch.ones(7, 2))
with HangWatch(Path(sys.argv[1]), 0, 0.5) as watch:
    watch.beat(7)
    time.sleep(60)
"""


def test_the_last_collectives_are_told_of_a_step_that_is_too_long(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STUCK, str(tmp_path)]
    assert subprocess.run(command, timeout=120, check=False).returncode == 17
    (said,), _ = notes_from(tmp_path, 0)
    last = said.partition("last collectives: ")[2]
    assert re.fullmatch(r"broadcast \[\[5\]\] \w+, all_?reduce \[\[7, 2\]\] \w+", last), said
    kept = json.loads((tmp_path / "stacks" / "collectives-0.json").read_text())
    assert [one["input_sizes"] for one in kept] == [[[5]], [[7, 2]]]
    assert collectives_text([]) == "none recorded"


def test_the_place_of_a_rank_is_its_own_code_in_the_last_dump() -> None:
    dump = """Timeout (0:00:20)!
Thread 0x01 (most recent call first):
  File "/x/old.py", line 1 in gone
Timeout (0:00:20)!
Thread 0x02 (most recent call first):
  File "/y/lib/python3.11/threading.py", line 331 in wait
Thread 0x03 (most recent call first):
  File "/y/site-packages/torch/distributed/x.py", line 9 in all_reduce
  File "/z/lapilli/train/worker/loop.py", line 257 in one_step
"""
    assert where(dump) == "worker/loop.py:257 in one_step"
    assert where("") == "an unknown place"


@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=9), st.permutations(range(9)))
def test_a_slow_rank_is_slow_whatever_its_number(busy: list[float], order: list[int]) -> None:
    slow = {busy[rank] for rank in slow_ranks(busy, 0.0)}
    shuffled = [busy[rank] for rank in order if rank < len(busy)]
    assert {shuffled[rank] for rank in slow_ranks(shuffled, 0.0)} == slow
    for rank in slow_ranks(busy, 0.0):
        assert busy[rank] >= statistics.median(busy)
    assert slow_ranks([busy[0]] * len(busy), 0.0) == []


def test_one_slow_rank_is_named_and_the_others_are_not() -> None:
    assert slow_ranks([1.0, 1.1, 1.5, 0.9], 3.0) == [2]
    assert slow_ranks([1.0, 1.1, 1.5, 0.9], 6.0) == []  # half a second of six is noise
    assert slow_ranks([1.0, 1.29], 1.0) == []
    assert slow_ranks([1.0], 1.0) == []
    assert "rank 2 on node7 is slow: 1500 ms" in slow_line([1.0, 1.1, 1.5, 0.9], 2, "node7")


def test_workers_that_are_far_off_are_named_with_what_to_do() -> None:
    usual = [Worker(rank, f"node{rank}", 0.0, 8e9, 4e9, 0.0) for rank in range(4)]
    usual[0] = replace(usual[0], written=100e6)
    assert probe_warnings(usual) == []
    assert probe_line(usual) == (
        "4 workers on 4 hosts: all-reduce 8.00 GB/s, disk 100 MB/s, clocks within 0.0 ms"
    )
    late = [*usual[:3], replace(usual[3], clock=-4.0)]
    assert probe_warnings(late)[0].startswith("rank 3 on node3: its clock is 4.0 s behind rank 0's")
    far = [*usual[:3], replace(usual[3], link=1e9)]
    assert probe_warnings(far)[0].startswith("rank 3 on node3 receives 1.00 GB/s from rank 2")
    assert save_warning(usual, 10**9, 1.0, 20) is None
    assert "set checkpoint.every to 11 or more" in str(save_warning(usual, 10**9, 1.0, 9))


def test_notes_are_passed_on_once(tmp_path: Path) -> None:
    assert notes_from(tmp_path, notes_end(tmp_path)) == ([], 0)
    note(tmp_path, "one\nline")
    lines, position = notes_from(tmp_path, 0)
    assert lines == ["one line"]
    assert position == notes_end(tmp_path)
    note(tmp_path, "another")
    assert notes_from(tmp_path, position)[0] == ["another"]
