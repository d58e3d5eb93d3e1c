"""Which nodes a cluster has for some workers, and wait for those that its autoscaler adds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lapilli.data.cluster.pool import PoolConfig, matches
from lapilli.data.errors import DataError
from lapilli.data.ray_internals import Autoscaler, autoscaler, draining_nodes

__all__ = ["Demand", "Node", "alive_nodes", "check_possible", "may_have", "slots",
    "wait_for_nodes",
]  # fmt: skip

SAY_EVERY = 30.0  # seconds between two lines while nodes are waited for
LOOK_EVERY = 1.0  # seconds
ANSWERS_WITHIN = 20.0  # seconds until an autoscaler has decided on what it was asked for
REFUSED = ", and its autoscaler has no type of node for it"
NAMES = {"CPU": "core", "GPU": "GPU", "HPU": "HPU"}


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node that is up.

    Attributes:
        node_id: Ray's.
        address: Its IP address.
        resources: What it has in all, by Ray's names.
        labels: Its labels, Ray's own among them.
        is_head: Whether it is the head.
    """

    node_id: str
    address: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]
    is_head: bool

    def slots(self, bundle: Mapping[str, float]) -> int:
        """How many of these bundles it could hold if it were free."""
        return int(min(self.resources.get(name, 0) // asked for name, asked in bundle.items()))


@dataclass(frozen=True, kw_only=True)
class Demand:
    """Workers to be placed.

    Attributes:
        workers: Their number.
        bundle: What each asks of a node.
        pool: The nodes they may be on.
        setting: The setting that says their number, for messages.
        group: The group of settings that `pool` is, `build` or `train`.
    """

    workers: int
    bundle: Mapping[str, float]
    pool: PoolConfig
    setting: str
    group: str

    @property
    def scarce(self) -> str:
        """The resource that is named to the user: a device, else cores."""
        return next((name for name in ("GPU", "HPU") if self.bundle.get(name)), "CPU")

    def counted(self, workers: int) -> str:
        """What so many workers ask for, in words: `8 GPUs`."""
        number, name = workers * self.bundle.get(self.scarce, 1), NAMES[self.scarce]
        return f"{number:g} {name}{'' if number == 1 else 's'}"


def alive_nodes(selector: Mapping[str, str] | None = None) -> list[Node]:
    """The nodes that are up and stay, and whose labels match."""
    import ray

    leaving = draining_nodes()
    nodes = [
        Node(
            node_id=found["NodeID"],
            address=found["NodeManagerAddress"],
            resources=found["Resources"],
            labels=found.get("Labels") or {},
            is_head="node:__internal_head__" in found["Resources"],
        )
        for found in ray.nodes()
        if found["Alive"] and found["NodeID"] not in leaving
    ]
    return [node for node in nodes if matches(node.labels, selector or {})]


def slots(demand: Demand) -> int:
    """How many of a demand's workers the nodes that are up could hold if they were free."""
    nodes = alive_nodes(demand.pool.label_selector)
    return sum(node.slots(demand.bundle) for node in nodes)


def may_have(demands: Sequence[Demand]) -> list[bool]:
    """Whether the cluster has, or its autoscaler could add, the nodes for each demand.

    The autoscaler is asked by a placement group each, and given `ANSWERS_WITHIN` to decide; without
    one, and where nodes are up, this returns at once.
    """
    found = [slots(demand) >= demand.workers for demand in demands]
    before = autoscaler()
    if all(found) or not before.is_there:
        return found
    asked = {n: _ask(demands[n]) for n, has in enumerate(found) if not has}
    give_up = time.monotonic() + ANSWERS_WITHIN
    open_ = set(asked)
    try:
        while open_ and time.monotonic() < give_up:
            state = autoscaler()
            for n in sorted(open_):
                group = asked[n]
                found[n] = group.wait(0.1) or (
                    state.version > before.version + 1
                    and state.is_adding
                    and not state.refuses(group.id.hex())
                )
                if found[n] or state.refuses(group.id.hex()):
                    open_.discard(n)
            time.sleep(LOOK_EVERY / 2 if open_ else 0)
    finally:
        for group in asked.values():
            _withdraw(group)
    return found


def check_possible(demand: Demand) -> None:
    """Require that the workers can be placed: on the nodes that are up, or on what may be added.

    Raises:
        DataError: They cannot: a label that no node has, or too few nodes.
    """
    if slots(demand) >= demand.workers:
        return
    if not autoscaler().is_there:
        raise DataError(_lacking(demand))
    if not may_have([demand])[0]:
        raise DataError(_lacking(demand, REFUSED))


def wait_for_nodes(demand: Demand, on_wait: Callable[[str], None]) -> None:
    """Ask for the nodes that are missing and wait for them; returns at once where all are up.

    Args:
        demand: The workers.
        on_wait: Called with a line at first and then every `SAY_EVERY` seconds.

    Raises:
        DataError: Without an autoscaler, or by its verdict, they will not come; or they did not
            within `node_timeout`.
    """
    if slots(demand) >= demand.workers:
        return
    if not autoscaler().is_there:
        raise DataError(_lacking(demand))
    group, began, said = _ask(demand), time.monotonic(), 0
    try:
        while not group.wait(LOOK_EVERY):
            waited = time.monotonic() - began
            state = autoscaler()
            if state.refuses(group.id.hex()):
                raise DataError(_lacking(demand, REFUSED))
            if waited > demand.pool.node_timeout:
                raise DataError(
                    f"{demand.setting}: {demand.workers}; {demand.counted(demand.workers)} were "
                    f"not there within {demand.group}.node_timeout, {waited:.0f} s; see `ray "
                    f"status` for what the autoscaler says, or raise {demand.group}.node_timeout"
                )
            if waited >= said * SAY_EVERY:
                on_wait(_waiting_line(demand, waited, state))
                said += 1
    finally:
        _withdraw(group)


def _ask(demand: Demand) -> Any:
    """A placement group that is pending until there are nodes: the autoscaler looks at these."""
    from ray.util.placement_group import placement_group

    selector = demand.pool.label_selector
    labels: Any = [selector] * demand.workers if selector else None
    return placement_group([dict(demand.bundle)] * demand.workers, bundle_label_selector=labels)


def _withdraw(group: Any) -> None:
    from ray.util.placement_group import remove_placement_group

    remove_placement_group(group)


def _waiting_line(demand: Demand, waited: float, state: Autoscaler) -> str:
    there = demand.counted(slots(demand)).partition(" ")[0]
    are = "node is" if state.adding == 1 else "nodes are"
    coming = f", {state.adding} {are} coming up" if state.adding else ""
    after = f" after {waited:.0f} s" if waited >= SAY_EVERY else ""
    return f"waiting for {demand.counted(demand.workers)}: {there} there{coming}{after}"


def _most(selector: Mapping[str, str]) -> dict[str, float]:
    """The most that a node with these labels has of each resource that a worker may ask for."""
    found: dict[str, float] = {}
    for node in alive_nodes(selector):
        for name, value in node.resources.items():
            if ":" not in name and "memory" not in name:
                found[name] = max(value, found.get(name, 0))
    return dict(sorted(found.items()))


def _absent(demand: Demand) -> dict[str, float]:
    """Resources of the settings that no node has as many of as a worker asks for."""
    most = _most(demand.pool.label_selector)
    return {
        name: asked
        for name, asked in demand.pool.resources.items()
        if name not in NAMES and asked > most.get(name, 0)
    }


def _lacking(demand: Demand, why: str = "") -> str:
    """The line for workers that cannot be placed: a label that no node has, or too few nodes."""
    selector = demand.pool.label_selector
    text = ", ".join(f"{name}: {value}" for name, value in selector.items())
    nodes = alive_nodes()
    if selector and not alive_nodes(selector):
        labels = {
            f"{name}={value}"
            for node in nodes
            for name, value in node.labels.items()
            if not name.startswith("ray.io/")
        }
        have = f"nodes have {', '.join(sorted(labels))}" if labels else "no node has labels"
        why = why or ", and no autoscaler adds one"
        return f"{demand.group}.label_selector: {{{text}}}; no node has it{why}; {have}"
    among = f" on nodes with {text}" if selector else ""
    if absent := _absent(demand):
        most = ", ".join(f"{name} {value:g}" for name, value in _most(selector).items())
        have = f"at most {most}" if most else "none"
        asked = ", ".join(f"{name} {value:g}" for name, value in absent.items())
        where = f" with {text}" if selector else ""
        return f"{demand.group}.resources: {asked}; no node{where} has it{why}; nodes have {have}"
    total = sum(node.resources.get(demand.scarce, 0) for node in alive_nodes(selector))
    has, of = demand.counted(slots(demand)), ""
    if total >= demand.workers * demand.bundle.get(demand.scarce, 1):
        asked = ", ".join(f"{name} {value:g}" for name, value in demand.bundle.items())
        of = f" for workers of {asked} each"
    return (
        f"{demand.setting}: {demand.workers}; Ray has {has}{among}{of}{why}; lower it or add nodes"
    )
