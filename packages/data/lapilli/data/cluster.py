"""Ray for one script: the cluster it was submitted to, or a local one that ends with it."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

__all__ = ["ray_session"]


@contextmanager
def ray_session() -> Generator[None]:
    """Use the Ray that is already here (a job's, a test's), or start one and stop it after.

    `RAY_ADDRESS` names a cluster (`ray job submit` sets it). Without it a local Ray is started on
    this machine; one left over from somebody else's script is never joined.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if "RAY_ADDRESS" in os.environ:
        ray.init(**quiet)
    else:
        ray.init("local", include_dashboard=False, **quiet)
    try:
        yield
    finally:
        ray.shutdown()
