"""A dataset is built by five machines that share a store and nothing else.

Jobs are submitted from a clone, as `pipelines/cluster/README.md` says. The machines hold the
dependencies alone. Who calls the store for what is seen at the store.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lapilli.data.shards.manifest import read_manifest
from pipelines.preprocess import main as preprocess
from tests.cluster.machines import Cluster, bridge, cluster, missing
from tests.factories import make_mixture, make_tokenizer
from tests.object_store import failing_proxy, serve
from tests.pipelines.builds import RECIPE

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.timeout(2400),
]

NUMBER = 20 + os.getpid() % 200  # of the network: what another run left is no obstacle
DATASET = "s3://bucket/dataset"


@dataclass(frozen=True)
class Life:
    """The cluster, the folder behind its bucket, the store's calls, a folder of this machine."""

    made: Cluster
    bucket: Path
    calls: list[str]
    local: Path

    def job(self, verb: str, *arguments: str) -> str:
        return self.made.submit(["python", "-m", f"pipelines.{verb}", *arguments])


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


def test_a_dataset_is_built_from_the_store_into_the_store(life: Life) -> None:
    life.job(
        "preprocess", "--config=data.yaml", "--root=s3://bucket/raw", f"--output={DATASET}",
        "--tokenizer=s3://bucket/tokenizer", "--build.label_selector={pool: cpu}",
    )  # fmt: skip
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
