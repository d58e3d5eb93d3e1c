"""A dataset's and a run's whole life on five machines that share a store and nothing else.

Jobs are submitted from a clone, as `pipelines/cluster/README.md` says. The machines hold the
dependencies alone. Who calls the store for what is seen at the store.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

from lapilli.data.io.atomic import sha256_file
from lapilli.data.io.filesystems import open_storage
from lapilli.data.io.lease import leased
from lapilli.data.io.remote_path import RemotePath
from lapilli.data.shards.manifest import read_manifest
from lapilli.train.checkpoint.parts import part_name
from lapilli.train.config import CheckpointConfig
from lapilli.train.run_folder.metrics_file import read_metrics
from lapilli.train.run_folder.restarts import read_starts
from pipelines.evaluate import main as evaluate
from pipelines.export import main as export
from pipelines.preprocess import main as preprocess
from pipelines.train import train
from tests.cluster.machines import Cluster, Machine, bridge, cluster, missing
from tests.factories import make_mixture, make_tokenizer
from tests.object_store import failing_proxy, serve
from tests.pipelines.builds import RECIPE
from tests.train.small_run import small_run

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.timeout(2400),
]

NUMBER = 20 + os.getpid() % 200  # of the network: what another run left is no obstacle
DATASET, RUN = "s3://bucket/dataset", "s3://bucket/runs/one"
PATIENCE = 900.0  # seconds, with a run
ELSEWHERE = "--entrypoint-num-cpus=1"  # the head has none
BUILD = (
    "--config=data.yaml", "--root=s3://bucket/raw", f"--output={DATASET}",
    "--tokenizer=s3://bucket/tokenizer", "--build.label_selector={pool: cpu}",
)  # fmt: skip
TRAIN = (
    "--config=run.yaml", f"--dataset={DATASET}", f"--output={RUN}",
    "--train.label_selector={pool: accel}",
)  # fmt: skip


@dataclass(frozen=True)
class Life:
    """The cluster, the folder behind its bucket, the store's calls, a folder of this machine."""

    made: Cluster
    bucket: Path
    calls: list[str]
    local: Path

    def job(self, verb: str, *arguments: str, flags: tuple[str, ...] = ()) -> str:
        return self.made.submit(job(verb, *arguments), *flags)

    def refused(self, verb: str, *arguments: str) -> str:
        """The one line that a job says, on another machine than the head, before it ends badly."""
        said = self.made.submit(job(verb, *arguments), ELSEWHERE, fails=True)
        assert "Traceback" not in said
        found = {line for line in said.splitlines() if line.startswith("error: ")}
        (line,) = found  # Ray says it again when the job has ended
        return line


def job(verb: str, *arguments: str) -> list[str]:
    return ["python", "-m", f"pipelines.{verb}", *arguments]


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    """Five machines: a head without cores, two nodes of each pool; the sources in the bucket."""
    folder = tmp_path_factory.mktemp("life")
    bucket, local = folder / "served" / "bucket", folder / "local"
    make_mixture(bucket / "raw", images=24, text_only=8)
    make_tokenizer(bucket / "tokenizer")
    local.mkdir()
    calls: list[str] = []
    with (
        bridge(NUMBER) as address,
        serve(folder / "served", remembers="1h", address=address) as server,
        failing_proxy(server, lambda _: False, address=address, seen=calls) as (port, _),
        cluster(NUMBER, port) as made,
    ):
        (made.project / "data.yaml").write_text(RECIPE)
        made.start("head", "--num-cpus=0", head=True)
        made.wait(1)
        for name, pool in (("w1", "cpu"), ("w2", "cpu"), ("w3", "accel"), ("w4", "accel")):
            made.start(name, "--num-cpus=1", f"--labels=pool={pool}")
        made.wait(5)
        yield Life(made, bucket, calls, local)


def test_machines_see_nothing_of_each_other(life: Life) -> None:
    python = life.made.python
    assert life.made.on("w1", ["touch", "/scratch/mine", "/dev/shm/mine"]).returncode == 0
    for place in ("/scratch/mine", "/dev/shm/mine"):
        assert life.made.on("w1", ["test", "-e", place]).returncode == 0
        assert life.made.on("w2", ["test", "-e", place]).returncode == 1
    without = life.made.on("w1", [python, "-c", "import lapilli.data"])
    assert "No module named 'lapilli'" in without.stderr


def test_a_twin_of_another_machine_builds_nothing(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in life.made.environment.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    open_storage.cache_clear()
    with leased(RemotePath(DATASET), "built"):  # by this machine, which is none of theirs
        line = life.refused("preprocess", *BUILD)
    owner = f"is being built by process {os.getpid()} on {socket.gethostname()}; wait for it"
    assert f"output: {DATASET} {owner}" in line
    assert [path for path in (life.bucket / "dataset").rglob("*") if path.is_file()] == []


def test_a_dataset_is_built_from_the_store_into_the_store(life: Life) -> None:
    life.job("preprocess", *BUILD)
    recipe = life.made.project / "data.yaml"
    assert preprocess([
        f"--config={recipe}", f"--root={life.bucket / 'raw'}", f"--output={life.local / 'dataset'}",
        f"--tokenizer={life.bucket / 'tokenizer'}",
    ]) == 0  # fmt: skip
    made = read_manifest(life.local / "dataset")
    shards = [shard.sha256 for shard in made.shards()]
    assert len(shards) >= 4
    stored = read_manifest(life.bucket / "dataset")
    assert [shard.sha256 for shard in stored.shards()] == shards
    assert stored.fingerprint == made.fingerprint
    put = [call for call in life.calls if call.startswith("PUT") and "/images/pad32/" in call]
    callers = {call.split()[-1] for call in put}
    assert callers
    assert callers <= {life.made.machines[name].address for name in ("w1", "w2")}


def test_a_run_loses_rank_zeros_machine_and_goes_on(life: Life) -> None:
    config = small_run(
        Path("dataset"), Path("run"), num_workers=2, epochs=30,
        checkpoint=CheckpointConfig(every=10),
    )  # fmt: skip
    (life.made.project / "run.yaml").write_text(json.dumps(asdict(config)))
    running = life.made.submitting(job("train", *TRAIN))
    first = rank_zeros_machine(life)
    first.kill()
    line = life.refused("train", *TRAIN)
    assert f"output: {RUN} is being trained by process " in line
    assert " on head; wait for it or choose another address" in line
    life.made.start("w5", "--num-cpus=1", "--labels=pool=accel")
    said, _ = running.communicate(timeout=PATIENCE)
    assert running.returncode == 0, said[-6000:]
    run = life.bucket / "runs" / "one"
    starts = [(one.step >= 10, one.reason) for one in read_starts(run)]
    assert starts == [(False, "command"), (True, "restart")]
    alone = replace(
        config, dataset=str(life.local / "dataset"), output=str(life.local / "run"),
        num_workers=1, launcher="process",
    )  # fmt: skip
    expected, found = train(alone), read_metrics(run)
    assert [row.batch for row in found] == [row.batch for row in expected]
    losses = [row.loss for row in expected]
    assert [row.loss for row in found] == pytest.approx(losses, abs=1e-3)
    parts = [call for call in life.calls if call.startswith("PUT") and "/part-" in call]
    trained = {call.split()[-1] for call in parts}  # each stored its own: no folder has them all
    assert trained == {life.made.machines[name].address for name in ("w3", "w4", "w5")}


def test_answers_and_an_export_come_from_other_machines(life: Life) -> None:
    life.job("evaluate", f"--run={RUN}", f"--dataset={DATASET}", "--device=cpu",
             "--output=/scratch/answers.jsonl")  # fmt: skip
    life.job("export", RUN, "--to=hf", "--output=s3://bucket/exports/one", flags=(ELSEWHERE,))
    for name in ("runs/one", "dataset"):
        shutil.copytree(life.bucket / name, life.local / "copied" / name)
    here, answers = life.local / "copied" / "runs" / "one", life.local / "answers.jsonl"
    assert evaluate([f"--run={here}", f"--dataset={life.local / 'copied' / 'dataset'}",
                     "--device=cpu", f"--output={answers}"]) == 0  # fmt: skip
    there = life.made.on("head", ["cat", "/scratch/answers.jsonl"])
    assert there.stdout == answers.read_text()
    assert export([str(here), "--to=hf", f"--output={life.local / 'exported'}"]) == 0
    weights = "model.safetensors"
    assert sha256_file(life.bucket / "exports" / "one" / weights) == sha256_file(
        life.local / "exported" / weights
    )


def rank_zeros_machine(life: Life) -> Machine:
    """The one that stored rank 0's part of the run's first checkpoint, which is complete."""
    give_up = time.monotonic() + PATIENCE
    state = life.bucket / "runs" / "one" / "checkpoints" / "step-00000010" / "state.json"
    while not state.exists():
        assert time.monotonic() < give_up, "no checkpoint in the store"
        time.sleep(0.05)
    by_address = {machine.address: machine for machine in life.made.machines.values()}
    stored = [call for call in life.calls if call.startswith("PUT") and part_name(0, 2) in call]
    (address,) = {call.split()[-1] for call in stored}
    return by_address[address]
