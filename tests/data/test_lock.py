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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from lapilli.data.errors import DataError
from lapilli.data.io.writer_lock import LOCK, only_writer

HOLD = """
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from lapilli.data.io.writer_lock import only_writer
with only_writer(Path(sys.argv[1]), "built"):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(output: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(output)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
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


def test_a_lock_of_another_user_tells_who_holds_it_and_is_taken_over_when_it_is_left(
    open_folder: Path, as_nobody: Callable[[], AbstractContextManager[None]]
) -> None:
    """Its file may be read by others and not written."""
    open_folder.chmod(0o777)
    process = holder(open_folder)
    try:
        assert (open_folder / LOCK).stat().st_mode & 0o022 == 0
        who = f"process {process.pid} on {socket.gethostname()}"
        with (
            as_nobody(),
            pytest.raises(DataError, match=f"is being trained by {who}"),
            only_writer(open_folder, "trained"),
        ):
            pytest.fail("two in one folder")
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    assert (open_folder / LOCK).exists()
    with as_nobody(), only_writer(open_folder, "trained"):
        assert json.loads((open_folder / LOCK).read_text())["pid"] == os.getpid()
    assert list(open_folder.iterdir()) == []


def test_a_step_of_a_command_holds_what_the_command_does(tmp_path: Path) -> None:
    """Under another spelling of the path too; another thread is another writer."""
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with only_writer(tmp_path / "out", "trained"):
        with only_writer(tmp_path / "link" / ".", "trained"):
            pass
        assert (tmp_path / "out" / LOCK).exists()
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(only_writer(tmp_path / "out", "trained").__enter__)
            with pytest.raises(DataError, match=f"trained by process {os.getpid()} on"):
                asked.result()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["file", "folder", "nothing"])
def test_a_lock_beside_leaves_the_output_as_it_is(tmp_path: Path, kind: str) -> None:
    output = tmp_path / "new" / "out"
    if kind != "nothing":
        output.parent.mkdir()
        (output.touch if kind == "file" else output.mkdir)()
    with only_writer(output, "written", beside=True):
        assert (output.parent / ".out.lock").exists()
        assert output.exists() == (kind != "nothing")
        with (
            ThreadPoolExecutor(1) as pool,
            pytest.raises(DataError, match=f"output: {output} is being written by process"),
        ):
            pool.submit(only_writer(output, "written", beside=True).__enter__).result()
    assert (tmp_path / "new").exists() == (kind != "nothing")
    assert not (output.parent / ".out.lock").exists()
