"""A run whose dataset and output are addresses: an S3 server holds both, a node its scratch."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from lapilli.data.errors import DataError
from lapilli.data.io.remote_path import RemotePath
from lapilli.train.checkpoint.parts import part_name
from lapilli.train.checkpoint.places import Places
from lapilli.train.config import CheckpointConfig, ProfileConfig, RunConfig
from lapilli.train.errors import TrainError
from lapilli.train.health import step_guard
from lapilli.train.run_folder.metrics_file import read_metrics
from lapilli.train.run_folder.restarts import read_starts
from lapilli.train.run_folder.sample_losses import read_worst
from lapilli.train.run_folder.scratch import in_scratch, lies_in_store, of_store
from lapilli.train.worker.setup import setup
from pipelines.replay import main as replay
from pipelines.train import train
from tests.object_store import failing_proxy, serve, use_endpoint
from tests.train.disturbed import ends
from tests.train.small_run import small_dataset, small_run

RUN, DATA = "s3://bucket/runs/one", "s3://bucket/datasets/small"


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder behind the store, with a dataset in it; scratch and cache lie beside it."""
    folder = tmp_path / "store" / "bucket"
    small_dataset(tmp_path / "made", images=16, text_only=8)
    shutil.copytree(tmp_path / "made" / "dataset", folder / "datasets" / "small")
    monkeypatch.setenv("LAPILLI_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("LAPILLI_CACHE", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with (
        serve(tmp_path / "store", remembers="1h") as server,
        failing_proxy(server, lambda number: False) as (port, _),
        use_endpoint(port),
    ):
        yield folder


def in_store(**values: object) -> RunConfig:
    """Six steps in this process, saved at 2, 4 and 6."""
    settings = {
        "num_workers": 1, "launcher": "process", "checkpoint": CheckpointConfig(every=2), **values,
    }  # fmt: skip
    config = small_run(Path("dataset"), Path("run"), **settings)
    return replace(config, dataset=DATA, output=RUN)


def test_a_run_from_a_bucket_to_a_bucket_is_a_local_one(
    bucket: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local = replace(in_store(), dataset=str(tmp_path / "made" / "dataset"),
                    output=str(tmp_path / "local"))  # fmt: skip
    expected = [row.loss for row in train(local)]
    stored = in_store(profile=ProfileConfig(steps=(1,)))
    assert [row.loss for row in train(stored)] == expected
    run = bucket / "runs" / "one"
    (trace,) = (run / "profile").iterdir()
    assert json.loads(trace.read_text())["traceEvents"]
    assert f'href="profile/{trace.name}"' in (run / "report.html").read_text(encoding="utf-8")
    there = {path.relative_to(run).parts[0] for path in run.rglob("*") if path.is_file()}
    assert there >= {"checkpoints", "config.json", "data", "facts.json", "metrics.jsonl",
                     "report.html", "starts.jsonl"}  # fmt: skip
    assert not list((tmp_path / "empty").iterdir())
    # another machine: nothing of the run is here
    shutil.rmtree(tmp_path / "scratch")
    capsys.readouterr()
    assert [row.loss for row in train(stored)] == expected
    assert f"{RUN}: already finished at step 6" in capsys.readouterr().out


@pytest.mark.usefixtures("bucket")
def test_another_machine_goes_on_and_the_lost_one_is_on_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store hears nothing any more from the moment on at which the checkpoint counts."""
    monkeypatch.setattr("lapilli.data.io.remote_path.ATTEMPTS", 1)
    seen: list[str] = []

    def is_lost(number: int) -> bool:
        before = (call for call in seen[:number] if call.startswith("PUT"))
        return any("/step-00000002/state.json" in call for call in before)

    config = in_store()
    run = Path(in_scratch(config).output)
    port = int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])
    with (
        failing_proxy(port, is_lost, seen=seen) as (proxy, _),
        use_endpoint(proxy),
        pytest.raises(DataError, match="cannot be "),
    ):
        train(config)
    expected = [row.loss for row in read_metrics(run)]
    assert len(expected) == 6
    shutil.rmtree(tmp_path / "scratch")
    assert [row.loss for row in train(config)] == expected
    assert [start.step for start in read_starts(run)] == [0, 2]
    assert {sample.step for sample in read_worst(run)} >= {0, 1}


def test_a_step_that_went_wrong_is_replayed_from_the_store(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fourth(loss: float, norm: float, recent: Sequence[float], factor: float) -> str | None:
        return "planted" if len(recent) == 3 else None

    monkeypatch.setattr(step_guard, "is_wrong", fourth)
    config, place = in_store(), f"{RUN}/replay/step-00000004"
    with pytest.raises(TrainError, match=f"lapilli replay {place} looks for the cause"):
        train(config)
    report = (bucket / "runs" / "one" / "report.html").read_text(encoding="utf-8")
    assert 'href="replay/step-00000004/step.json"' in report
    shutil.rmtree(tmp_path / "scratch")
    capsys.readouterr()
    assert replay([place]) == 0
    seen, found = re.findall(r"loss ([\d.]+)", capsys.readouterr().out)
    assert float(found) == pytest.approx(float(seen), abs=1e-4)


def test_names_of_scratch_folders() -> None:
    config = in_store()
    here = in_scratch(config)
    assert lies_in_store(here)
    assert not lies_in_store(config)
    assert here.checkpoint.upload == RUN
    assert in_scratch(here) == here
    assert of_store(here).output == RUN
    other = in_scratch(replace(config, output="s3://bucket/runs/two/../one"))
    assert other.output != here.output


def test_what_nodes_without_a_shared_folder_cannot_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lapilli.train.worker.setup.fetch_agreed", lambda *_: 0)
    monkeypatch.setattr(
        "lapilli.train.worker.setup.find_places", lambda _: Places(0, leaders=(0, 1))
    )
    monkeypatch.setenv("LAPILLI_SCRATCH", str(tmp_path))
    archived = in_store(
        num_workers=2, launcher="ray", checkpoint=CheckpointConfig(every=2, archive_every=2)
    )
    for config, line in (
        (in_scratch(archived), r"^checkpoint\.archive_every: .* lie on 2 nodes; set 0, and export"),
        (replace(archived, output=str(tmp_path / "run")), r"^output: .*, or an address \(s3://"),
    ):
        with pytest.raises(TrainError, match=line):
            setup(config, "cpu", rank=0, world_size=2)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "lives",
    [pytest.param(1, marks=pytest.mark.faults), pytest.param(2, marks=pytest.mark.long)],
)
def test_two_nodes_that_share_nothing_but_the_store(
    bucket: Path, tmp_path: Path, lives: int
) -> None:
    alone = replace(in_store(), dataset=str(tmp_path / "made" / "dataset"),
                    output=str(tmp_path / "local"))  # fmt: skip
    expected = train(alone)
    run, stored = bucket / "runs" / "one", in_store(num_workers=2, launcher="ray")
    for starts in ([0], [0, 4])[:lives]:
        code, said, errors = ends(stored, cores="0+1+1")
        assert code == 0, errors
        assert "2 workers on 1 host" in said
        found = read_metrics(run)
        assert [row.batch for row in found] == [row.batch for row in expected]
        losses = [row.loss for row in expected]
        assert [row.loss for row in found] == pytest.approx(losses, abs=1e-4)
        assert [one.step for one in read_starts(run)] == starts
        names = {path.name for path in (run / "checkpoints" / "step-00000006").iterdir()}
        assert names == {"state.json", part_name(0, 2), part_name(1, 2)}
        for number in (1, 2):  # each worker wrote its part to a disk of its own
            scratch = tmp_path / f"scratch-{number}" / "runs"
            (part,) = scratch.glob("*/checkpoints/step-00000006/part-*")
            assert part.name in names
        (RemotePath(RUN) / "checkpoints/step-00000006/state.json").unlink()
    assert not list((tmp_path / "empty").iterdir())
