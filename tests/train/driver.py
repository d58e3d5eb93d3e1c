"""A training run in a process of its own, on a Ray with as many cores as a test needs.

python -m tests.train.driver CORES FLAGS...     1+1: two nodes of a core each
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import ray
from ray.cluster_utils import Cluster

from pipelines.cli.command import run
from pipelines.train import main


def start(cores: list[int]) -> None:
    """One node a number; the driver lives on the first one."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if len(cores) == 1:
        ray.init("local", num_cpus=cores[0], include_dashboard=False, **quiet)
        return
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cores[0]})
    for number, more in enumerate(cores[1:], 1):
        own = {f"LAPILLI_{name}": f"{os.environ[f'LAPILLI_{name}']}-{number}"
               for name in ("SCRATCH", "CACHE") if f"LAPILLI_{name}" in os.environ}  # fmt: skip
        cluster.add_node(num_cpus=more, env_vars=own)  # a disk of its own
    ray.init(cluster.address, **quiet)


def train(cores: str, flags: list[str]) -> int:
    """As `pipelines.train` does it: Ray is left before the last line is said."""
    start([int(number) for number in cores.split("+")])
    try:
        return main(flags)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    run(lambda: train(sys.argv[1], sys.argv[2:]))
