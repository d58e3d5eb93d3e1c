"""Runs in processes of their own, to be disturbed: started, watched, killed, compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from lapilli.data.io.filesystems import is_remote
from lapilli.train.config import RunConfig
from lapilli.train.run_folder.metrics_file import read_metrics
from tests.pipelines.builds import PATIENCE, ROOT, Running

__all__ = ["driver", "ends", "kill_at", "lose_machine", "raylets", "train_workers", "wait_for_step"]


@contextmanager
def driver(config: RunConfig, *, cores: str = "4", **variables: str) -> Generator[Running]:
    """`pipelines.train` on the run; nothing of it is left afterwards."""
    beside = None if is_remote(config.output) else Path(config.output).parent
    log = Path(tempfile.mkdtemp(dir=beside))
    recipe = log / "run.yaml"
    recipe.write_text(json.dumps(asdict(config)), encoding="utf-8")
    command = [sys.executable, "-m", "tests.train.driver", cores, f"--config={recipe}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    # Files, for Ray's agents hold a pipe open for half a minute after the driver's end.
    with (log / "out").open("w") as out, (log / "err").open("w") as err:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, start_new_session=True, stdout=out, stderr=err
        )
    running = Running(process, psutil.Process(process.pid), log)
    try:
        yield running
    finally:
        running.sweep()


def ends(config: RunConfig, **how: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a run that nobody disturbs from here."""
    with driver(config, **how) as running:
        return running.end()


def wait_for_step(config: RunConfig, step: int, running: Running) -> None:
    """Wait until a step is done."""
    give_up = time.monotonic() + PATIENCE
    while not any(row.step >= step for row in read_metrics(Path(config.output))):
        assert running.process.poll() is None, running.end()
        assert time.monotonic() < give_up, f"the run never came to step {step}"
        time.sleep(0.005)


def train_workers(running: Running) -> list[psutil.Process]:
    """The processes that train, of a run's Ray."""
    found: list[psutil.Process] = []
    for process in running.driver.children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def raylets(running: Running) -> list[psutil.Process]:
    """Ray's nodes, the driver's own first."""
    children = running.driver.children(recursive=True)
    found = [child for child in children if child.cmdline()[:1] and child.name() == "raylet"]
    return sorted(found, key=lambda child: child.create_time())


def lose_machine(running: Running) -> None:
    """kill -9 all of Ray's last node at once, as when a machine loses its power.

    Workers outlive a raylet that is killed alone by some seconds, in which a small run ends.
    """
    raylet = raylets(running)[-1]
    for process in [raylet, *raylet.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def kill_at(what: str, config: RunConfig, step: int, running: Running) -> None:
    """kill -9 a worker, the raylet or the driver of a run once a step is done."""
    wait_for_step(config, step, running)
    victims = {
        "worker": lambda: train_workers(running)[step % config.num_workers],
        "raylet": running.raylet,
        "driver": lambda: running.driver,
    }
    victims[what]().kill()
