"""Probe every node of a cluster and print a table."""

from __future__ import annotations

import os
import time

from rich import box
from rich.table import Table

from lapilli.data.cluster.nodes import Node, alive_nodes
from lapilli.data.cluster.places import fault_of, places_of, probe_nodes, shared_token
from lapilli.data.cluster.probe import JobPlaces, NodeReport, node_versions
from lapilli.data.errors import DataError
from lapilli.data.io.printable import bytes_text
from lapilli.data.ray_session import ray_session
from lapilli.data.record import excerpt
from pipelines.cli.command import say
from pipelines.cli.terminal import print_table
from pipelines.diagnosis.all_reduce import all_reduce_rate

__all__ = ["diagnose_cluster", "node_row"]

SKEW = 1.0  # seconds between two clocks
COLUMNS = ("node", "cores", "memory", "devices", "/dev/shm", "scratch", "store", "hub", "clock",
           "state")  # fmt: skip


def diagnose_cluster(folder: str = "", store: str = "") -> int:
    """Probe all nodes that are up, print them, and name the first that is bad.

    Args:
        folder: One that all nodes should share; empty for none.
        store: An address that all nodes should write; empty for none.

    Returns:
        1 if a node is bad, else 0.

    Raises:
        DataError: No cluster is named, or it cannot be joined.
    """
    if "RAY_ADDRESS" not in os.environ:
        raise DataError(
            "RAY_ADDRESS: not set; set it to the head's HOST:PORT, or auto on a node of the cluster"
        )
    with ray_session(), shared_token(folder) as token:
        nodes = alive_nodes()
        read = places_of({}, {"--store": store})
        places = JobPlaces({"--folder": (token,)} if token else {}, {}, read.written)
        start = time.time()
        reports = probe_nodes(nodes, places)
        clocks = start, time.time()
        here, table, faults = node_versions(), Table(box=box.SIMPLE_HEAD, pad_edge=False), []
        for name in COLUMNS:
            table.add_column(name)
        for node, report in reports:
            fault = fault_of(report, here) or _skewed(report, *clocks)
            table.add_row(*node_row(node, report, "bad" if fault else "ok", clocks[0]))
            faults += [f"node {node.address}: {fault}"] if fault else []
        print_table(table)
        if not faults:
            _say_rate(nodes)
    for fault in faults[:1]:
        say(f"{fault}" + (f" ({len(faults)} of {len(reports)} nodes are bad)"))
    return int(bool(faults))


def _say_rate(nodes: list[Node]) -> None:
    """All-reduce is measured where every node is well: else it would wait for the bad one."""
    try:
        if rate := all_reduce_rate(nodes):
            say(f"all-reduce over {len(nodes)} nodes (gloo): {rate / 1e9:.2f} GB/s")
    except Exception as error:
        said = excerpt(str(error).strip().splitlines()[-1], 200)
        say(f"all-reduce over {len(nodes)} nodes failed ({said}); see firewall and interfaces")


def _skewed(report: NodeReport | str, before: float, after: float) -> str:
    """A clock that shows a time outside of when it was asked."""
    if isinstance(report, str) or before - SKEW <= report.clock <= after + SKEW:
        return ""
    lead = report.clock - after if report.clock > after else before - report.clock
    return f"({report.host}) its clock is {lead:.1f} s off; start chrony or ntp there"


def node_row(node: Node, report: NodeReport | str, state: str, asked: float) -> list[str]:
    """The columns of a node."""
    devices = [f"{node.resources[name]:g} {name}" for name in ("GPU", "HPU") if
               node.resources.get(name)]  # fmt: skip
    name = f"{node.address}{' (head)' if node.is_head else ''}"
    if isinstance(report, str):
        return [name, *[""] * (len(COLUMNS) - 2), state]
    return [
        name,
        f"{node.resources.get('CPU', 0):g} of {report.cores}",
        bytes_text(report.memory),
        ", ".join(devices) or "none",
        bytes_text(report.shm),
        bytes_text(report.scratch),
        "" if report.store is None else f"{report.store * 1e3:.0f} ms",
        "none" if report.hub is None else bytes_text(report.hub),
        f"{report.clock - asked:+.1f} s",
        state,
    ]
