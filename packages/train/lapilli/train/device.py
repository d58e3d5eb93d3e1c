"""The device a worker computes on, and what must be set before DeepSpeed is imported."""

from __future__ import annotations

import os
import resource
from typing import Literal

import torch

from lapilli.train.errors import TrainError

__all__ = [
    "Device", "check_precision", "choose_device", "device_memory", "peak_memory",
    "prepare_process",
]  # fmt: skip

Device = Literal["cpu", "cuda"]


def choose_device(wanted: Literal["auto", "cpu", "cuda"], gpus: int) -> Device:
    """The device a setting stands for, where Ray or torch sees `gpus` GPUs.

    Raises:
        TrainError: GPUs asked for and none there.
    """
    if wanted == "auto":
        return "cuda" if gpus else "cpu"
    if wanted == "cuda" and not gpus:
        raise TrainError("device: cuda asked for, no GPU is visible; set device: cpu or add GPUs")
    return wanted


def prepare_process(device: Device) -> torch.device:
    """Set DeepSpeed's accelerator for this process; call before it is imported."""
    os.environ["DS_ACCELERATOR"] = device
    if device == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def check_precision(device: Device, precision: str) -> None:
    """Whether this machine computes in a precision.

    Raises:
        TrainError: fp16 on a processor that does not.
    """
    if precision == "fp16" and device == "cpu" and not _has_fp16():
        raise TrainError(
            "precision: fp16 is not computed by this machine's processor; set precision fp32, or "
            "bf16"
        )


def _has_fp16() -> bool:
    """What DeepSpeed asks, too."""
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def device_memory(device: Device) -> int | None:
    """Bytes of a GPU of this machine; None for a CPU.

    Raises:
        TrainError: The run's GPUs are on other machines.
    """
    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        raise TrainError(
            "micro_batch: 0 follows the memory of a GPU, and this machine has none; set it"
        )
    return int(torch.cuda.get_device_properties(0).total_memory)


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has held so far: on a GPU torch's tensors there, else the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
