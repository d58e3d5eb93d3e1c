"""A dataset's and a run's whole life on five machines that share a store and nothing else.

Jobs are submitted from a clone, as `pipelines/cluster/README.md` says. The machines hold the
dependencies alone. What they share is seen at the store: its calls are counted by caller.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.machines import Cluster, bridge, cluster, missing
from tests.factories import build_dataset, make_mixture, make_tokenizer
from tests.object_store import failing_proxy, serve

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.timeout(1800),
]

NUMBER = 41  # of the network
PYTHON = str(Path(sys.executable))
STEPS = 12


@dataclass(frozen=True)
class Life:
    """The cluster, the folder behind its bucket, and the store's calls so far."""

    made: Cluster
    bucket: Path
    calls: list[str]
    local: Path

    def job(self, verb: str, *arguments: str) -> str:
        return self.made.submit("python", "-m", f"pipelines.{verb}", *arguments)


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    """Five machines: a head without cores, two nodes of each pool; the sources in the bucket."""
    folder = tmp_path_factory.mktemp("life")
    bucket, local = folder / "served" / "bucket", folder / "local"
    mixture = make_mixture(local / "raw", images=24, text_only=8)
    tokenizer = make_tokenizer(local / "tokenizer")
    build_dataset(mixture, local / "dataset", tokenizer)
    shutil.copytree(local / "raw", bucket / "raw")
    shutil.copytree(tokenizer, bucket / "tokenizer")
    calls: list[str] = []
    with (
        bridge(NUMBER) as address,
        serve(folder / "served", remembers="1h", address=address) as server,
        failing_proxy(server, lambda _: False, address=address, seen=calls) as (port, _),
        cluster(NUMBER, port) as made,
    ):
        made.start("head", "--num-cpus=0", head=True)
        made.wait(1)
        for name, pool in (("w1", "cpu"), ("w2", "cpu"), ("w3", "accel"), ("w4", "accel")):
            made.start(name, "--num-cpus=1", f"--labels=pool={pool}")
        made.wait(5)
        yield Life(made, bucket, calls, local)


def test_machines_see_nothing_of_each_other(life: Life) -> None:
    assert life.made.on("w1", ["touch", "/scratch/mine", "/dev/shm/mine"]).returncode == 0
    for place in ("/scratch/mine", "/dev/shm/mine"):
        assert life.made.on("w1", ["test", "-e", place]).returncode == 0
        assert life.made.on("w2", ["test", "-e", place]).returncode == 1
    without = life.made.on("w1", [PYTHON, "-c", "import lapilli.data"])
    assert "No module named 'lapilli'" in without.stderr
