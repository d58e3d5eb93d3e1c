"""Choose the device of a worker, and prepare the process before DeepSpeed is imported.

Intel Gaudi (`hpu`) is supported here by name; no step has run on one yet.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lapilli.data.images.buffers import peak_resident
from lapilli.model.torch_internals import computes_fp16
from lapilli.train.config import DeviceChoice
from lapilli.train.errors import TrainError

__all__ = [
    "BACKEND",
    "HABANA",
    "NO_HABANA",
    "RESOURCE",
    "Device",
    "check_precision",
    "check_tf32",
    "choose_device",
    "device_memory",
    "device_name",
    "has_habana",
    "know_collectives",
    "peak_memory",
    "pinned",
    "prepare_process",
    "synchronize",
    "torch_device",
    "use_tf32",
    "visible_devices",
]

Device = Literal["cpu", "cuda", "hpu"]
RESOURCE: Mapping[Device, str] = {"cpu": "CPU", "cuda": "GPU", "hpu": "HPU"}  # Ray's names
BACKEND: Mapping[Device, str] = {"cpu": "gloo", "cuda": "nccl", "hpu": "hccl"}  # torch's
HABANA = "habana_frameworks"
NO_HABANA = (
    f"device: hpu needs {HABANA}, which is not installed where the workers are; start from Intel's "
    "Gaudi image, or set device: cpu"
)


def choose_device(wanted: DeviceChoice, there: Mapping[Device, int]) -> Device:
    """Resolve the setting `device`.

    Args:
        wanted: `auto` takes GPUs, else HPUs, else the CPU.
        there: Number of each kind that Ray or torch sees.

    Raises:
        TrainError: The requested device is not available.
    """
    if wanted == "auto":
        return "cuda" if there.get("cuda") else "hpu" if there.get("hpu") else "cpu"
    if wanted != "cpu" and not there.get(wanted):
        name = RESOURCE[wanted]
        raise TrainError(
            f"device: {wanted} asked for, no {name} is visible; set device: cpu or add {name}s"
        )
    return wanted


def has_habana() -> bool:
    """Whether Gaudi's torch bridge is installed."""
    return importlib.util.find_spec(HABANA) is not None


def visible_devices() -> dict[Device, int]:
    """The GPUs and HPUs of this machine."""
    if not has_habana():
        return {"cuda": torch.cuda.device_count()}
    torch_device("hpu")
    hpu: Any = torch.hpu  # pyright: ignore[reportAttributeAccessIssue]
    return {"cuda": torch.cuda.device_count(), "hpu": hpu.device_count()}


def torch_device(device: Device) -> torch.device:
    """The torch device, after importing what registers it.

    Raises:
        TrainError: Gaudi's software is not there.
    """
    if device == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    if device == "hpu":
        if not has_habana():
            raise TrainError(NO_HABANA)
        importlib.import_module(f"{HABANA}.torch.core")  # registers the device
    return torch.device(device)


def prepare_process(device: Device) -> torch.device:
    """Set DeepSpeed's accelerator for this process; call before it is imported."""
    os.environ["DS_ACCELERATOR"] = device
    return torch_device(device)


def know_collectives(device: Device) -> None:
    """Register the device's collective backend with torch, as Gaudi needs; Ray does the same."""
    if device == "hpu":
        torch_device(device)
        importlib.import_module(f"{HABANA}.torch.distributed.hccl")


def device_name(device: torch.device) -> str:
    """The maker's name of a GPU or HPU."""
    return str(getattr(torch, device.type).get_device_name(device))


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor in memory that the device copies from and to by itself."""
    if device.type == "cpu":
        return tensor
    # Gaudi has to be named: it is not the accelerator that torch looks for
    return tensor.pin_memory() if device.type == "cuda" else tensor.pin_memory(device)


def synchronize(device: torch.device) -> None:
    """Wait for a device to finish; returns at once on a CPU."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def check_precision(device: Device, precision: str) -> None:
    """Whether this machine computes in a precision.

    Raises:
        TrainError: fp16 on a processor that does not.
    """
    if precision == "fp16" and device == "cpu" and not computes_fp16():
        raise TrainError(
            "precision: fp16 is not computed by this machine's processor; set precision fp32, or "
            "bf16"
        )


def check_tf32(device: Device, tf32: bool) -> None:
    """Refuse TF32 on devices that do not have it.

    Raises:
        TrainError: It is asked for on another device than an NVIDIA GPU.
    """
    if tf32 and device != "cuda":
        raise TrainError(f"tf32: true on {device}; NVIDIA GPUs have it, leave it out")


def use_tf32(tf32: bool) -> None:
    """Set how this process computes fp32 matrix products."""
    torch.set_float32_matmul_precision("high" if tf32 else "highest")


def device_memory(device: Device) -> int | None:
    """Bytes of a GPU of this machine; None for a CPU.

    Raises:
        TrainError: It is not known: the run's GPUs are on other machines, or HPUs.
    """
    if device == "cpu":
        return None
    if device == "hpu":
        raise TrainError("memory: auto asks a GPU and no HPU for its memory; set memory in GiB")
    if not torch.cuda.is_available():
        raise TrainError("memory: auto asks a GPU, and this machine has none; set memory in GiB")
    return int(torch.cuda.get_device_properties(0).total_memory)


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: on a GPU or HPU torch's tensors there, else by this process."""
    if device.type != "cpu":
        return int(getattr(torch, device.type).max_memory_allocated(device))
    return peak_resident()
