"""Machines on one: each has an address, processes, `/dev/shm` and files of its own.

A machine is a network, process and mount namespace with an overlay over this machine's files, so
nothing that it writes is seen by another. The checkout, lapilli's metadata and the folder of the
test are hidden: it holds the dependencies and nothing else, as a node's image does. Root and
iproute2 are needed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.object_store import KEY, SECRET

__all__ = ["Cluster", "Machine", "bridge", "cluster", "missing"]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
STARTS_WITHIN = 180.0  # seconds
PATIENCE = 600.0  # seconds, with one command
INSIDE = r"""
set -e
base=$1 name=$2 packages=$3 hosts=$4; shift 4
hostname "$name"
mount --make-rprivate /
mount -t overlay overlay -o lowerdir=/,upperdir="$base/up",workdir="$base/work" "$base/root"
root=$base/root
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o size=700m tmpfs "$root/dev/shm"
mount --rbind /sys "$root/sys"
printf '%b' "$hosts" > "$root/etc/hosts"
rm -rf "$root$packages"/*lapilli*
for hidden in $HIDDEN /root/.cache; do
    mkdir -p "$root$hidden"
    mount -t tmpfs -o size=64m tmpfs "$root$hidden"
done
mkdir -p "$root/scratch"
exec chroot "$root" /bin/bash -c 'cd /scratch; exec "$@"' _ "$@"
"""


def missing() -> str:
    """What this machine lacks for making others; empty where nothing does."""
    if os.geteuid():
        return "network and mount namespaces take root"
    absent = [name for name in ("ip", "unshare", "nsenter", "mount") if not shutil.which(name)]
    return f"{', '.join(absent)} not installed" if absent else ""


@dataclass
class Machine:
    """One that runs."""

    name: str
    address: str
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """Take its power away: all of its processes end at once."""
        with suppress(psutil.NoSuchProcess):
            psutil.Process(self.process.pid).kill()
        self.process.wait()


@dataclass
class Cluster:
    """Machines on a bridge of their own, and the store that is all they share.

    Attributes:
        folder: What the machines write, a folder each; and their logs.
        number: Of the network, 10.78.NUMBER.0/24; this machine is .254 there.
        store: Port of an S3 server that listens on this machine's address there.
        project: The clone that jobs are submitted from.
    """

    folder: Path
    number: int
    store: int
    project: Path
    machines: dict[str, Machine] = field(default_factory=dict[str, Machine])

    @property
    def gateway(self) -> str:
        """This machine's address on the bridge."""
        return f"10.78.{self.number}.254"

    @property
    def python(self) -> str:
        """The interpreter of a machine."""
        return str(BIN / "python")

    @property
    def environment(self) -> dict[str, str]:
        """Of every process on a machine: nothing of the test's own."""
        return {
            "HOME": "/root", "PATH": f"{BIN}:/usr/bin:/bin:/usr/sbin:/sbin", "LANG": "C.UTF-8",
            "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1", "AWS_ENDPOINT_URL": f"http://{self.gateway}:{self.store}",
            "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip

    def start(self, name: str, *arguments: str, head: bool = False) -> Machine:
        """Start a machine with a Ray node on it."""
        host = len(self.machines) + 1
        address = f"10.78.{self.number}.{host}"
        space = f"lap{self.number}x{host}"
        for command in (
            f"netns add {space}",
            f"link add lv{self.number}x{host} type veth peer name lw{self.number}x{host}",
            f"link set lv{self.number}x{host} master lapbr{self.number} up",
            f"link set lw{self.number}x{host} netns {space}",
            f"-n {space} addr add {address}/24 dev lw{self.number}x{host}",
            f"-n {space} link set lw{self.number}x{host} up",
            f"-n {space} link set lo up",
        ):
            _ip(command)
        where = ["--head", "--port=6379", "--dashboard-host=0.0.0.0", "--include-dashboard=true"]
        if not head:
            where = [f"--address={self.machines['head'].address}:6379"]
        ray = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", *where,
               f"--node-ip-address={address}", "--object-store-memory=100000000",
               *arguments]  # fmt: skip
        machine = Machine(name, address, self._process(name, address, space, ray))
        self.machines[name] = machine
        return machine

    def _process(
        self, name: str, address: str, space: str, command: Sequence[str]
    ) -> subprocess.Popen[bytes]:
        base = self.folder / name
        for part in ("up", "work", "root"):
            (base / part).mkdir(parents=True)
        packages = Path(psutil.__file__).parents[1]
        # gloo listens where a machine finds its own name
        hosts = f"127.0.0.1 localhost\\n{self.gateway} store\\n{address} {name}\\n"
        hidden = [*(ROOT / part for part in ("packages", "pipelines", "tests")), self.folder.parent]
        environment = {**self.environment, "HIDDEN": " ".join(map(str, hidden))}
        inside = ["ip", "netns", "exec", space, "unshare", "-m", "-u", "-i", "-p", "-f",
                  "--kill-child", "bash", "-c", INSIDE, "_", str(base), name, str(packages), hosts,
                  *command]  # fmt: skip
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                inside, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def wait(self, nodes: int) -> None:
        """Wait until Ray knows so many nodes."""
        give_up = time.monotonic() + STARTS_WITHIN
        while time.monotonic() < give_up:
            if any(machine.process.poll() is not None for machine in self.machines.values()):
                break
            with suppress(OSError):
                with urllib.request.urlopen(f"{self.dashboard}/nodes?view=summary") as reply:
                    found = json.load(reply)["data"]["summary"]
                if sum(node["raylet"].get("state") == "ALIVE" for node in found) == nodes:
                    return
            time.sleep(1)
        logs = {
            log.name: log.read_text(errors="replace")[-800:] for log in self.folder.glob("*.log")
        }
        raise AssertionError(f"Ray does not know {nodes} nodes: {logs}")

    @property
    def dashboard(self) -> str:
        """Where jobs are submitted to."""
        return f"http://{self.machines['head'].address}:8265"

    def on(
        self, name: str, command: Sequence[str], **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a machine."""
        first = psutil.Process(self.machines[name].process.pid).children()[0].pid
        inside = ["nsenter", "-t", str(first), "-m", "-n", "-u", "-i", "-p", "-r", "-w", *command]
        return subprocess.run(
            inside, env={**self.environment, **variables}, capture_output=True, text=True,
            stdin=subprocess.DEVNULL, timeout=PATIENCE, check=False,
        )  # fmt: skip

    def submitting(self, job: Sequence[str], *flags: str) -> subprocess.Popen[str]:
        """`ray job submit` from the clone; the process that waits for the job's end."""
        command = [str(BIN / "ray"), "job", "submit", "--address", self.dashboard, "--working-dir",
                   ".", "--runtime-env", "pipelines/cluster/runtime_env.yaml", *flags, "--",
                   *job]  # fmt: skip
        return subprocess.Popen(
            command, cwd=self.project, env=_outside(), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def submit(self, job: Sequence[str], *flags: str, fails: bool = False) -> str:
        """Submit a job, wait for its end, and return what it said.

        Raises:
            AssertionError: It did not end as it was to: well, or with `fails` badly.
        """
        process = self.submitting(job, *flags)
        said, _ = process.communicate(timeout=PATIENCE)
        assert (process.returncode != 0) == fails, said[-6000:]
        return said


def _outside() -> Mapping[str, str]:
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and k[:4] != "RAY_"}
    return {**kept, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


@contextmanager
def cluster(number: int, store: int) -> Generator[Cluster]:
    """A bridge, and a clone to submit from; no machine yet, and none afterwards.

    Args:
        number: Of the network.
        store: Port of the S3 server, which listens at `10.78.NUMBER.254`.
    """
    with ExitStack() as ends:
        # a short path: Ray puts sockets below it, 107 bytes at most
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory(dir="/tmp", prefix="lap")))
        (folder / "nodes").mkdir()
        project = folder / "project"
        for part in ("packages", "pipelines"):
            shutil.copytree(
                ROOT / part, project / part, ignore=shutil.ignore_patterns("__pycache__")
            )
        made = Cluster(folder / "nodes", number, store, project)
        ends.callback(_remove_spaces, made)
        ends.callback(lambda: [machine.kill() for machine in made.machines.values()])
        yield made


@contextmanager
def bridge(number: int) -> Generator[str]:
    """The bridge of a network; yields this machine's address on it."""
    name, address = f"lapbr{number}", f"10.78.{number}.254"
    _ip(f"link add {name} type bridge")
    try:
        _ip(f"addr add {address}/24 dev {name}")
        _ip(f"link set {name} up")
        yield address
    finally:
        _ip(f"link del {name}")


def _remove_spaces(made: Cluster) -> None:
    for host in range(1, len(made.machines) + 1):
        _ip(f"netns del lap{made.number}x{host}")


def _ip(arguments: str) -> None:
    done = subprocess.run(["ip", *arguments.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {arguments}: {done.stderr}"
