"""What this package uses of Ray without a public way: private names and unlisted variables.

`tests/contracts/test_private_internals.py` looks whether the installed Ray has each of them.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "COORDINATOR", "INTERVAL", "NO_CLUSTERS", "REQUESTER", "RESOURCE_MANAGER", "SOON", "VARIABLES",
    "Autoscaler", "autoscaler", "draining_nodes", "fill_slots_at_once", "on_loopback",
    "set_variables", "start_in_folder", "within_pool",
]  # fmt: skip

VARIABLES = {
    # A thread that still asks a Ray that is gone must not start another one.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    # Ray Data notices a task's end at once and not 0.1 s later: a worker waits less for its next.
    "RAY_DATA_METADATA_PREFETCH_ON_THREAD": "0",
}
NO_CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
RESOURCE_MANAGER = "ray.data._internal.execution.resource_manager"
INTERVAL = "GLOBAL_LIMITS_UPDATE_INTERVAL_S"  # between Ray Data's looks at the cluster's size
SOON = 0.05  # seconds
COORDINATOR = "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator"
REQUESTER = "DefaultAutoscalingCoordinator"


def set_variables() -> None:
    """Set `VARIABLES`, unless the environment has them; call before Ray is imported.

    Used: two variables that Ray reads as it is imported and does not document. `ray.init` and
    `DataContext` have no such settings. A Ray without them ignores them: a thread left over could
    start a Ray, and tasks wait 0.1 s longer.
    """
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)


@contextmanager
def on_loopback() -> Generator[None]:
    """Have a Ray that is started inside listen on 127.0.0.1 alone.

    Used: `ray._private.ray_constants.ENABLE_RAY_CLUSTER` and the variable it is read from when Ray
    is imported. Ray takes 127.0.0.1 for its node's address, and binds everything there, where it
    has no clusters; `ray.init` has no public argument for the address. If the name went, this
    raises; if it lost its effect, `tests/data/test_local_ray.py` sees the open ports.
    """
    from ray._private import ray_constants

    is_set = NO_CLUSTERS in os.environ
    before = ray_constants.ENABLE_RAY_CLUSTER
    os.environ.setdefault(NO_CLUSTERS, "0")
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        if not is_set:
            os.environ.pop(NO_CLUSTERS, None)


def start_in_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Start a Ray on this machine whose sessions lie in `folder`.

    Used: `_temp_dir` of `ray.init`. `ray start --temp-dir` is the public way, of the command alone;
    RAY_TMPDIR is the user's. Without it `ray.init` raises and names the argument.

    Args:
        folder: For sockets, logs and objects that do not fit into shared memory.
        settings: Further arguments of `ray.init`.
    """
    import ray

    ray.init("local", include_dashboard=False, _temp_dir=str(folder), **settings)


@contextmanager
def fill_slots_at_once() -> Generator[Callable[[], None]]:
    """Have Ray Data fill all slots in its first second too, until what is yielded is called.

    Used: `ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S` of Ray Data. It asks how large the
    cluster is, goes by "nothing is known yet", which leaves all slots but one empty, and looks
    again only after a second; `DataContext` has no setting for it. A Ray without this name begins
    as it likes.
    """
    manager: Any = None
    with suppress(ImportError):
        manager = importlib.import_module(RESOURCE_MANAGER)
    usual = getattr(getattr(manager, "ResourceManager", None), INTERVAL, None)
    if usual is None:
        yield lambda: None
        return
    setattr(manager.ResourceManager, INTERVAL, SOON)
    try:
        yield lambda: setattr(manager.ResourceManager, INTERVAL, usual)
    finally:
        setattr(manager.ResourceManager, INTERVAL, usual)


@contextmanager
def within_pool(labels: Mapping[str, str], resources: Mapping[str, float]) -> Generator[None]:
    """Have Ray Data ask an autoscaler for nodes of a pool, while inside.

    Used: `DefaultAutoscalingCoordinator.request_resources` of Ray Data, with which it asks for more
    nodes as tasks queue. It takes label selectors, which Ray Data does not give although tasks have
    them, and leaves out resources other than cores, GPUs and memory: nodes of any type with a core
    would be added, such as those with GPUs. A Ray without the name adds these.

    Args:
        labels: What a node must have.
        resources: What a task asks for beside cores, GPUs and memory.
    """
    requester: Any = None
    with suppress(ImportError):
        requester = getattr(importlib.import_module(COORDINATOR), REQUESTER, None)
    usual = getattr(requester, "request_resources", None)
    if usual is None or not (labels or resources):
        yield
        return

    def request(self: Any, *given: Any, **named: Any) -> None:
        bundles = [{**bundle, **resources} for bundle in named.pop("resources")]
        selectors = [dict(labels) for _ in bundles]
        usual(self, *given, resources=bundles, label_selectors=selectors, **named)

    requester.request_resources = request
    try:
        yield
    finally:
        requester.request_resources = usual


def draining_nodes() -> frozenset[str]:
    """Ids of nodes that are up and are to be taken away: they take no new work.

    Used: `ray._private.state.state.get_draining_nodes`, which Ray Train goes by. `ray.nodes()` does
    not tell. If the name went, such a node would count until it is gone.
    """
    try:
        state: Any = importlib.import_module("ray._private.state").state
        return frozenset(state.get_draining_nodes())
    except (AttributeError, ImportError):
        return frozenset()


@dataclass(frozen=True)
class Autoscaler:
    """What Ray's autoscaler said last.

    Attributes:
        is_there: Whether there is one.
        version: Number of its state; rises with each of its decisions.
        adding: Nodes that it has asked for and that are not up.
        refused: Placement groups that none of its types of nodes could hold, by id.
    """

    is_there: bool = False
    version: int = 0
    adding: int = 0
    refused: frozenset[str] = frozenset()

    @property
    def is_adding(self) -> bool:
        """Whether nodes are on their way."""
        return self.adding > 0

    def refuses(self, placement_group: str) -> bool:
        """Whether no node that it could add would hold a placement group."""
        return placement_group in self.refused


def autoscaler() -> Autoscaler:
    """Ask Ray's autoscaler (version 2) for its state; Ray must be running.

    Used: `GcsClient.get_cluster_status` and `autoscaler_pb2.GetClusterStatusReply`, whose
    `infeasible_gang_resource_requests` name placement groups in `details`. The public
    `ray.util.state` and `ray status` leave these out, and nothing public lists the types of nodes.
    A Ray that is started on this machine has no autoscaler. If a name went, nodes would not be
    waited for and a cluster would be what it is now.
    """
    import ray

    try:
        messages: Any = importlib.import_module("ray.core.generated.autoscaler_pb2")
        clients: Any = importlib.import_module("ray._raylet")
        client = clients.GcsClient(ray.get_runtime_context().gcs_address)
        reply = messages.GetClusterStatusReply.FromString(client.get_cluster_status(timeout_s=5))
    except Exception:  # not there, or busy: the next look tells
        return Autoscaler()
    state = reply.autoscaling_state
    coming = sum(one.count for one in state.pending_instance_requests)
    starting = [one for one in state.pending_instances if "(HEAD)" not in one.details]
    return Autoscaler(
        is_there=state.autoscaler_state_version > 0,
        version=state.autoscaler_state_version,
        adding=max(coming, len(starting)),
        refused=frozenset(
            gang.details.partition(":")[0] for gang in state.infeasible_gang_resource_requests
        ),
    )
