"""The quickstart stopped at every turn: the same command goes on, says so, and repeats nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lapilli.train.checkpoint.find import latest_checkpoint
from lapilli.train.run_folder.metrics_file import read_metrics
from lapilli.train.run_folder.names import RUN_INFO

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]


def start(output: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pipelines.quickstart", f"--output={output}", "--device=cpu"]
    flags = ["--epochs=1", "--min_accuracy=0", "--min_gain=-1"]  # stopping is tested, not learning
    with log.open("wb") as file:
        return subprocess.Popen(
            [*command, *flags], cwd=ROOT, stdout=file, stderr=file, start_new_session=True
        )


def wait_until(what: str, found: Iterator[bool], process: subprocess.Popen[bytes]) -> None:
    give_up = time.monotonic() + 300
    while not next(found):
        assert process.poll() is None, f"ended before {what}"
        assert time.monotonic() < give_up, f"never came to {what}"
        time.sleep(0.05)


def steps_done(run: Path, count: int) -> Iterator[bool]:
    while True:
        yield len(read_metrics(run)) >= count


def shards_there(folder: Path, count: int) -> Iterator[bool]:
    while True:
        yield len(list(folder.rglob("*.arrow"))) >= count


def stop(process: subprocess.Popen[bytes], number: signal.Signals, *, whole_group: bool) -> int:
    """Ctrl-C reaches every process of the terminal; kill -9 the driver alone."""
    if whole_group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    return process.wait(timeout=60)


def training(leader: int) -> list[int]:
    """Training workers of a session that are still there; Ray's agents stay half a minute more."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            name = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z" and b"RayTrainWorker" in name:
            found.append(int(path.name))
    return found


def goes_on(run: Path) -> str:
    """What the next start says of a run where nothing writes any more.

    Workers take a step or twenty more before they notice that their driver is gone.
    """
    found = latest_checkpoint(run)
    assert found is not None
    total = json.loads((run / RUN_INFO).read_text(encoding="utf-8"))["total_steps"]
    is_done = found.step == total
    return f"already finished at step {total}" if is_done else f"resumes from step {found.step}"


def wait_until_none_trains(leader: int) -> None:
    """Workers end with the driver: none may write into the folder of the next run."""
    give_up = time.monotonic() + 30
    while training(leader):
        assert time.monotonic() < give_up, f"still there: {training(leader)}"
        time.sleep(0.1)


def test_stopped_at_every_turn_it_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    output = tmp_path / "quickstart"
    first, second = output / "runs" / "pretrain", output / "runs" / "finetune"
    log = tmp_path / "log"

    process = start(output, log)
    wait_until("shards", shards_there(output / "datasets" / "pretrain", 2), process)
    assert stop(process, signal.SIGINT, whole_group=True) == 130
    last = log.read_text(encoding="utf-8").strip().splitlines()[-1]
    assert last == "interrupted; run the same command again to go on"
    wait_until_none_trains(process.pid)

    process = start(output, log)
    wait_until("stage 1", steps_done(first, 105), process)  # saved at step 100, of 120
    assert stop(process, signal.SIGINT, whole_group=True) == 130
    wait_until_none_trains(process.pid)
    expected = goes_on(first)

    process = start(output, log)
    wait_until("stage 2", steps_done(second, 105), process)  # of 348
    stop(process, signal.SIGKILL, whole_group=False)
    text = log.read_text(encoding="utf-8")
    assert "0 shards built" in text
    assert expected in text
    assert "Traceback" not in text
    wait_until_none_trains(process.pid)
    expected = goes_on(second)
    assert expected.startswith("resumes from step")

    process = start(output, log)
    assert process.wait(timeout=400) == 0
    text = log.read_text(encoding="utf-8")
    assert "pretrain: finished already" in text
    assert expected in text
    for run in (first, second):
        steps = [row.step for row in read_metrics(run)]
        assert steps == list(range(len(steps)))
        assert len(steps) > 105
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    assert summary["asked"] == 9673

    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    process = start(output, log)
    assert process.wait(timeout=100) == 0
    assert "9673 answers of the same weights to the same questions reused" in log.read_text()
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")} == before
