"""`ray job stop` and SIGTERM: a run saves, a build keeps its shards, the same command goes on."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from lapilli.train.run_folder.metrics_file import read_metrics
from tests.factories import build_dataset, make_mixture, make_tokenizer
from tests.pipelines import planted
from tests.pipelines.builds import RECIPE, named_files
from tests.pipelines.heads import PATH, Head, Job, ray_head
from tests.train.gang import train_together
from tests.train.small_run import disturbed_run

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

PATIENCE = 240.0  # seconds
STEPS = 30  # of 5 epochs


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """Two cores. All processes have the checkout in their path: uploading it is not in question."""
    folder = tmp_path_factory.mktemp("head")
    (folder / "planted").mkdir()
    shutil.copyfile(planted.__file__, folder / "planted" / "sitecustomize.py")
    path = [folder / "planted", *PATH]
    with ray_head(folder / "ray", "--num-cpus=2", dashboard=True, path=path) as head:
        yield head


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset to train on; images that take a moment each to be decoded, and a recipe."""
    folder = tmp_path_factory.mktemp("material")
    mixture = make_mixture(folder / "raw", images=30, text_only=10)
    build_dataset(mixture, folder / "dataset", make_tokenizer(folder / "tokenizer"))
    for path in (folder / "raw" / "images").rglob("*.*"):
        path.write_bytes(planted.planted_image("slow"))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def building(material: Path, output: str) -> list[str]:
    return [
        sys.executable, "-m", "pipelines.preprocess", f"--config={material / 'recipe.yaml'}",
        f"--root={material / 'raw'}", f"--tokenizer={material / 'tokenizer'}",
        f"--output={material / output}",
    ]  # fmt: skip


def wait_for(what: str, is_there: Callable[[], object], job: Job) -> None:
    """Wait until something is there, while the job runs."""
    give_up = time.monotonic() + PATIENCE
    while not is_there():
        assert job.status() in {"PENDING", "RUNNING"}, job.said()
        assert time.monotonic() < give_up, f"never came to {what}: {job.said()}"
        time.sleep(0.1)


def test_a_stopped_run_saves_and_the_same_command_goes_on(head: Head, material: Path) -> None:
    config = disturbed_run(material)
    (material / "run.yaml").write_text(json.dumps(asdict(config)))
    command = [sys.executable, "-m", "pipelines.train", f"--config={material / 'run.yaml'}"]
    run = Path(config.output)
    job = Job.submit(head, command, PLANTED="slow:0:0.1")
    wait_for("step 3", lambda: len(read_metrics(run)) > 3, job)
    assert job.stop() == "STOPPED"
    (line,) = [line for line in job.said().splitlines() if line.startswith("interrupted; ")]
    step = int(line.removeprefix("interrupted; saved at step ").partition(";")[0])
    assert 3 < step < STEPS
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{step:08d}"]
    again = Job.submit(head, command)
    assert again.end() == "SUCCEEDED", again.said()
    assert f"resumes from step {step}: the steps before it are reused" in again.said()
    together = disturbed_run(material, "together")
    assert train_together(together) == [0, 0]
    found, expected = read_metrics(run), read_metrics(Path(together.output))
    assert [row.step for row in found] == [*range(STEPS)]
    assert [(row.batch, row.loss) for row in found] == [(row.batch, row.loss) for row in expected]


def test_a_stopped_build_keeps_its_shards(head: Head, material: Path) -> None:
    job = Job.submit(head, building(material, "stopped"))
    wait_for("a shard", lambda: [*(material / "stopped").rglob("*.arrow")], job)
    assert job.stop() == "STOPPED"
    assert "interrupted; run the same command again to go on" in job.said()
    kept = {path: path.stat().st_mtime_ns for path in (material / "stopped").rglob("*.arrow")}
    assert kept
    assert not (material / "stopped" / "manifest.json").exists()
    again = Job.submit(head, building(material, "stopped"))
    assert again.end() == "SUCCEEDED", again.said()
    assert f"{len(kept)} reused" in again.said()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    whole = Job.submit(head, building(material, "whole"))
    assert whole.end() == "SUCCEEDED", whole.said()
    assert named_files(material / "stopped") == named_files(material / "whole")
