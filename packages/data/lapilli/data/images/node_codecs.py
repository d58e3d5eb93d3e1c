"""Choose an image resizer that every node of the cluster has."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lapilli.data.errors import DataError
from lapilli.data.images.codecs import Codecs, available_codecs, resolve_codecs
from lapilli.data.ray_session import ray_session

__all__ = ["ask_nodes", "choose_common", "resolve_for_nodes"]

ANSWER_WITHIN = 120.0  # seconds; a node may have to unpack a job's files first


def resolve_for_nodes(wanted: Literal["auto", "pillow", "simd", "torch"]) -> Codecs:
    """As `resolve_codecs`; `auto` is the first resizer that all nodes have in one version.

    The nodes of the cluster that `RAY_ADDRESS` names are asked, those with CPUs for tasks. Without
    it, a build runs on this machine alone.

    Raises:
        DataError: Nodes have no resizer in common, or one does not answer.
    """
    if wanted != "auto" or "RAY_ADDRESS" not in os.environ:
        return resolve_codecs(wanted)
    return choose_common(ask_nodes())


def choose_common(by_node: Mapping[str, Sequence[Codecs]]) -> Codecs:
    """The first of one node's codecs that all other nodes have too.

    Args:
        by_node: What each node can use, the preferred first.

    Raises:
        DataError: There is none; names what each node has.
    """
    first, *others = by_node.values()
    for codecs in first:
        if all(codecs in other for other in others):
            return codecs
    have = "; ".join(
        f"{node}: {', '.join(codecs.describe() for codecs in found)}"
        for node, found in sorted(by_node.items())
    )
    raise DataError(
        f"resizer: auto found none that all nodes have in one version ({have}); install the same "
        "versions on every node"
    )


def ask_nodes() -> dict[str, list[Codecs]]:
    """What each node with CPUs can use, the preferred first, by address and a number.

    Raises:
        DataError: A node does not answer.
    """
    with ray_session():
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        remote: Any = ray.remote(available_codecs)
        asked: dict[Any, str] = {}  # tasks, with the node's address and a number
        for node in ray.nodes():
            if node["Alive"] and node["Resources"].get("CPU"):
                at = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                task = remote.options(num_cpus=0, scheduling_strategy=at).remote()
                asked[task] = f"{node['NodeManagerAddress']}/{len(asked)}"
        if not asked:
            return {"driver": available_codecs()}
        ready, late = ray.wait([*asked], num_returns=len(asked), timeout=ANSWER_WITHIN)
        if late:
            raise DataError(
                f"resizer: node {asked[late[0]]} did not answer within {ANSWER_WITHIN:.0f} s; see "
                "that it is up, or set resizer: pillow"
            )
        found = ray.get(ready)
        return {
            f"{asked[task]}/{n}": codecs
            for n, (task, codecs) in enumerate(zip(ready, found, strict=True))
        }
