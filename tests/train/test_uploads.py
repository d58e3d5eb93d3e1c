"""Checkpoints at an object store: rclone's S3 server, also where it fails, is cut off or killed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from lapilli.data.errors import DataError
from lapilli.data.io.atomic import sha256_file
from lapilli.data.io.remote_path import RemotePath
from lapilli.train.checkpoint import upload
from lapilli.train.checkpoint.find import find_checkpoints
from lapilli.train.checkpoint.parts import part_name
from lapilli.train.checkpoint.places import Places
from lapilli.train.checkpoint.store import stored_beside
from lapilli.train.checkpoint.upload import Uploads
from lapilli.train.config import CheckpointConfig, RunConfig
from lapilli.train.driver.launching import launch
from lapilli.train.driver.preflight import preflight
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.checkpoint_state import (
    CheckpointFile,
    CheckpointState,
    write_state,
)
from lapilli.train.run_folder.messages import notes_from
from lapilli.train.run_folder.metrics_file import StepMetrics, read_metrics
from pipelines.train import train
from tests.object_store import failing_proxy, serve, use_endpoint
from tests.train.gang import train_together
from tests.train.small_run import small_dataset, small_run
from tests.train.test_saving import started

STORE = "s3://bucket/runs/one"
OTHER_SEED = r"seed: s3://.* started with 42, now 7; .* --checkpoint\.upload"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("uploads"), images=16, text_only=8)


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    folder = tmp_path / "store" / "bucket"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def port(bucket: Path) -> Iterator[int]:
    """An S3 server of its own for each test."""
    with (
        serve(bucket.parent, remembers="1h") as server,
        failing_proxy(server, lambda i: False) as (port, _),
        use_endpoint(port),
    ):
        yield port


def uploaded(
    dataset: Path,
    output: Path,
    *,
    epochs: int = 2,
    every: int = 2,
    keep_last: int = 2,
    archive_every: int = 0,
) -> RunConfig:
    """Six steps in this process, saved at 2, 4 and 6."""
    return small_run(
        dataset,
        output,
        num_workers=1,
        launcher="process",
        epochs=epochs,
        checkpoint=CheckpointConfig(every, keep_last, archive_every, STORE),
    )


def uploading_to(config: RunConfig, address: str) -> RunConfig:
    return replace(config, checkpoint=replace(config.checkpoint, upload=address))


def losses(config: RunConfig) -> list[float]:
    rows = read_metrics(Path(config.output))
    assert [row.step for row in rows] == list(range(6))
    return [row.loss for row in rows]


def run(config: RunConfig) -> list[str]:
    """Run to the end; the lines it said."""
    told: list[str] = []
    launch(preflight(config, told.append), on_note=told.append)
    return told


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.usefixtures("port")
def test_a_store_holds_the_newest_checkpoints_and_every_milestone(
    dataset: Path, tmp_path: Path, bucket: Path
) -> None:
    config = uploaded(dataset, tmp_path / "run", archive_every=3)
    run(config)
    for form in ("checkpoints", "milestones"):
        there = files_below(bucket / "runs" / "one" / form)
        assert there == files_below(Path(config.output) / form)
    steps = [c.step for c in find_checkpoints(bucket / "runs" / "one")]
    assert steps in ([4, 6], [6])  # one that the next overtook is left out
    assert len(list((bucket / "runs" / "one" / "milestones").iterdir())) == 2


@pytest.mark.usefixtures("port")
def test_a_fresh_machine_goes_on_from_the_newest_that_is_whole_at_the_store(
    dataset: Path, tmp_path: Path, bucket: Path
) -> None:
    first = uploaded(dataset, tmp_path / "first", keep_last=3)
    run(first)
    # as if the upload of step 6 had been cut, and an object of step 4 damaged
    there = RemotePath(STORE)
    for step in (2, 4):  # whatever was overtaken
        folder = Path(first.output) / "checkpoints" / f"step-{step:08d}"
        for path in folder.iterdir():
            (there / f"checkpoints/{folder.name}/{path.name}").put(path)
    (there / "checkpoints/step-00000006/state.json").unlink()
    (there / f"checkpoints/step-00000004/{part_name(0, 1)}").put(dataset / "manifest.json")
    fresh = replace(first, output=str(tmp_path / "fresh"))
    told: list[str] = []
    ready = preflight(fresh, told.append)
    assert ready.start == 2
    assert told == [
        f"{STORE}: checkpoints/step-00000006 is cut short or damaged there; passed over",
        f"{STORE}: checkpoints/step-00000004 is cut short or damaged there; passed over",
        f"{STORE}: fetched checkpoints/step-00000002",
    ]
    launch(ready)
    assert losses(fresh) == losses(first)
    whole = {c.step for c in find_checkpoints(bucket / "runs" / "one")}
    assert {2, 6} <= whole
    steps = {p.parent.name for p in (bucket / "runs" / "one" / "checkpoints").rglob("*.*")}
    assert steps == {f"step-{step:08d}" for step in whole}  # nothing cut short is left
    again = replace(first, output=str(tmp_path / "again"))
    assert preflight(again).is_done
    assert losses(again) == losses(first)


@pytest.mark.usefixtures("port")
def test_a_run_is_made_longer_on_a_machine_that_has_only_its_store(
    dataset: Path, tmp_path: Path
) -> None:
    first = uploaded(dataset, tmp_path / "first", epochs=1)
    run(first)
    done = len(read_metrics(Path(first.output)))
    with pytest.raises(TrainError, match=r"^max_steps: 1 makes 1 steps, .* has taken 3; raise it"):
        preflight(replace(first, output=str(tmp_path / "shorter"), max_steps=1))
    longer = replace(first, output=str(tmp_path / "longer"), epochs=2)
    told = run(longer)
    assert told[:2] == [
        f"{STORE}: fetched checkpoints/step-{done:08d}",
        f"epochs: 1 before, now 2: the {done} steps that are taken keep their learning rates, and "
        f"the optimizer its moments; steps {done} to {2 * done - 1} follow the cosine schedule of "
        f"a run of {2 * done} steps",
    ]
    assert losses(longer)[:done] == [row.loss for row in read_metrics(Path(first.output))]
    with pytest.raises(TrainError, match=r"^epochs: 1 makes 3 steps, .* has taken 6; raise it"):
        preflight(replace(first, output=str(tmp_path / "again")))


def made_step(run: Path, step: int, workers: int) -> Path:
    """A step's folder as so many workers leave it; a store's copies are not read."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    files = dict[str, CheckpointFile]()
    for rank in range(workers):
        path = folder / part_name(rank, workers)
        path.write_bytes(bytes([rank]) * (100 + rank))
        files[path.name] = CheckpointFile(100 + rank, sha256_file(path))
    write_state(CheckpointState(step=step, files=files), folder)
    return folder


@pytest.mark.usefixtures("port")
def test_each_worker_copies_its_part_and_the_first_waits_for_all(
    tmp_path: Path, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "POLL", 0.01)
    monkeypatch.setattr(upload, "RETRY", 0.05)
    folder = made_step(tmp_path / "run", 4, 3)
    there = bucket / "runs" / "one" / "checkpoints" / folder.name

    def copy(rank: int, workers: int) -> list[str]:
        place = (rank, workers)
        with Uploads(tmp_path / "run", STORE, keep=2, start=4, rank=place):
            pass
        return sorted(path.name for path in there.iterdir())

    assert copy(1, 2) == [part_name(1, 3)]
    cut = tmp_path / "cut"
    cut.write_bytes(b"cut")  # as of a worker that is still copying
    (RemotePath(STORE) / "checkpoints" / folder.name / part_name(1, 3)).put(cut)
    assert copy(0, 2) == [part_name(rank, 3) for rank in range(3)]
    said, _ = notes_from(tmp_path / "run", 0)
    assert any(f"{part_name(1, 3)} is not there yet" in line for line in said)
    assert any("step-00000004 is not at s3://" in line for line in said)
    copy(1, 2)
    copy(0, 2)
    assert files_below(there) == files_below(folder)


@pytest.mark.usefixtures("port")
def test_a_part_of_a_later_step_is_kept_while_an_earlier_one_is_copied(
    tmp_path: Path, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "POLL", 0.01)
    run = tmp_path / "run"
    earlier, later = made_step(run, 2, 1), made_step(run, 4, 2)
    for start, rank in ((4, (1, 2)), (2, (0, 1))):  # the second worker is ahead of the first
        with Uploads(run, STORE, keep=2, start=start, rank=rank):
            pass
    there = bucket / "runs" / "one" / "checkpoints"
    assert files_below(there / earlier.name) == files_below(earlier)
    assert [path.name for path in (there / later.name).iterdir()] == [part_name(1, 2)]


def test_traces_and_kept_steps_of_two_nodes_are_stored(tmp_path: Path) -> None:
    """Of workers that do not share a folder: each its own, leaders what earlier ones left."""
    store, nodes = tmp_path / "store", [tmp_path / "one", tmp_path / "two"]

    def write(node: int, name: str, text: str) -> None:
        path = nodes[node] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    write(1, "profile/step-00000001-rank-3.json", "of a worker that is no more")
    write(1, "replay/step-00000002/rank-2.npz", "old")
    expected = {}
    for last in (False, True):
        with ExitStack() as running:
            for rank, node in enumerate((0, 1, 1)):
                places = Places(rank, (0, 1), node)
                running.enter_context(Uploads(
                    nodes[node], f"file://{store}", keep=2, start=0, rank=(rank, 3), places=places
                ))  # fmt: skip
            for rank, node in enumerate((0, 1, 1)):
                write(node, f"profile/step-00000005-rank-{rank}.json", f"{rank} {last}")
                write(node, f"replay/step-00000006/rank-{rank}.npz", f"{rank}")
            write(0, "replay/step-00000006/step.json", "{}")
        expected = files_below(nodes[0]) | files_below(nodes[1])
        assert len(expected) == 9
        assert files_below(store) == expected
    assert stored_beside(f"file://{store}") == sorted(expected)


@pytest.mark.faults
@pytest.mark.usefixtures("port")
def test_two_workers_store_a_checkpoint_each_its_part(
    dataset: Path, tmp_path: Path, bucket: Path
) -> None:
    config = replace(uploaded(dataset, tmp_path / "run"), num_workers=2, launcher="ray")
    assert train_together(config) == [0, 0]
    there = files_below(bucket / "runs" / "one" / "checkpoints" / "step-00000006")
    assert there == files_below(Path(config.output) / "checkpoints" / "step-00000006")
    assert {part_name(0, 2), part_name(1, 2)} < there.keys()


@pytest.mark.faults  # for its length
def test_a_store_that_fails_now_and_then_is_tried_again(
    dataset: Path, tmp_path: Path, port: int, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lapilli.data.io.remote_path.FIRST_WAIT", 0.001)
    config = uploaded(dataset, tmp_path / "run")
    with failing_proxy(port, lambda i: i % 3 == 1) as (proxy, failed), use_endpoint(proxy):
        run(config)
    assert failed
    assert [c.step for c in find_checkpoints(bucket / "runs" / "one")][-1] == 6


def test_a_store_that_is_gone_does_not_end_the_run(
    dataset: Path, tmp_path: Path, port: int, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it has not got is copied when the same command is given again."""
    monkeypatch.setattr("lapilli.data.io.remote_path.ATTEMPTS", 1)
    config = uploaded(dataset, tmp_path / "run", archive_every=3)
    is_gone = False
    with failing_proxy(port, lambda i: is_gone) as (proxy, _), use_endpoint(proxy):
        ready = preflight(config)
        told: list[str] = []

        def lose(row: StepMetrics, total: int) -> None:
            nonlocal is_gone
            is_gone = True

        launch(ready, lose, on_note=told.append)
    assert find_checkpoints(Path(config.output))[-1].step == 6
    assert len([line for line in told if "cannot be stored" in line]) == 1  # said once
    assert any(f"checkpoints/step-00000006 is not at {STORE}; it is whole in" in x for x in told)
    assert 6 not in [c.step for c in find_checkpoints(bucket / "runs" / "one")]
    train(config)
    assert [c.step for c in find_checkpoints(bucket / "runs" / "one")][-1] == 6
    milestones = bucket / "runs" / "one" / "milestones"
    assert files_below(milestones) == files_below(Path(config.output) / "milestones")


def test_what_cannot_be_stored_is_said_before_the_first_step(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, port: int
) -> None:
    monkeypatch.setattr("lapilli.data.io.remote_path.ATTEMPTS", 1)
    config = uploaded(dataset, tmp_path / "run")
    with (
        failing_proxy(port, lambda i: True) as (proxy, _),
        use_endpoint(proxy),
        pytest.raises(DataError, match=r"runs/one/.* cannot be .* check address, credentials"),
    ):
        preflight(config)
    run(config)
    with pytest.raises(TrainError, match=OTHER_SEED):
        preflight(replace(config, seed=7, output=str(tmp_path / "other")))
    finished = replace(uploading_to(config, ""), seed=7, output=str(tmp_path / "finished"))
    run(finished)
    with pytest.raises(TrainError, match=OTHER_SEED):
        train(uploading_to(finished, STORE))  # has nothing to do but to copy
    with pytest.raises(TrainError, match="expected an address like s3"):
        uploading_to(config, "bucket/run")


@pytest.mark.faults
@pytest.mark.usefixtures("port")
def test_kills_in_the_middle_of_an_upload(dataset: Path, tmp_path: Path, bucket: Path) -> None:
    """Kill -9 while a step has no state.json at the store; the folder of the run is lost too."""
    whole = uploading_to(uploaded(dataset, tmp_path / "whole"), "")
    started(whole).join()
    config = uploaded(dataset, tmp_path / "run", every=1)
    there = bucket / "runs" / "one" / "checkpoints"
    for seen in (2, 4):
        runner = started(config)
        while runner.is_alive() and not is_uploading(there, seen):
            time.sleep(0.0005)
        assert runner.is_alive()
        runner.kill()
        runner.join()
        shutil.rmtree(config.output)
    last = started(config)
    last.join()
    assert last.exitcode == 0
    assert losses(config) == losses(whole)
    assert find_checkpoints(bucket / "runs" / "one")[-1].step == 6


def is_uploading(there: Path, step: int) -> bool:
    """Whether a step, or a later one, is in part at the store."""
    found = [path for path in there.glob("step-*") if path.name >= f"step-{step:08d}"]
    return any(not (path / "state.json").exists() for path in found)
