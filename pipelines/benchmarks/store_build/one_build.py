"""One build on Ray nodes of this machine, which are started before the clock is.

python -m pipelines.benchmarks.store_build.one_build NODES CORES RECIPE ROOT TOKENIZER OUTPUT

prints `seconds` of planning and building and `shards` as JSON. Nodes share this machine's disk and
cores: what is measured is calls, latency and the driver's work, not the cores of several machines.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str]) -> None:
    """Start the nodes, build, and print."""
    nodes, cores = int(argv[0]), int(argv[1])
    recipe, root, tokenizer, output = argv[2:]
    from ray.cluster_utils import Cluster

    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cores})
    for _ in range(nodes - 1):
        cluster.add_node(num_cpus=cores)
    cluster.wait_for_nodes()
    os.environ["RAY_ADDRESS"] = str(cluster.address)
    from pipelines.preprocess import main as preprocess

    sys.stdout, told = sys.stderr, sys.stdout
    start = time.perf_counter()
    preprocess([
        f"--config={recipe}", f"--root={root}", f"--tokenizer={tokenizer}", f"--output={output}",
    ])  # fmt: skip
    told.write(json.dumps({"seconds": time.perf_counter() - start}) + "\n")
    told.flush()
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
