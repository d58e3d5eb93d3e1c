"""The device a worker computes on, and what must be set before DeepSpeed is imported."""

from __future__ import annotations

import os
from typing import Literal

import torch

from lapilli.train.errors import TrainError

__all__ = ["Device", "choose_device", "prepare_process"]

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
