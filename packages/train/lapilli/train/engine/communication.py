"""Sizes of ZeRO's collectives: DeepSpeed's settings by the model's size."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lapilli.train.config import RunConfig
from lapilli.train.device import Device

__all__ = ["communication_line", "communication_settings"]

LAYER = 12  # times the square of the hidden size: about the weights of a decoder's layer
MOST = 5 * 10**8  # numbers in a bucket: DeepSpeed's own default


def communication_settings(config: RunConfig, hidden_size: int, device: Device) -> dict[str, Any]:
    """Settings of DeepSpeed's `zero_optimization` for a run.

    What the run does not set follows the decoder's hidden size h where workers compute on GPUs or
    HPUs. At stage 3 the formulas that DeepSpeed's integration in transformers documents: gradients
    are reduced in buckets of h^2 numbers, 0.9 h^2 are fetched ahead, weights of up to 10 h numbers
    stay whole. At stages 1 and 2 a bucket is a decoder's layer, about 12 h^2, at most DeepSpeed's
    default. On HPUs nothing overlaps, as in Intel's settings. On a CPU DeepSpeed's defaults stay.

    Args:
        config: The run.
        hidden_size: Of its decoder.
        device: What its workers compute on.
    """
    if not config.zero_stage:
        return {}
    square = hidden_size**2
    found: dict[str, Any] = {}
    if device != "cpu":
        overlaps = config.num_workers > 1 and device == "cuda"
        found = {"overlap_comm": overlaps, "contiguous_gradients": True}
        if config.zero_stage == 3:
            found["reduce_bucket_size"] = square
            found["stage3_prefetch_bucket_size"] = int(0.9 * square)
            found["stage3_param_persistence_threshold"] = 10 * hidden_size
        else:
            bucket = min(LAYER * square, MOST)
            found |= {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    settings = asdict(config.communication)
    del settings["link_gbps"]
    return found | {
        name: value
        for name, value in settings.items()
        if value or (value is False)  # a size of 0 follows the model, a switch may be off
    }


def communication_line(settings: dict[str, Any]) -> str:
    """One line about them for the run's notes."""
    told = ", ".join(f"{name} {value}" for name, value in settings.items())
    return f"communication: {told or 'as DeepSpeed has it'}"
