"""One build at a time in a folder; a lock whose process is gone is taken over."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lapilli.data.errors import DataError
from lapilli.data.lock import LOCK, only_writer

HOLD = """
import sys
from pathlib import Path
from lapilli.data.lock import only_writer
with only_writer(Path(sys.argv[1]), "built"):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(output: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(output)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_told_who_holds_it_and_a_killed_one_holds_nothing(
    tmp_path: Path,
) -> None:
    output = tmp_path / "out"
    process = holder(output)
    try:
        who = f"process {process.pid} on {socket.gethostname()}"
        said = f"is being built by {who}; wait for it or choose another"
        with pytest.raises(DataError, match=said), only_writer(output, "built"):
            pytest.fail("two builds in one folder")
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    assert (output / LOCK).exists()
    with only_writer(output, "built"):
        assert json.loads((output / LOCK).read_text())["pid"] == os.getpid()


def test_only_what_a_build_writes_is_left(tmp_path: Path) -> None:
    deep = tmp_path / "not" / "there"
    with only_writer(deep, "built"):
        assert deep.is_dir()
    assert not (tmp_path / "not").exists()
    with only_writer(deep, "built"):
        (deep / "shard").write_text("")
    assert [path.name for path in deep.iterdir()] == ["shard"]


@pytest.mark.parametrize("owner", ["this machine, gone", "this machine", "another", "unreadable"])
def test_without_locks_of_the_file_system_the_named_process_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: str
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(timeout=60)
    host = "elsewhere" if owner == "another" else socket.gethostname()
    pid = gone.pid if owner == "this machine, gone" else os.getppid()
    said = json.dumps({"host": host, "pid": pid})
    (tmp_path / LOCK).write_text("{" if owner == "unreadable" else said)
    if owner in ("this machine", "another"):
        said = f"process {pid} on {host}.*remove .*{LOCK}"
        with pytest.raises(DataError, match=said), only_writer(tmp_path, "built"):
            pytest.fail("taken from a process that may live")
    else:
        with only_writer(tmp_path, "built"):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = r"cannot be written .*choose another --output"
    with pytest.raises(DataError, match=said), only_writer(tmp_path / "file" / "out", "built"):
        pytest.fail("a folder below a file")
