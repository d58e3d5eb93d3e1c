"""Intel Gaudi's bridge: its environment, lazy mode, HPU graphs and fused optimizer.

No step of lapilli has run on a Gaudi; tests have a package of the same names on a CPU.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lapilli.model.vlm import VisionLanguageModel
from lapilli.train.config import HpuConfig, RunConfig
from lapilli.train.config_groups import LAZY_MODE
from lapilli.train.device import HABANA, Device
from lapilli.train.errors import TrainError

__all__ = [
    "check_stage", "fused_adamw", "hpu_environment", "ignored_line", "record_graphs",
    "set_environment", "step_marker",
]  # fmt: skip


def hpu_environment(config: HpuConfig) -> dict[str, str]:
    """Variables that the bridge reads as it is imported, for every worker on an HPU."""
    return {**config.environment, LAZY_MODE: str(int(config.lazy))}


def set_environment(config: HpuConfig) -> None:
    """Set them in this process; they count only before the bridge is imported.

    Raises:
        TrainError: It is imported already, under other values.
    """
    wanted = hpu_environment(config)
    is_late = f"{HABANA}.torch" in sys.modules
    for name, value in wanted.items():
        if is_late and os.environ.get(name) != value:
            setting = "hpu.lazy" if name == LAZY_MODE else f"hpu.environment.{name}"
            raise TrainError(
                f"{setting}: {HABANA} was imported in this process under {name}="
                f"{os.environ.get(name)}, expected {value}; start the run in a process of its own"
            )
    os.environ.update(wanted)


def ignored_line(config: HpuConfig, device: Device) -> str:
    """A line for settings that say nothing on this device; empty if there are none."""
    if device == "hpu" or config == HpuConfig():
        return ""
    return f"hpu: its settings are for Gaudi and do nothing on {device}"


def check_stage(config: RunConfig, device: Device) -> None:
    """Whether HPU graphs can be recorded under the run's ZeRO stage.

    Raises:
        TrainError: Stage 3 fetches weights by hooks, which a recorded graph leaves out.
    """
    if device == "hpu" and config.hpu.graphs and config.zero_stage == 3:
        raise TrainError(
            "hpu.graphs: true with zero_stage 3, whose hooks fetch weights inside the decoder and "
            "are not recorded; set zero_stage 2, or leave hpu.graphs out"
        )


def _nothing() -> None: ...


def step_marker(config: HpuConfig, device: torch.device) -> Callable[[], None]:
    """What ends a graph of lazy mode, so that the device begins; nothing in eager mode."""
    if device.type != "hpu" or not config.lazy:
        return _nothing
    core: Any = importlib.import_module(f"{HABANA}.torch.core")
    return core.mark_step


def record_graphs(model: VisionLanguageModel) -> None:
    """Replay the decoder's forward and backward from recorded graphs, one a shape.

    The decoder alone: the tower runs without gradients, and the loss fills `sample_losses`, which
    is an input.
    """
    bridge: Any = importlib.import_module(f"{HABANA}.torch")
    bridge.hpu.ModuleCacher()(model=model.language.get_decoder(), inplace=True)


def fused_adamw(
    groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """Habana's FusedAdamW as torch's AdamW: the same epsilon, moments and count of steps.

    Its own count is one a group and call, whatever part of the group is updated. ZeRO-3 updates a
    group in pieces, and a checkpoint has the count of a tensor: so that is what is kept here.

    Args:
        groups: Parameters with their own `lr` and `weight_decay`.
        lr: Learning rate.
        betas: Decay rates of the moments.
    """
    optimizers: Any = importlib.import_module(f"{HABANA}.torch.hpex.optimizers")
    base: Any = optimizers.FusedAdamW

    class CountedAdamW(base):
        """`FusedAdamW` whose `step` lies beside a tensor's moments, as torch's does."""

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            own: Any = self
            updated: list[Tensor] = []
            for group in own.param_groups:
                now = [p for p in group["params"] if p.grad is not None]
                counts: list[Mapping[str, Any]] = [own.state.get(p, {}) for p in now]
                group["step"] = max((int(one.get("step", 0)) for one in counts), default=0)
                updated += now
            result: Any = super().step(closure)
            for parameter in updated:
                own.state[parameter]["step"] += 1
            return result

    optimizer: torch.optim.Optimizer = CountedAdamW(groups, lr=lr, betas=betas, eps=1e-8)
    return optimizer
