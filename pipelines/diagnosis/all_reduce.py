"""Time an all-reduce over one process a node, on the CPU's network."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from lapilli.data.cluster.nodes import Node

__all__ = ["all_reduce_rate"]

SIZE = 1 << 24  # bytes
REPEATS = 3
PATIENCE = 60.0  # seconds


def all_reduce_rate(nodes: Sequence[Node]) -> float:
    """Bytes a second on each link, the best of some; 0 for one node.

    Raises:
        Exception: Nodes that cannot reach each other, or have no torch: whatever Ray or torch says.
    """
    if len(nodes) < 2:
        return 0.0
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def on(node: Node, function: Any, *given: Any) -> Any:
        at = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        remote: Any = ray.remote(num_cpus=0, max_retries=0)(function)
        return remote.options(scheduling_strategy=at).remote(*given)

    port = ray.get(on(nodes[0], _free_port), timeout=PATIENCE)
    address = f"tcp://{nodes[0].address}:{port}"
    asked = [on(node, _reduce, address, n, len(nodes)) for n, node in enumerate(nodes)]
    return min(ray.get(asked, timeout=2 * PATIENCE))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def _reduce(address: str, rank: int, world_size: int) -> float:
    import torch
    import torch.distributed as dist

    wait = timedelta(seconds=PATIENCE)
    dist.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=world_size, timeout=wait
    )
    try:
        values, best = torch.zeros(SIZE // 4), 0.0
        for _ in range(REPEATS):
            start = time.monotonic()
            dist.all_reduce(values)
            seconds = time.monotonic() - start
            best = max(best, SIZE * 2 * (world_size - 1) / world_size / seconds)
        return best
    finally:
        dist.destroy_process_group()
