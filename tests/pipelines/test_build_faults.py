"""A build disturbed for real: the same bytes as an undisturbed one, or one line that says why not.

Every build here is the command in processes of its own, with a Ray of its own.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from tests.factories import conversation, make_mixture, make_tokenizer
from tests.pipelines import planted
from tests.pipelines.builds import Build, but_agents, named_files, wait_for

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
IMAGES = 150
WITHIN = 60.0  # seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    make_mixture(folder / "root", images=IMAGES, defects=True)
    make_tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> dict[str, str]:
    build = Build(folder / "root", folder / "tokenizer", folder / "undisturbed")
    code, _, err = build.run()
    assert code == 0, err
    return named_files(build.output)


@pytest.fixture
def build(folder: Path, tmp_path: Path) -> Build:
    return Build(folder / "root", folder / "tokenizer", tmp_path / "out")


def shards(build: Build) -> int:
    return len(list(build.output.rglob("*.arrow")))


def one_line(ended: tuple[int, str, str]) -> str:
    """What a build that stopped for something that can be mended says on stderr."""
    code, _, err = ended
    assert code == 2, err
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


def is_clean(build: Build) -> bool:
    """Whether nothing is left that only a running build needs."""
    return not list(build.output.rglob(".*"))


# ---- processes that end ------------------------------------------------------------------------


def test_workers_killed_at_random_moments_change_nothing(
    build: Build, undisturbed: dict[str, str]
) -> None:
    chance = random.Random(0)
    killed = 0
    with build.running() as running:
        wait_for("a shard", lambda: shards(build) > 0, running)
        for _ in range(5):
            wait_for("a worker", running.workers, running)
            time.sleep(chance.uniform(0, 0.2))
            if not (workers := running.workers()) or running.process.poll() is not None:
                break
            with contextlib.suppress(psutil.NoSuchProcess):
                chance.choice(workers).kill()
                killed += 1
        code, _, err = running.end()
    assert code == 0, err
    assert killed >= 2
    assert named_files(build.output) == undisturbed
    assert is_clean(build)


def test_a_killed_driver_leaves_what_is_finished_and_its_lock_is_taken_over(
    build: Build, undisturbed: dict[str, str]
) -> None:
    with build.running() as running:
        wait_for("some shards", lambda: shards(build) > 5, running)
        running.driver.suspend()  # it would end before a second one has started
        said = one_line(build.run())
        assert f"is being built by process {running.process.pid} on " in said
        assert "choose another --output" in said
        assert running.workers()
        left = but_agents(running.driver.children(recursive=True))
        running.driver.kill()
        _, alive = psutil.wait_procs(left, timeout=WITHIN)
        assert alive == []
    assert (build.output / ".lock").exists()
    finished = shards(build)
    assert finished < len(undisturbed) - 4
    code, out, err = build.run()
    assert code == 0, err
    reused = int(out.partition(" reused")[0].split()[-1])
    assert 0 < reused <= finished
    assert named_files(build.output) == undisturbed
    assert is_clean(build)


def test_a_dead_raylet_is_one_line_and_no_hang(build: Build, undisturbed: dict[str, str]) -> None:
    with build.running() as running:
        wait_for("a shard", lambda: shards(build) > 0, running)
        running.raylet().kill()
        said = one_line(running.end())
    assert "Ray has died" in said
    assert "run the same command again, it continues with the" in said
    code, _, err = build.run()
    assert code == 0, err
    assert named_files(build.output) == undisturbed


# ---- images that end processes -----------------------------------------------------------------


def plant(folder: Path, images: dict[str, str]) -> Build:
    """A mixture of a few good images and these, and processes that cannot stand them."""
    mixture = make_mixture(folder / "root", images=8, text_only=1)
    records = json.loads((mixture.root / "mixture.json").read_text())
    for number, (name, what) in enumerate(images.items()):
        (mixture.root / "images" / name).write_bytes(planted.planted_image(what))
        records.insert(2 * number, conversation(name, name))
    (mixture.root / "mixture.json").write_text(json.dumps(records))
    make_tokenizer(folder / "tokenizer")
    (folder / "planted").mkdir()
    shutil.copyfile(planted.__file__, folder / "planted" / "sitecustomize.py")
    return Build(mixture.root, folder / "tokenizer", folder / "out", folder / "planted")


def test_an_image_that_ends_its_process_is_quarantined_and_nothing_else_is(tmp_path: Path) -> None:
    kinds = {"a.x": "segv", "c.x": "exit", "d.x": "hang", "e.x": "once", "f.x": ""}
    build = plant(tmp_path, kinds)
    code, _, err = build.run()
    assert code == 0, err
    assert (tmp_path / "planted" / "fired").exists()  # killed from outside once: not the image
    rows = pq.read_table(build.output / "quarantine.parquet").to_pylist()
    assert {row["record_id"]: row["reason"] for row in rows} == dict.fromkeys(
        ["a.x", "c.x", "d.x"], "decoder_crashed"
    )
    assert {"300 s" in row["detail"] for row in rows if row["record_id"] == "d.x"} == {True}
    assert is_clean(build)
    again = replace(build, output=tmp_path / "again")
    code, _, err = again.run(num_workers=1)
    assert code == 0, err
    assert named_files(again.output) == named_files(build.output)


def test_a_task_whose_process_always_ends_stops_the_build(tmp_path: Path) -> None:
    """Killed from outside each time: no image is to blame, and it is not tried for ever."""
    build = plant(tmp_path, {"a.x": "kill"})
    said = one_line(build.run())
    assert "has ended 10 times, the last time at row " in said
    assert "memory is short: lower --num_workers" in said


# ---- disks and libraries -----------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_the_build_goes_on_when_there_is_room(
    build: Build, undisturbed: dict[str, str], tiny_disk: Path
) -> None:
    build = replace(build, output=tiny_disk / "out")
    filler = tiny_disk / "filler"
    with build.running() as running:
        wait_for("a shard", lambda: shards(build) > 0, running)
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        said = one_line(running.end())
    assert "free space" in said
    filler.unlink()
    code, _, err = build.run()
    assert code == 0, err
    assert named_files(build.output) == undisturbed


def test_a_worker_with_another_resizer_is_one_line(build: Build, tmp_path: Path) -> None:
    """Only the workers have it, as on a node that was set up otherwise."""
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "sitecustomize.py").write_text(
        "import sys\n"
        "if any('default_worker' in argument for argument in sys.orig_argv):\n"
        "    import PIL.Image\n"
        "    PIL.__version__ = '1.2.3'\n"
    )
    said = one_line(replace(build, planted=tmp_path / "planted").run())
    assert "this worker has" in said
    assert "pillow 1.2.3" in said
    assert "install the same versions on every node" in said
