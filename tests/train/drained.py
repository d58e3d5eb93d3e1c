"""A build and a run on nodes of which one is drained and lost: `python -m tests.train.drained DIR`.

Nodes have a core each and the head none, so that two workers are on two nodes. JSON with what was
seen is the last line.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from lapilli.data.building.driver import build
from lapilli.data.cluster.nodes import alive_nodes
from lapilli.data.planning.plan import plan_build
from lapilli.train.driver.launching import launch
from lapilli.train.driver.preflight import preflight
from lapilli.train.run_folder.metrics_file import StepMetrics
from tests.factories import build_config, make_mixture
from tests.train.small_run import disturbed_run

__all__ = ["Nodes"]

STORE = 80_000_000  # bytes
NOTICE = 3.0  # seconds from a node's drain to its end
messages: Any = autoscaler_pb2
runners: Any = importlib.import_module("lapilli.data.building.runners")


class Nodes:
    """A cluster in this process's care."""

    def __init__(self) -> None:
        head = {"num_cpus": 0, "object_store_memory": STORE}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes: list[Any] = []

    def add(self) -> str:
        """The id of a new node."""
        self.nodes.append(self.cluster.add_node(num_cpus=1, object_store_memory=STORE))
        return self.nodes[-1].node_id

    def take_away(self, node_id: str, notice: float) -> str:
        """Drain a node as a cloud does before it takes a spot machine, add another, and kill it."""
        internal: Any = importlib.import_module("ray._raylet")
        client = internal.GcsClient(address=self.cluster.address)
        end = time.time() + notice
        reason = messages.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why = client.drain_node(node_id, reason, "spot", int(end * 1000))
        assert accepted, why
        assert node_id not in {one.node_id for one in alive_nodes()}, "it takes no new work"
        added = self.add()
        time.sleep(max(0.0, end - time.time()))
        node = next(one for one in self.nodes if one.node_id == node_id)
        self.cluster.remove_node(node, allow_graceful=False)
        return added


def build_drained(nodes: Nodes, folder: Path, lost: str) -> dict[str, Any]:
    """Build while a node goes away on which a task is stuck."""
    notes, begin = folder / "notes", runners._run_rows
    notes.mkdir()

    def noted(rows: Any) -> Iterator[Any]:
        here = ray.get_runtime_context().get_node_id()
        (notes / f"{time.time():.3f}-{here}").touch()
        if here == lost:
            time.sleep(1000)
        yield from begin(rows)

    runners._run_rows = noted
    mixture = make_mixture(folder / "raw", images=30, text_only=20)
    config = build_config(mixture, folder / "dataset", folder / "tokenizer", shard_bytes=20_000)
    undisturbed = replace(config, output=str(folder / "undisturbed"))
    build(plan_build(undisturbed), runner=runners.run_here)
    with ThreadPoolExecutor(1) as apart:  # Ray adds nodes in the main thread alone
        building = apart.submit(lambda: build(plan_build(config)))
        while not [*notes.glob(f"*-{lost}")] and not building.done():
            time.sleep(0.05)
        added = nodes.take_away(lost, 1.0)
        report = building.result()
    runners._run_rows = begin
    used = [path.name.partition("-")[2] for path in sorted(notes.iterdir())]
    return {
        "shards": report.shards_built, "tasks": len(used), "on_lost": used.count(lost),
        "on_added": used.count(added),
    }  # fmt: skip


def train_drained(nodes: Nodes, folder: Path, lost: str) -> dict[str, Any]:
    """Train while a worker's node goes away."""
    said: list[str] = []
    begun = threading.Event()
    config = disturbed_run(folder)

    def on_step(row: StepMetrics, total: int) -> None:
        if row.step >= 2 or row.done == total:
            begun.set()

    with ThreadPoolExecutor(1) as apart:
        training = apart.submit(lambda: launch(preflight(config), on_step, on_note=said.append))
        while not begun.wait(0.1) and not training.done():
            pass
        nodes.take_away(lost, NOTICE)
        rows = training.result()
    return {"said": said, "steps": len(rows)}


def main(folder: Path) -> None:
    os.environ.update(
        PLANTED="slow:0:0.1", RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="0.5",
        RAY_memory_monitor_refresh_ms="0",
    )  # fmt: skip
    nodes = Nodes()
    stays, lost = nodes.add(), nodes.add()
    ray.init(nodes.cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        found = {"build": build_drained(nodes, folder, lost)}
        found["train"] = train_drained(nodes, folder, stays)
    finally:
        ray.shutdown()
        nodes.cluster.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
