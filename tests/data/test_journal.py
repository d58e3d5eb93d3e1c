"""A worker's notes: an attempt that died is explained by the next, or counted."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lapilli.data.building import crash_guard as journal
from lapilli.data.building.crash_guard import MOST_ATTEMPTS, CrashGuard, journal_folder
from lapilli.data.building.decode_child import try_apart
from lapilli.data.errors import DataError
from lapilli.data.images.codecs import resolve_codecs
from lapilli.data.images.view import BadImage, ImageSpec
from lapilli.data.io.remote_path import RemotePath
from lapilli.data.mounts import Located
from lapilli.data.planning.shard_task import ImageTask
from lapilli.data.record import Reason
from tests.factories import CLIP_MEAN, bad_image, image_bytes

NAME = "images/pad32/00000.arrow"


@pytest.fixture
def task(tmp_path: Path) -> ImageTask:
    places: list[Located] = []
    for number, data in enumerate((image_bytes("jpeg"), bad_image("html"), image_bytes("png"))):
        path = tmp_path / f"{number}"
        path.write_bytes(data)
        stat = path.stat()
        places.append(Located(path.name, path.name, stat.st_size, stat.st_mtime_ns))
    spec = ImageSpec(32, CLIP_MEAN)
    return ImageTask(NAME, "", str(tmp_path), tuple(places), spec, resolve_codecs("auto"))


def died_at(folder: Path, row: int) -> None:
    """An attempt whose process ends while it decodes a row."""
    code = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from lapilli.data.building.crash_guard import CrashGuard\n"
        "with CrashGuard(Path(sys.argv[1]), 'x').decoding(int(sys.argv[2])):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder), str(row)], check=False)
    assert done.returncode == -signal.SIGKILL


def suspects(monkeypatch: pytest.MonkeyPatch, outcome: str) -> list[str]:
    """The images that are tried apart from now on, all with this outcome."""
    tried: list[str] = []

    def try_it(task: ImageTask) -> str:
        tried.extend(task.image_ids)
        return outcome

    monkeypatch.setattr(journal, "try_apart", try_it)
    return tried


@pytest.mark.parametrize(("outcome", "said"), [("crash", "ends the process"), ("slow", "300 s")])
def test_the_image_at_which_an_attempt_died_is_tried_and_left_out(
    tmp_path: Path, task: ImageTask, monkeypatch: pytest.MonkeyPatch, outcome: str, said: str
) -> None:
    folder = journal_folder(tmp_path / "out", NAME)
    died_at(folder, 2)
    tried = suspects(monkeypatch, outcome)
    CrashGuard(folder, NAME).examine(task)
    again = CrashGuard(folder, NAME)  # the verdict outlives another attempt
    again.examine(task)
    with pytest.raises(BadImage, match=said) as caught, again.decoding(2):
        pytest.fail("decoded all the same")
    assert caught.value.reason == Reason.DECODER_CRASHED
    with again.decoding(1):
        assert tried == ["2"]
    again.close()
    assert not folder.exists()


def test_an_image_that_is_well_is_tried_once_and_attempts_are_counted(
    tmp_path: Path, task: ImageTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = suspects(monkeypatch, "fine")
    died_at(tmp_path / "notes", 2)
    for _ in range(MOST_ATTEMPTS - 1):
        CrashGuard(tmp_path / "notes", NAME).examine(task)
    assert tried == ["2"]
    with pytest.raises(
        DataError, match=f"{NAME}: .* ended {MOST_ATTEMPTS} times.*lower --num_workers"
    ):
        CrashGuard(tmp_path / "notes", NAME)


def test_an_image_apart_is_decoded_as_in_its_shard(task: ImageTask) -> None:
    assert try_apart(task) == "fine"


@pytest.mark.parametrize(
    ("end", "outcome"),
    [
        ("os.abort()", "crash"),
        ("os._exit(0)", "crash"),
        ("os.kill(os.getpid(), 9)", "fine"),
        ("os.kill(os.getpid(), 14)", "slow"),
        ("os.write(1, b'done\\n'); os.abort()", "fine"),
    ],
)
def test_how_a_process_ended_decides(
    task: ImageTask, monkeypatch: pytest.MonkeyPatch, end: str, outcome: str
) -> None:
    """The suspect's process is real; only what it runs is replaced."""
    real: Any = subprocess.run

    def run(command: list[str], **settings: Any) -> Any:
        del command
        code = f"import os; os.write(1, b'begun\\n'); {end}"
        return real([sys.executable, "-c", code], **settings)

    monkeypatch.setattr(subprocess, "run", run)
    assert try_apart(task) == outcome


def test_of_a_store_each_node_keeps_notes_of_its_own() -> None:
    one, two = (journal_folder(RemotePath(f"s3://bucket/{name}"), NAME) for name in "ab")
    assert one != two
    assert one.is_absolute()
