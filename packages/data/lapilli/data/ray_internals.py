"""What this package uses of Ray without a public way: private names and unlisted variables.

`tests/contracts/test_private_internals.py` looks whether the installed Ray has each of them.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = [
    "INTERVAL", "NO_CLUSTERS", "RESOURCE_MANAGER", "SOON", "VARIABLES", "fill_slots_at_once",
    "on_loopback", "set_variables", "start_in_folder",
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
