"""Pools that scale from zero: Ray's autoscaler with pretended nodes, which are processes here.

The head has no cores. Nodes of the pool `cpu` have two, those of the pool `accel` one and a GPU,
which is a name: training computes on the CPU there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

import pytest

from lapilli.train.run_folder.metrics_file import read_metrics
from tests.factories import Mixture, make_mixture, make_tokenizer
from tests.pipelines.builds import RECIPE
from tests.pipelines.heads import PATH, Head, ray_head
from tests.pipelines.verbs import commands, parted
from tests.train.small_run import small_run

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

SMALL = {"object_store_memory": 80_000_000}
NODE_TYPES = {
    "cpu": {"resources": {"CPU": 2, **SMALL}, "labels": {"pool": "cpu"}, "max_workers": 2},
    "accel": {
        "resources": {"CPU": 1, "GPU": 1, "accel": 1, **SMALL},
        "labels": {"pool": "accel"}, "max_workers": 2,
    },
}  # fmt: skip
COUNTS = """
import json, ray
from lapilli.data.cluster.nodes import alive_nodes
ray.init(log_to_driver=False)
print(json.dumps(sorted(node.labels.get("pool", "") for node in alive_nodes())))
"""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("head")
    with ray_head(folder / "ray", "--num-cpus=0", node_types=NODE_TYPES, path=PATH) as head:
        yield head


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    folder = tmp_path_factory.mktemp("material")
    (folder / "recipe.yaml").write_text(RECIPE)
    make_tokenizer(folder / "tokenizer")
    return make_mixture(folder / "raw", images=30, text_only=10)


def building(mixture: Mixture, *flags: str, output: str = "dataset") -> list[str]:
    folder = mixture.root.parent
    return [
        "preprocess", f"--config={folder / 'recipe.yaml'}", f"--root={mixture.root}",
        f"--tokenizer={folder / 'tokenizer'}", f"--output={folder / output}", *flags,
    ]  # fmt: skip


def training(mixture: Mixture, *flags: str, output: str = "run") -> list[str]:
    folder = mixture.root.parent
    config = small_run(folder / "dataset", folder / output, epochs=1)
    recipe = folder / "run.yaml"
    recipe.write_text(json.dumps(asdict(config)))
    return ["train", f"--config={recipe}", *flags]


def pools(head: Head) -> list[str]:
    """The pools of the nodes that are up; the head's is empty."""
    return json.loads(head.python("-c", COUNTS).stdout.splitlines()[-1])


def test_both_verbs_scale_from_zero(head: Head, mixture: Mixture) -> None:
    assert pools(head) == [""]
    built = head.python(*commands([building(mixture, "--build.label_selector={pool: cpu}")]))
    (said,) = parted(built.stdout)
    assert said[-1] == "exit 0", built.stdout + built.stderr
    assert "infeasible" not in built.stderr
    at_once = pools(head)
    assert at_once[0] == ""
    assert set(at_once[1:]) == {"cpu"}, "no node with a GPU for pixels"
    flags = ["--train.label_selector={pool: accel}", "--train.resources={accel: 1}"]
    trained = head.python(*commands([training(mixture, *flags)]))
    assert trained.returncode == 0, trained.stdout + trained.stderr
    (said,) = parted(trained.stdout)
    assert said[-1] == "exit 0", trained.stdout + trained.stderr
    assert pools(head).count("accel") == 2, "asked for while the run was checked, and waited for"
    rows = read_metrics(mixture.root.parent / "run")
    assert [row.step for row in rows] == [*range(6)]


def test_what_no_node_type_has_is_one_line_before_work(head: Head, mixture: Mixture) -> None:
    no_type = "its autoscaler has no type of node for it"
    label, disk = "label_selector={pool: gpus}", "resources={disk: 1}"
    wrong = {
        f"build.label_selector: {{pool: gpus}}; no node has it, and {no_type}": building(
            mixture, f"--build.{label}", output="none"
        ),
        f"build.resources: disk 1; no node has it, and {no_type}": building(
            mixture, f"--build.{disk}", output="none"
        ),
        f"train.label_selector: {{pool: gpus}}; no node has it, and {no_type}": training(
            mixture, f"--train.{label}", output="none"
        ),
        f"train.resources: disk 1; no node has it, and {no_type}": training(
            mixture, f"--train.{disk}", output="none"
        ),
        "train.resources: GPU 1; workers on device: cpu take none; leave it out, or set "
        "device: cuda": training(mixture, "--train.resources={GPU: 1}", output="none"),
    }
    done = head.python(*commands([*wrong.values()]))
    found = [(said[0].partition("; nodes have")[0], *said[1:]) for said in parted(done.stdout)]
    assert found == [(f"error: {line}", "exit 2") for line in wrong], done.stderr
