"""Heads of Ray's clusters in processes of their own, ended with all that they started."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from ray.util import get_node_ip_address

__all__ = ["PATH", "ROOT", "Head", "Job", "ray_head"]

ROOT = Path(__file__).parents[2]
PATH = [*(ROOT / "packages" / name for name in ("data", "model", "train")), ROOT]
RAY = Path(sys.executable).with_name("ray")
STARTS_WITHIN = 120.0  # seconds
PATIENCE = 240.0  # seconds, with one command
HEAD_ID = "f" * 51 + "00000"  # which Ray's pretended provider of nodes gives the head
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
STEPS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray",
         "worker_start_ray")  # fmt: skip


@dataclass(frozen=True)
class Head:
    """A running Ray head and what a client needs to reach it.

    Attributes:
        address: Of the cluster, for `RAY_ADDRESS`.
        dashboard: Of the server that jobs are submitted to; empty without one.
        environment: Of commands.
    """

    address: str
    dashboard: str
    environment: dict[str, str]

    def ray(self, *command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        """`ray` with a command, ended."""
        return self._ended([str(RAY), *command], cwd)

    def python(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Python with a command, as a driver on the head, ended."""
        return self._ended([sys.executable, *command], ROOT)

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """What the server of jobs answers: to POST with a body, else to GET."""
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = urllib.request.Request(
            f"{self.dashboard}/api/jobs/{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def _ended(self, command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=cwd, env=self.environment, capture_output=True, text=True, check=False,
            timeout=PATIENCE,
        )  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A job that was submitted to a head."""

    head: Head
    name: str

    @staticmethod
    def submit(head: Head, command: Sequence[str], **variables: str) -> Job:
        """A command with the variables of `pipelines/cluster/runtime_env.yaml`, and these."""
        given = yaml.safe_load((ROOT / "pipelines/cluster/runtime_env.yaml").read_text())
        environment = {"env_vars": {**given["env_vars"], **variables}}
        body = {"entrypoint": shlex.join(command), "runtime_env": environment}
        return Job(head, head.ask("", body)["submission_id"])

    def status(self) -> str:
        """Ray's word for where it is."""
        return self.head.ask(self.name)["status"]

    def said(self) -> str:
        """What it printed."""
        return self.head.ask(f"{self.name}/logs")["logs"]

    def stop(self) -> str:
        """`ray job stop`, to its end."""
        done = self.head.ray("job", "stop", "--address", self.head.dashboard, self.name)
        assert done.returncode == 0, done.stdout + done.stderr
        return self.end()

    def end(self) -> str:
        """Its status at its end."""
        give_up = time.monotonic() + PATIENCE
        while (found := self.status()) in {"PENDING", "RUNNING"}:
            assert time.monotonic() < give_up, self.said()
            time.sleep(0.2)
        return found


@contextmanager
def ray_head(
    folder: Path,
    *flags: str,
    dashboard: bool = False,
    node_types: Mapping[str, Mapping[str, Any]] | None = None,
    path: Sequence[Path] = (),
) -> Generator[Head]:
    """A Ray head of our own on free ports, with its own home, token and temporary folder.

    Args:
        folder: An empty one, for home, token and log.
        flags: Further flags of `ray start`.
        dashboard: Whether jobs can be submitted.
        node_types: Those of an autoscaler (version 2) that adds pretended nodes: processes here.
        path: PYTHONPATH of all its processes.
    """
    port, server, client, agent = _free_ports(4)
    (folder / "home").mkdir(parents=True)
    (folder / "token").write_text(secrets.token_hex(32))
    # PYTHONPATH out as well: on a node nothing points at the checkout but the installation
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and k[:4] != "RAY_"}
    environment = inherited | {
        "HOME": str(folder / "home"),
        "PATH": os.pathsep.join([str(RAY.parent), os.environ["PATH"]]),
        "RAY_AUTH_MODE": "token",
        "RAY_memory_monitor_refresh_ms": "0",  # what else runs on this machine is no fault of ours
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        **({"PYTHONPATH": os.pathsep.join(map(str, path))} if path else {}),
    }
    address = f"{get_node_ip_address()}:{port}"
    head = Head(address, f"http://127.0.0.1:{server}", environment | {"RAY_ADDRESS": address})
    scaling: dict[str, str] = {}
    if node_types is not None:
        _write_autoscaler(folder / "autoscaler.yaml", node_types, head.address)
        flags = (*flags, f"--autoscaling-config={folder / 'autoscaler.yaml'}")
        scaling = {
            "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        }  # fmt: skip
    # a short path: Ray puts sockets below it, and a socket's path has 107 bytes at most
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as scratch:
        command = [
            str(RAY), "start", "--head", "--block", "--disable-usage-stats",
            f"--port={port}", f"--temp-dir={scratch}",
            f"--include-dashboard={str(dashboard).lower()}", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={server}", f"--dashboard-agent-listen-port={agent}",
            f"--ray-client-server-port={client}", "--object-store-memory=100000000", *flags,
        ]  # fmt: skip
        log = folder / "head.log"
        with _running(command, environment | scaling, log) as process:
            if dashboard:
                _wait_until_up(f"{head.dashboard}/api/version", process, log)
                # The head's agent runs jobs; it starts later, and a job waits for it 10 s at most.
                healthy = f"http://127.0.0.1:{agent}/api/local_raylet_healthz"
                _wait_until_up(healthy, process, log)
            else:
                _wait_for_nodes(process, log)
            yield head


def _write_autoscaler(
    path: Path, node_types: Mapping[str, Mapping[str, Any]], address: str
) -> None:
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    own = {name: {"node_config": {}, "min_workers": 0, **kind} for name, kind in node_types.items()}
    config = {
        "cluster_name": "pretended", "max_workers": 8, "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5, "head_node_type": "ray.head.default",
        "available_node_types": {"ray.head.default": head, **own},
        "provider": {
            "type": "external", "module": PROVIDER, "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True, "launch_multiple": True, "head_node_id": HEAD_ID,
            "gcs_address": address,
        },
        "auth": {}, "docker": {}, "file_mounts": {}, "cluster_synced_files": [],
        "file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": [],
        **{f"{name}_commands": [] for name in STEPS},
    }  # fmt: skip
    path.write_text(json.dumps(config))


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def _running(
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


def _wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for a server; any HTTP answer will do, since it asks for a token first."""
    deadline = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.3)
    pytest.fail(f"the Ray head did not start:\n{log.read_text(errors='replace')[-3000:]}")


def _wait_for_nodes(process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the head says that it runs."""
    deadline = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < deadline and process.poll() is None:
        if "Ray runtime started." in log.read_text(errors="replace"):
            return
        time.sleep(0.1)
    pytest.fail(f"the Ray head did not start:\n{log.read_text(errors='replace')[-3000:]}")
