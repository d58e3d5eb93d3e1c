"""Find what a run's workers compute on, and the nodes that have it or will have it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch

from lapilli.data.cluster.nodes import Demand, check_possible, may_have, slots, wait_for_nodes
from lapilli.train.config import RunConfig
from lapilli.train.device import (
    NO_HABANA,
    RESOURCE,
    Device,
    choose_device,
    device_memory,
    has_habana,
    visible_devices,
)
from lapilli.train.errors import TrainError
from lapilli.train.gaudi import set_environment

__all__ = ["find_device", "memory_of", "wait_for_workers", "worker_demand"]

FREE_WITHIN = 60.0  # seconds to wait for a device that can be asked for its memory or software

Answer = TypeVar("Answer")


def worker_demand(config: RunConfig, device: Device) -> Demand:
    """The fewest workers that a run starts with, and what each asks of a node."""
    fewest = config.recovery.min_workers
    return Demand(
        workers=fewest or config.num_workers,
        bundle=config.train.bundle(**{"CPU": 1, RESOURCE[device]: 1}),
        pool=config.train,
        setting="recovery.min_workers" if fewest else "num_workers",
        group="train",
    )


def find_device(config: RunConfig) -> Device:
    """What the workers compute on; of a cluster also what its autoscaler could add.

    Raises:
        DataError, TrainError: There are not enough devices, and none come.
    """
    if config.launcher == "process":
        if config.device in ("auto", "hpu") and has_habana():
            set_environment(config.hpu)
        return choose_device(config.device, visible_devices())
    looked: list[Device] = ["cuda", "hpu"]
    if config.device != "auto":
        looked = [] if config.device == "cpu" else [config.device]
    one = [replace(worker_demand(config, kind), workers=1) for kind in looked]
    found = dict(zip(looked, map(int, may_have(one)), strict=True))
    if config.device == "auto" or not config.train.label_selector:
        device = choose_device(config.device, found)
    else:  # where it is not there, the label is to blame
        device = config.device
    if device != "cuda" and config.train.resources.get("GPU"):
        raise TrainError(
            f"train.resources: GPU {config.train.resources['GPU']:g}; workers on device: {device} "
            "take none; leave it out, or set device: cuda"
        )
    demand = worker_demand(config, device)
    check_possible(demand)
    if device == "hpu" and slots(demand) and not _ask_one(config, device, has_habana):
        raise TrainError(NO_HABANA)
    return device


def wait_for_workers(config: RunConfig, device: Device, on_note: Callable[[str], None]) -> None:
    """Wait until the nodes of a run on Ray are up; `on_note` is called with lines meanwhile.

    Raises:
        DataError: They do not come.
    """
    if config.launcher == "ray":
        wait_for_nodes(worker_demand(config, device), on_note)


def memory_of(config: RunConfig, device: Device, on_note: Callable[[str], None]) -> int | None:
    """Bytes of a worker's device, which may be on another machine than the driver."""
    is_elsewhere = device == "cuda" and not torch.cuda.is_available()
    if is_elsewhere and config.launcher == "ray":
        wait_for_workers(config, device, on_note)
        if found := _ask_one(config, device, _gpu_memory):
            return found
    return device_memory(device)


def _gpu_memory() -> int | None:
    return device_memory("cuda") if torch.cuda.is_available() else None


def _ask_one(config: RunConfig, device: Device, question: Callable[[], Answer]) -> Answer:
    """What a node of the run with a free device answers."""
    import ray
    from ray.exceptions import GetTimeoutError

    name = RESOURCE[device]
    needs: dict[str, Any] = {"num_gpus": 1} if device == "cuda" else {"resources": {name: 1}}
    if labels := config.train.label_selector:
        needs["label_selector"] = labels
    asked: Any = ray.remote(num_cpus=0, **needs)(question)
    try:
        return ray.get(asked.remote(), timeout=FREE_WITHIN)
    except GetTimeoutError:
        raise TrainError(
            f"device: {device}; no {name} was free within {FREE_WITHIN:.0f} s; wait for what runs "
            "there, or set device: cpu"
        ) from None
