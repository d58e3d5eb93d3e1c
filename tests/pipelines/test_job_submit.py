"""`ray job submit` runs the code it uploads, in the driver and in Ray's tasks.

The checkout is installed on this "cluster" of one node, which is where a careless setting goes
wrong: the job runs, with the node's code instead of the uploaded one.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from lapilli.data.text.encode import train_tokenizer

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")
HEAD_STARTS_WITHIN = 90.0  # seconds

# Put at the end of the uploaded lapilli.data: every process that imports it leaves a note.
PLANTED = """
import sys as _sys
from pathlib import Path as _Path

_role = "task" if "default_worker.py" in _sys.argv[0] else "driver"
_Path({notes!r}, _role).write_text(__file__, encoding="utf-8")
"""
RECIPE = """
sources:
  - {name: made_up, annotations: made_up.json, images: images}
template: plain
views:
  square32: {size: 32, fill: [122, 116, 104]}
"""


@dataclass(frozen=True)
class Head:
    """A running Ray head and what a client needs to reach it."""

    address: str
    environment: dict[str, str]


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    """A Ray head of our own on free ports, with its own home folder, token and temporary folder."""
    dashboard, client, agent = free_ports(3)
    (tmp_path / "home").mkdir()
    (tmp_path / "token").write_text(secrets.token_hex(32))
    # PYTHONPATH out as well: on a node nothing points at the checkout but the installation
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and k[:4] != "RAY_"}
    environment = inherited | {
        "HOME": str(tmp_path / "home"),
        "PATH": os.pathsep.join([str(RAY.parent), os.environ["PATH"]]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
    }
    # a short path: Ray puts sockets below it, and a socket's path has 107 bytes at most
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as scratch:
        command = [
            str(RAY), "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2",
            "--node-ip-address=127.0.0.1", "--port=0", f"--temp-dir={scratch}",
            "--include-dashboard=true", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
            f"--ray-client-server-port={client}", "--object-store-memory=100000000",
        ]  # fmt: skip
        with running(command, environment, tmp_path / "head.log") as process:
            address = f"http://127.0.0.1:{dashboard}"
            wait_until_up(f"{address}/api/version", process, tmp_path / "head.log")
            # The head's agent runs jobs; it starts later, and a job waits for it 10 s at most.
            healthy = f"http://127.0.0.1:{agent}/api/local_raylet_healthz"
            wait_until_up(healthy, process, tmp_path / "head.log")
            yield Head(address, environment)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def running(
    command: list[str], environment: dict[str, str], log: Path
) -> Generator[subprocess.Popen[bytes]]:
    """Run `command` and end it with all it started; `ray stop` would end everybody's Ray."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=log.parent,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            # killed, not asked: nothing is worth keeping, and an orderly end takes half a minute
            for each in [process, *psutil.Process(process.pid).children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            process.wait()


def wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for a server; any HTTP answer will do, since it asks for a token first."""
    deadline = time.monotonic() + HEAD_STARTS_WITHIN
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.3)
    pytest.fail(f"the Ray head did not start:\n{log.read_text(errors='replace')[-3000:]}")


@pytest.fixture
def uploaded(tmp_path: Path) -> Path:
    """A copy of the project that says where it is imported, with a recipe of its own."""
    project, notes = tmp_path / "project", tmp_path / "notes"
    notes.mkdir()
    for folder in ("packages", "pipelines"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, project / folder, ignore=ignored)
    with (project / "packages/data/lapilli/data/__init__.py").open("a", encoding="utf-8") as file:
        file.write(PLANTED.format(notes=str(notes)))
    (project / "made_up.yaml").write_text(RECIPE, encoding="utf-8")
    return project


@pytest.fixture
def material(tmp_path: Path) -> Path:
    """Three images with captions, in LLaVA's layout, and a tokenizer."""
    root = tmp_path / "material"
    (root / "images").mkdir(parents=True)
    records: list[dict[str, Any]] = []
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40, 30), colour).save(root / "images" / f"{colour}.png")
        turns = [("human", "<image>"), ("gpt", f"All of it is {colour}.")]
        records.append(
            {
                "id": str(number),
                "image": f"{colour}.png",
                "conversations": [{"from": who, "value": what} for who, what in turns],
            }
        )
    (root / "made_up.json").write_text(json.dumps(records), encoding="utf-8")
    train_tokenizer(["All of it is red."], root / "tokenizer", vocab_size=300)
    return root


@pytest.mark.faults
def test_a_submitted_job_runs_the_uploaded_code(
    head: Head, uploaded: Path, material: Path, tmp_path: Path
) -> None:
    output = tmp_path / "dataset"
    submit = [
        str(RAY), "job", "submit", "--address", head.address, "--working-dir", ".",
        "--runtime-env", "pipelines/cluster/runtime_env.yaml", "--",
    ]  # fmt: skip
    job = [
        "python", "-m", "pipelines.preprocess", "--config", "made_up.yaml", "--root", str(material),
        "--output", str(output), "--tokenizer", str(material / "tokenizer"),
    ]  # fmt: skip
    done = subprocess.run(
        [*submit, *job],
        cwd=uploaded,
        env=head.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((output / "manifest.json").read_text())["counts"]["kept"] == 3
    notes = {note.name: note.read_text() for note in (tmp_path / "notes").iterdir()}
    assert notes.keys() == {"driver", "task"}
    for path in notes.values():
        assert "py_modules" in path
        assert not path.startswith((str(ROOT), str(uploaded)))
