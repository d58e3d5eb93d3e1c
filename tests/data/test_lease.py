"""Leases on prefixes of a store: twins, killed owners, paused owners, two that take one at once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lapilli.data.errors import DataError
from lapilli.data.io import lease
from lapilli.data.io.lease import LEASE, Lease, leased
from lapilli.data.io.remote_path import RemotePath
from lapilli.data.io.writer_lock import only_writer
from tests.object_store import failing_proxy, serve, use_endpoint

HOLD = """
import sys
from lapilli.data.errors import DataError
from lapilli.data.io import lease
from lapilli.data.io.remote_path import RemotePath
lease.RENEW_EVERY = 0.3
try:
    with lease.leased(RemotePath(sys.argv[1]), "built"):
        print("held", flush=True)
        sys.stdin.read()
except DataError as error:
    print(error, flush=True)
    sys.exit(2)
"""


@pytest.fixture(params=["file", "s3"])
def prefix(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RemotePath]:
    """A prefix where a lease is made by one call, and one where it is not."""
    if request.param == "file":
        yield RemotePath(f"file://{tmp_path}/store/out")
        return
    (tmp_path / "bucket").mkdir()
    with (
        serve(tmp_path, remembers="1h") as server,
        failing_proxy(server, lambda number: False) as (port, _),
        use_endpoint(port),
    ):
        yield RemotePath("s3://bucket/out")


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("RENEW_EVERY", 0.3), ("EXPIRES", 2.0), ("LOOK_EVERY", 0.05)):
        monkeypatch.setattr(lease, name, seconds)


def holder(prefix: RemotePath) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(prefix)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def of(host: str, **changes: object) -> Lease:
    own = Lease(host=host, pid=1, token="0", renewals=0, time=time.time())
    return replace(own, **changes)  # pyright: ignore[reportArgumentType]


def put(prefix: RemotePath, found: Lease) -> None:
    (prefix / LEASE).write_bytes(json.dumps(asdict(found)).encode())


def test_a_twin_is_told_who_holds_it_and_a_killed_owner_holds_nothing(prefix: RemotePath) -> None:
    process = holder(prefix)
    try:
        said = rf"^output: {prefix} is being built by process {process.pid} on .+; wait for it"
        with pytest.raises(DataError, match=said), only_writer(prefix, "built"):
            pytest.fail("two at once")
        process.send_signal(signal.SIGKILL)
        process.wait()
        start = time.monotonic()
        with only_writer(prefix, "built"), only_writer(prefix, "built"):
            assert time.monotonic() - start < 1.9, "a process of this machine: its end is known"
            assert (prefix / LEASE).exists()
        assert not (prefix / LEASE).exists()
    finally:
        process.kill()
        process.communicate()


def test_a_paused_owner_loses_its_lease_and_ends(prefix: RemotePath) -> None:
    process = holder(prefix)
    try:
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.2)
        with ExitStack() as held:
            with pytest.warns(UserWarning, match="does not renew its lease"):
                held.enter_context(leased(prefix, "built"))
            process.send_signal(signal.SIGCONT)
            said, _ = process.communicate(timeout=60)
            assert process.returncode == 2
            assert "was taken over by another process" in said
            assert (prefix / LEASE).exists(), "the lease is the other's"
    finally:
        process.kill()


def test_a_lease_of_another_machine_expires_and_a_renewed_one_does_not(
    prefix: RemotePath,
) -> None:
    put(prefix, of("elsewhere"))
    start = time.monotonic()
    with pytest.warns(UserWarning, match="process 1 on elsewhere"), leased(prefix, "built"):
        assert time.monotonic() - start > 2.0
    put(prefix, of("elsewhere", time=time.time() - 2 * lease.LONG_GONE))
    start = time.monotonic()
    with leased(prefix, "built"):
        assert time.monotonic() - start < 1.9
    put(prefix, of("elsewhere"))
    other = threading.Timer(0.3, put, (prefix, of("elsewhere", renewals=1)))
    other.start()
    with pytest.raises(DataError, match="by process 1 on elsewhere"), leased(prefix, "trained"):
        pytest.fail("its owner lives")
    other.join()


def test_one_of_two_that_take_a_free_lease_at_once_has_it(prefix: RemotePath) -> None:
    ready, ended, found = threading.Barrier(2), threading.Barrier(2), list[str]()

    def take() -> None:
        ready.wait(30)
        try:
            with leased(prefix, "built"):
                found.append("held")
                ended.wait(30)
        except DataError as error:
            found.append(str(error))
            ended.wait(30)

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found)[0] == "held"
    assert f"by process {os.getpid()} on" in sorted(found)[1]


def test_an_object_that_is_no_lease_expires_like_one(prefix: RemotePath) -> None:
    (prefix / LEASE).write_bytes(b"[1, 2")
    with (
        pytest.warns(UserWarning, match="by process 0 on an unknown machine"),
        leased(prefix, "built"),
    ):
        pass
    assert not (prefix / LEASE).exists()


def test_what_this_process_could_not_remove_does_not_hold_it(prefix: RemotePath) -> None:
    """As after a build whose store failed and came back."""
    put(prefix, replace(of(socket.gethostname()), pid=os.getpid()))
    start = time.monotonic()
    with leased(prefix, "built"):
        assert time.monotonic() - start < 1.9
