"""Pools: which nodes tasks run on, what they ask of one, and nodes that come later."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from lapilli.data.building.task_memory import PROCESS, task_memory
from lapilli.data.cluster import nodes
from lapilli.data.cluster.nodes import Demand, Node, check_possible, may_have, wait_for_nodes
from lapilli.data.cluster.pool import PoolConfig, matches
from lapilli.data.errors import DataError
from lapilli.data.planning.plan import plan_build
from lapilli.data.planning.shard_task import ImageTask
from lapilli.data.ray_internals import Autoscaler
from tests.factories import build_config, make_mixture, make_tokenizer

GPUS = PoolConfig({"pool": "accel"})


@pytest.mark.parametrize(
    ("selector", "fits"),
    [
        ({}, True),
        ({"pool": "cpu"}, True),
        ({"pool": "accel"}, False),
        ({"pool": "!accel"}, True),
        ({"pool": "!cpu"}, False),
        ({"pool": "in(accel, cpu)"}, True),
        ({"pool": "!in(accel,cpu)"}, False),
        ({"pool": "cpu", "zone": "a"}, False),
        ({"zone": "!a"}, True),
    ],
)
def test_labels_match_as_ray_matches_them(selector: dict[str, str], fits: bool) -> None:
    assert matches({"pool": "cpu"}, selector) is fits


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"memory": -1.0}, "memory: -1.0; expected 0 or more"),
        ({"node_timeout": float("nan")}, "node_timeout: nan; expected 0 or more"),
        ({"resources": {"GPU": -1.0}}, "resources.GPU: -1.0; expected 0 or more"),
        ({"resources": {"memory": 5.0}}, "resources: memory 5.0; set memory beside it, in GiB"),
    ],
)
def test_settings_of_a_pool_that_make_no_sense(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=f"^{said}$"):
        PoolConfig(**wrong)


def test_a_bundle_is_changed_and_added_to() -> None:
    pool = PoolConfig(resources={"CPU": 8, "disk": 1}, memory=2)
    assert pool.bundle(CPU=1, GPU=1) == {"CPU": 8, "GPU": 1, "disk": 1, "memory": float(2 << 30)}
    assert PoolConfig(resources={"CPU": 0}).bundle(CPU=1, GPU=1) == {"GPU": 1}


def node(**resources: float) -> Node:
    labels = {"pool": "accel" if "GPU" in resources else "cpu", "ray.io/node-id": "0"}
    return Node(node_id="0", address="10.0.0.1", resources=resources, labels=labels, is_head=False)


@dataclass
class Cluster:
    """Nodes and an autoscaler that are only told of; a placement group is placed when they fit."""

    there: list[Node] = field(default_factory=list[Node])
    coming: dict[int, list[Node]] = field(default_factory=dict[int, list[Node]])
    refuses: bool = False
    has_autoscaler: bool = True
    now: float = 0.0
    groups: list[str] = field(default_factory=list[str])

    def alive(self, selector: dict[str, str] | None = None) -> list[Node]:
        return [one for one in self.there if matches(one.labels, selector or {})]

    def state(self) -> Autoscaler:
        later = sum(map(len, self.coming.values()))
        refused = frozenset(self.groups) if self.refuses else frozenset[str]()
        return Autoscaler(self.has_autoscaler, 3 + int(self.now), later, refused)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def ask(self, demand: Demand) -> Any:
        cluster, name = self, f"group-{len(self.groups)}"
        self.groups.append(name)

        class Group:
            id = type("Id", (), {"hex": lambda self: name})()

            def wait(self, seconds: float) -> bool:
                cluster.now += seconds
                for at in [at for at in cluster.coming if at <= cluster.now]:
                    cluster.there += cluster.coming.pop(at)
                return nodes.slots(demand) >= demand.workers

        return Group()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster([node(CPU=4)])
    monkeypatch.setattr(nodes, "alive_nodes", made.alive)
    monkeypatch.setattr(nodes, "autoscaler", made.state)
    monkeypatch.setattr(nodes, "_ask", made.ask)
    monkeypatch.setattr(nodes, "_withdraw", lambda group: made.groups.append("withdrawn"))
    monkeypatch.setattr(nodes, "time", made)
    return made


def gpus(workers: int, pool: PoolConfig | None = None) -> Demand:
    return asked(workers, pool or PoolConfig(), CPU=1, GPU=1)


def asked(workers: int, pool: PoolConfig, **bundle: float) -> Demand:
    return Demand(workers=workers, bundle=bundle, pool=pool, setting="num_workers", group="train")


def test_nodes_are_asked_for_and_waited_for_with_a_line_every_30_seconds(cluster: Cluster) -> None:
    cluster.coming = {50: [node(CPU=4, GPU=4)], 70: [node(CPU=4, GPU=4)]}
    said: list[str] = []
    wait_for_nodes(gpus(8), said.append)
    assert said == [
        "waiting for 8 GPUs: 0 there, 2 nodes are coming up",
        "waiting for 8 GPUs: 0 there, 2 nodes are coming up after 30 s",
        "waiting for 8 GPUs: 4 there, 1 node is coming up after 60 s",
    ]
    assert cluster.now == 70
    assert cluster.groups[-1] == "withdrawn"
    wait_for_nodes(gpus(8), said.append)
    assert len(said) == 3, "all are there"


def test_nodes_that_do_not_come_within_the_limit_are_one_line(cluster: Cluster) -> None:
    with pytest.raises(DataError, match=r"2 GPUs were not there within train.node_timeout, 41 s"):
        wait_for_nodes(gpus(2, PoolConfig(node_timeout=40)), lambda line: None)
    assert cluster.groups[-1] == "withdrawn"


@pytest.mark.parametrize("has_autoscaler", [True, False])
def test_a_label_that_no_node_will_have_is_one_line_at_once(
    cluster: Cluster, has_autoscaler: bool
) -> None:
    cluster.has_autoscaler, cluster.refuses = has_autoscaler, True
    why = "its autoscaler has no type of node for it" if has_autoscaler else "no autoscaler adds"
    said = rf"^train.label_selector: {{pool: accel}}; no node has it, and {why}.*have pool=cpu$"
    for ask in (check_possible, lambda demand: wait_for_nodes(demand, lambda line: None)):
        with pytest.raises(DataError, match=said):
            ask(gpus(2, GPUS))
    assert cluster.now < 2


def test_too_few_nodes_are_one_line(cluster: Cluster) -> None:
    cluster.has_autoscaler = False
    with pytest.raises(DataError, match=r"^num_workers: 2; Ray has 0 GPUs; lower it or add nodes$"):
        check_possible(gpus(2))
    wide = asked(3, PoolConfig(), CPU=3)
    cluster.there *= 3
    check_possible(wide)
    wide = asked(4, PoolConfig(), CPU=3)
    said = r"^num_workers: 4; Ray has 9 cores for workers of CPU 3 each; lower it or add nodes$"
    with pytest.raises(DataError, match=said):
        check_possible(wide)


def test_a_resource_that_no_node_has_is_one_line_at_once(cluster: Cluster) -> None:
    cluster.has_autoscaler = False
    cluster.there.append(node(CPU=8, GPU=2))
    said = r"^train.resources: disk 1; no node has it; nodes have at most CPU 8, GPU 2$"
    with pytest.raises(DataError, match=said):
        check_possible(asked(2, PoolConfig(resources={"disk": 1}), CPU=1, disk=1))
    said = r"^train.resources: disk 1; no node with pool: cpu has it; nodes have at most CPU 4$"
    pool = PoolConfig({"pool": "cpu"}, {"disk": 1})
    with pytest.raises(DataError, match=said):
        check_possible(asked(1, pool, CPU=1, disk=1))


def test_what_an_autoscaler_could_add_counts(cluster: Cluster) -> None:
    assert may_have([gpus(1)]) == [False], "no node comes"
    cluster.now, cluster.coming = 0.0, {500: [node(CPU=4, GPU=4)]}
    assert may_have([gpus(1)]) == [True]
    cluster.refuses = True
    assert may_have([gpus(1), asked(1, PoolConfig(), CPU=1)]) == [False, True]


def test_a_task_asks_for_the_memory_of_its_largest_image(tmp_path: Path) -> None:
    mixture = make_mixture(tmp_path / "raw", images=6, text_only=2)
    plan = plan_build(
        build_config(mixture, tmp_path / "ds", make_tokenizer(tmp_path / "tokenizer"))
    )
    small = next(task for task in plan.tasks() if isinstance(task, ImageTask))
    grown = small.images[0].size + 10_000_000
    spec = replace(small.spec, max_pixels=178_956_970)
    first, *rest = small.images
    large = replace(small, spec=spec, images=(replace(first, size=grown), *rest))
    assert PROCESS < task_memory(small) < PROCESS + (32 << 20)
    assert task_memory(large) - task_memory(small) > 600_000_000, "160 million pixels, 4 bytes each"
    bounded = replace(large, spec=replace(spec, max_pixels=1000))
    assert task_memory(bounded) < PROCESS + (128 << 20)


ON_TWO_POOLS = """
import json, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from lapilli.data.building import runners
from lapilli.data.building.driver import build
from lapilli.data.building.task_memory import task_memory
from lapilli.data.cluster.pool import PoolConfig
from lapilli.data.cluster.nodes import alive_nodes
from lapilli.data.cluster.places import check_places, places_of
from lapilli.data.cluster.probe import JobPlaces, Seen
from lapilli.data.errors import DataError
from lapilli.data.planning.plan import plan_build
from tests.factories import build_config, make_mixture

raw, output, tokenizer = map(Path, sys.argv[1:])
mixture = make_mixture(raw, images=6, text_only=2)
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "labels": {"pool": "accel"}})
cluster.add_node(num_cpus=2, labels={"pool": "cpu"})
ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
config = build_config(mixture, output, tokenizer)
(there,) = alive_nodes({"pool": "cpu"})
begin, used = runners._run_rows, output.parent / "nodes"
used.mkdir()

def noted(rows):
    context = ray.get_runtime_context()
    (used / context.get_node_id()).write_text(json.dumps(context.get_assigned_resources()))
    yield from begin(rows)

runners._run_rows = noted
from dataclasses import replace
plan = plan_build(replace(config, build=PoolConfig({"pool": "cpu"})))
report = build(plan)
(asked,) = {path.read_text() for path in used.iterdir()}
memory = [json.loads(asked)["memory"], max(map(task_memory, plan.tasks()))]
said = ""
try:
    build(plan_build(replace(config, output=f"{output}-2", build=PoolConfig({"pool": "none"}))))
except DataError as error:
    said = str(error)
def told(call):
    try:
        call()
    except DataError as error:
        return str(error)

used_only = [path.name for path in used.iterdir()]
here, there_only = PoolConfig(), Seen(str(output.parent / "gone.jpg"), 5)
faults = [
    told(lambda: check_places(places_of({"root": str(raw)}, {}), here, str(output))),
    told(lambda: check_places(JobPlaces({"sources.images": (there_only,)}), here)),
    told(lambda: check_places(JobPlaces(written={"output": "file:///proc/no"}), here)),
]
from pipelines.diagnosis.nodes_table import diagnose_cluster
import os
os.environ["RAY_ADDRESS"] = cluster.address
code = diagnose_cluster(str(output.parent), f"file://{output.parent}/store")
stored = json.loads((output / "config.json").read_text())["build"]
ray.shutdown()
only_there = used_only == [there.node_id]
print(json.dumps([report.shards_built, only_there, said, stored, faults, code, memory]))
"""


def test_two_nodes_with_labels(tmp_path: Path) -> None:
    """A build on the nodes of its pool, places that a node does not see, and doctor's table."""
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    done = subprocess.run(
        [sys.executable, "-c", ON_TWO_POOLS, str(tmp_path / "raw"), str(tmp_path / "ds"),
         str(tokenizer)],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    shards, only_there, said, stored, faults, code, (asked, needed) = json.loads(
        done.stdout.splitlines()[-1]
    )
    assert shards >= 2
    assert only_there
    assert asked == needed > PROCESS, "of Ray, by the largest image of any task"
    assert said == (
        "build.label_selector: {pool: none}; no node has it, and no autoscaler adds one; nodes "
        "have pool=accel, pool=cpu"
    )
    assert stored["label_selector"] == {}, "a dataset is repaired wherever there is a Ray"
    seen_by_both, images, store = faults
    assert seen_by_both is None
    assert "sources.images: " in images
    assert "gone.jpg is not there, as it is for the driver; mount it on every node" in images
    assert images.startswith("node ")
    assert store.startswith("output: file:///proc/no/.probe-")
    assert "cannot be written" in store
    table, rate = done.stdout.splitlines()[:-2], done.stdout.splitlines()[-2]
    assert code == 0, done.stdout
    assert sum(" ok" in line and " ms " in line for line in table) == 2
    assert rate.startswith("all-reduce over 2 nodes (gloo): ")
