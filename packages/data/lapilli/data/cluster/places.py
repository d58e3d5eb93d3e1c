"""Check the places of a job on every node of its pool, before any work."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lapilli.data.cluster.nodes import Node, alive_nodes
from lapilli.data.cluster.pool import PoolConfig
from lapilli.data.cluster.probe import (
    JobPlaces,
    NodeReport,
    Seen,
    node_versions,
    probe_node,
    same_version,
    seen,
    store_seconds,
)
from lapilli.data.errors import DataError
from lapilli.data.io.filesystems import is_remote
from lapilli.data.record import excerpt

__all__ = ["check_places", "fault_of", "places_of", "probe_nodes", "shared_token"]

ANSWER_WITHIN = 120.0  # seconds; a node may have to unpack a job's files first
SAMPLED = 3  # levels of folders that are gone down for a file
REMEDY = "mount it on every node, or put the data in a store (s3://)"


def places_of(read: Mapping[str, str | Iterable[str]], written: Mapping[str, str]) -> JobPlaces:
    """The places that settings name: addresses, and local paths that are there.

    Of a folder, a file in it is compared too.

    Args:
        read: Paths and addresses by setting; what is not there, such as a hub's name, is left out.
        written: Addresses by setting.
    """
    paths: dict[str, tuple[Seen, ...]] = {}
    stores: dict[str, str] = {}
    for setting, values in read.items():
        for value in [values] if isinstance(values, str) else values:
            if is_remote(value):
                stores[setting] = value
            elif value and (found := seen(str(Path(value).absolute()))).size is not None:
                sample = _sample(Path(found.path)) if found.size == -1 else None
                files = (found, seen(str(sample))) if sample else (found,)
                paths[setting] = (*paths.get(setting, ()), *files)
    return JobPlaces(paths, stores, {n: value for n, value in written.items() if is_remote(value)})


def check_places(places: JobPlaces, pool: PoolConfig, output: str = "") -> None:
    """Check stores from here and, where Ray runs on several nodes, everything on each of the pool.

    A job on one machine makes three calls to each store that it writes, and nothing else.

    Args:
        places: What the job reads and writes.
        pool: The nodes that work.
        output: A folder that all nodes must share; empty or an address for none.

    Raises:
        DataError: Names the first node, the setting and the remedy.
    """
    for setting, address in places.written.items():
        try:
            store_seconds(address, writes=True)
        except DataError as error:
            raise DataError(f"{setting}: {error}") from None
    nodes = _others(pool)
    if not nodes:
        return
    with shared_token(output) as token:
        more = {**places.paths, **({"output": (token,)} if token else {})}
        reports = probe_nodes(nodes, JobPlaces(more, places.stores, places.written))
    here = node_versions()
    for node, report in reports:
        if fault := fault_of(report, here):
            raise DataError(f"node {node.address}: {fault}")


def _others(pool: PoolConfig) -> list[Node]:
    """The nodes of a pool that can work, this one left out; none where Ray does not run."""
    import sys

    ray: Any = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return []
    here = ray.get_runtime_context().get_node_id()
    nodes = alive_nodes(pool.label_selector)
    return [n for n in nodes if n.node_id != here and n.resources.get("CPU")]


def probe_nodes(nodes: Iterable[Node], places: JobPlaces) -> list[tuple[Node, NodeReport | str]]:
    """Probe each node at the same time; of one that fails, why."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote: Any = ray.remote(num_cpus=0, max_retries=0)(probe_node)
    asked: dict[Any, Node] = {}
    for node in nodes:
        at = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        asked[remote.options(scheduling_strategy=at).remote(places)] = node
    ready, _ = ray.wait([*asked], num_returns=len(asked), timeout=ANSWER_WITHIN)
    found: list[tuple[Node, NodeReport | str]] = []
    for task, node in asked.items():
        if task not in ready:
            late = f"no answer within {ANSWER_WITHIN:.0f} s; see that it is up"
            found.append((node, late))
            continue
        try:
            found.append((node, ray.get(task)))
        except Exception as error:
            found.append((node, _why(error)))
    return found


def _why(error: Exception) -> str:
    said = str(error)
    if "No module named" in said:
        module = said.partition("No module named")[2].split()[0].strip("'\"")
        return (
            f"module {module} is missing there; install lapilli and its dependencies on each node, "
            "or submit with the runtime environment of pipelines/cluster/README.md"
        )
    return f"the probe failed ({excerpt(said.strip().splitlines()[-1], 200)}); see that it is well"


def fault_of(report: NodeReport | str, versions: Mapping[str, str]) -> str:
    """What keeps a node from working with this one, and the remedy; empty where nothing does.

    Args:
        report: The node's.
        versions: This machine's `node_versions`.
    """
    if isinstance(report, str):
        return report
    for name, here in versions.items():
        if same_version(here, there := report.versions[name]):
            continue
        remedy = "install the same versions"
        if name.startswith("lapilli"):
            remedy = "install the same, or submit with the runtime environment of the README"
        return f"({report.host}) {name} {there} there, {here} here; {remedy}"
    for setting, wrong in report.places.items():
        remedy = "" if "://" in wrong else f"; {REMEDY}"
        return f"({report.host}) {setting}: {wrong}{remedy}"
    return ""


@contextmanager
def shared_token(output: str) -> Generator[Seen | None]:
    """A file that is written where an output lies, or will lie, for the nodes to see."""
    if not output or is_remote(output):
        yield None
        return
    path = Path(output).absolute()
    folder = next(one for one in (path, *path.parents) if one.is_dir())
    token = folder / f".place-{uuid.uuid4().hex}"
    try:
        token.touch()
    except OSError:  # which whoever writes there tells
        yield None
        return
    try:
        yield Seen(str(token), 0)
    finally:
        with contextlib.suppress(OSError):
            token.unlink()


def _sample(folder: Path, levels: int = SAMPLED) -> Path | None:
    """Some file in a folder or below: the first that the system lists."""
    folders: list[Path] = []
    with contextlib.suppress(OSError), os.scandir(folder) as listing:
        for item in listing:
            if item.name.startswith("."):
                continue
            if item.is_file():
                return Path(item.path)
            if len(folders) < SAMPLED and item.is_dir():
                folders.append(Path(item.path))
    for below in folders if levels else ():
        if found := _sample(below, levels - 1):
            return found
    return None
