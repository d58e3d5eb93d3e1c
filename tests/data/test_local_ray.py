"""A Ray of this machine alone: who can connect to it, and who can read what it writes."""

from __future__ import annotations

import ipaddress
import json
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lapilli.data.errors import DataError
from lapilli.data.local_ray import FOLDER, LEAST_FILES, local_ray

LISTENING = """
import json, os, psutil, ray
from lapilli.data.ray_session import ray_session
with ray_session():
    ray.get(ray.remote(lambda: 0).remote())
    mine = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    print(json.dumps([
        one.laddr.ip for one in psutil.net_connections("inet")
        if one.status == psutil.CONN_LISTEN and one.pid in mine
    ]))
"""


SMALL_SHM = """
import os, sys, warnings, numpy as np, ray
from pathlib import Path
from lapilli.data.ray_session import ray_session
warnings.formatwarning = lambda message, *rest: f"warning: {message}\\n"
print(os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize)
with ray_session():
    large = ray.put(np.ones(200 << 20, np.uint8))
    print(ray.get(ray.remote(lambda array: int(array.sum(dtype="int64"))).remote(large)))
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home and a temporary folder of its own, and the umask that most systems have."""
    for name in ("RAY_TMPDIR", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = os.umask(0o022)
    yield tmp_path / "home"
    os.umask(before)


def rights(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_all_that_listens_is_on_loopback() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", LISTENING], env=environment, capture_output=True, check=True
    )
    found = [ipaddress.ip_address(text) for text in json.loads(done.stdout.splitlines()[-1])]
    assert len(found) > 5  # the object store's, the agents' and the workers'
    mapped = [getattr(address, "ipv4_mapped", None) or address for address in found]
    assert [str(address) for address in mapped if not address.is_loopback] == []


def test_token_and_folder_are_closed_to_others(home: Path) -> None:
    with local_ray() as folder:
        assert folder == home.parent / FOLDER
        assert rights(folder.parent) == 0o700
        token = home / ".ray" / "auth_token"
        assert rights(token) == 0o600
        assert rights(token.parent) == 0o700
        written = token.read_text()
        assert len(bytes.fromhex(written)) == 32
    token.chmod(0o644)
    with local_ray():
        assert (token.read_text(), rights(token)) == (written, 0o600)
    assert [path.name for path in token.parent.iterdir()] == ["auth_token"]


def test_a_folder_that_is_somebody_elses_is_not_used(home: Path) -> None:
    folder = (home.parent / FOLDER).parent
    folder.symlink_to(home.parent)
    with pytest.raises(DataError, match=f"{folder} is no folder of this user's"), local_ray():
        pass


def test_too_few_open_files_are_named_before_ray_starts(home: Path) -> None:
    del home
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        with pytest.raises(DataError, match=f"limit is 256, Ray needs {LEAST_FILES}"), local_ray():
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_what_the_environment_says_of_interfaces_stays(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del home
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    with local_ray():
        assert os.environ["GLOO_SOCKET_IFNAME"] == "eth0"
        assert os.environ["NCCL_SOCKET_IFNAME"] == "lo"
    assert "NCCL_SOCKET_IFNAME" not in os.environ


def test_without_room_in_shared_memory_work_goes_on_and_says_so() -> None:
    """Containers have 64 MB unless they are told otherwise; Ray's store takes much more."""
    mount = "mount -t tmpfs -o size=64m tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("/dev/shm cannot be mounted here; it takes root")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c",
         SMALL_SHM], env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == [str(64 << 20), str(200 << 20)], done.stderr[-2000:]
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert said.startswith("warning: /dev/shm has 64 MiB free, Ray needs 1024 MiB")


@pytest.mark.parametrize(("blocks", "is_said"), [(1 << 18, False), ((1 << 18) - 1, True)])
@pytest.mark.usefixtures("home")
def test_little_shared_memory_is_said(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, blocks: int, is_said: bool
) -> None:
    found = os.statvfs_result((4096, 4096, blocks, blocks, blocks, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: found)
    with local_ray():
        pass
    assert ["/dev/shm" in str(one.message) for one in recwarn] == [True] * is_said
