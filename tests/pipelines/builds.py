"""Builds in processes of their own, to be disturbed: started, watched, killed, compared."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.factories import CLIP_MEAN

__all__ = ["Build", "Running", "but_agents", "named_files", "wait_for"]

ROOT = Path(__file__).parents[2]
PATIENCE = 300  # seconds; a machine may have other work

RECIPE = f"""
sources:
  - {{name: made_up, annotations: mixture.json, images: images}}
template: v1
views:
  pad32: {{size: 32, fill: {list(CLIP_MEAN)}}}
records_per_shard: 16
shard_bytes: {6 * 32 * 32 * 3}
max_quarantined: 1.0
"""


@dataclass(frozen=True)
class Build:
    """The command that makes one dataset of a mixture.

    Attributes:
        root: The mixture's folder.
        tokenizer: The tokenizer's folder.
        output: Where the dataset is to be.
        planted: A folder with a `sitecustomize.py` that every process of the build runs, or None.
    """

    root: Path
    tokenizer: Path
    output: Path
    planted: Path | None = None

    def start(self, **flags: object) -> Running:
        """The build's process, in a session of its own."""
        recipe = self.root.parent / "recipe.yaml"
        recipe.write_text(RECIPE)
        command = [
            sys.executable, "-m", "pipelines.preprocess", f"--config={recipe}",
            f"--root={self.root}", f"--output={self.output}", f"--tokenizer={self.tokenizer}",
            *(f"--{name}={value}" for name, value in flags.items()),
        ]  # fmt: skip
        path = [str(self.planted)] if self.planted else []
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*path, os.environ["PYTHONPATH"]]),
        }
        # Files, for Ray's agents hold a pipe open for half a minute after the driver's end.
        log = Path(tempfile.mkdtemp(dir=self.root.parent))
        with (log / "out").open("w") as out, (log / "err").open("w") as err:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, start_new_session=True, stdout=out, stderr=err
            )
        return Running(process, psutil.Process(process.pid), log)

    @contextmanager
    def running(self, **flags: object) -> Generator[Running]:
        """The build's process; nothing of it is left afterwards."""
        started = self.start(**flags)
        try:
            yield started
        finally:
            started.sweep()

    def run(self, **flags: object) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a build that nobody disturbs from here."""
        with self.running(**flags) as build:
            return build.end()


@dataclass(frozen=True)
class Running:
    """A build that runs."""

    process: subprocess.Popen[bytes]
    driver: psutil.Process
    log: Path

    def end(self) -> tuple[int, str, str]:
        """Wait for it: exit code, stdout and stderr."""
        code = self.process.wait(timeout=PATIENCE)
        return code, (self.log / "out").read_text(), (self.log / "err").read_text()

    def workers(self) -> list[psutil.Process]:
        """Its Ray workers that have a task or wait for one."""
        return [p for p in self._children() if _name(p).startswith(("ray::Map", "ray::IDLE"))]

    def raylet(self) -> psutil.Process:
        """The raylet of its embedded Ray."""
        return next(p for p in self._children() if _name(p).endswith("raylet"))

    def sweep(self) -> None:
        """End what is left of its session."""
        for path in Path("/proc").glob("[0-9]*"):
            try:
                fields = (path / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
                if int(fields[3]) == self.process.pid:
                    os.kill(int(path.name), signal.SIGKILL)
            except (OSError, ValueError):
                continue
        self.process.wait(timeout=PATIENCE)

    def _children(self) -> list[psutil.Process]:
        try:
            return self.driver.children(recursive=True)
        except psutil.NoSuchProcess:
            return []


def _name(process: psutil.Process) -> str:
    try:
        return process.cmdline()[0]
    except (psutil.Error, IndexError):
        return ""


def but_agents(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """All but Ray's agents, which work on nothing and look for their raylet now and then."""
    return [one for one in processes if "Agent" not in _name(one) and "agent" not in _name(one)]


def wait_for(what: str, is_there: Callable[[], object], build: Running) -> None:
    """Wait until something is there, while the build runs."""
    give_up = time.monotonic() + PATIENCE
    while not is_there():
        assert build.process.poll() is None, f"ended before {what}: {build.end()}"
        assert time.monotonic() < give_up, f"never came to {what}"
        time.sleep(0.02)


def named_files(output: Path) -> dict[str, str]:
    """SHA-256 of every file that a dataset's manifest names, and its fingerprint."""
    manifest = json.loads((output / "manifest.json").read_text())
    views = [shard for view in manifest["views"].values() for shard in view["shards"]]
    others = [manifest["selection"], manifest["quarantine"], manifest["inputs"]]
    names = [facts["path"] for facts in (*manifest["tokens"], *views, *others)]
    files = {name: hashlib.sha256((output / name).read_bytes()).hexdigest() for name in names}
    return {**files, "fingerprint": manifest["fingerprint"]}
