"""AdamW and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from lapilli.model.parts.trainable import parameter_groups
from lapilli.train.config import OptimConfig
from lapilli.train.gaudi import fused_adamw

__all__ = ["build_optimizer", "learning_rate"]


def learning_rate(
    config: OptimConfig, step: int, total: int, *, starts_at_zero: bool = False
) -> float:
    """The rate of optimizer step `step` of `total`, counted from 0.

    Warm-up takes n steps, or their share of all, rounded up; the decay reaches 0 after the last.
    Step k of the warm-up has (k + 1) / n of the rate, or k / n where it `starts_at_zero`, as under
    transformers' Trainer, whose first update changes nothing.
    """
    warmup = min(config.warmup_steps or math.ceil(config.warmup_ratio * total), total)
    if step < warmup:
        return config.lr * (step + (not starts_at_zero)) / warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - warmup) / max(1, total - warmup)
    if config.schedule == "linear":
        return config.lr * (1 - done)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


def build_optimizer(
    model: nn.Module, config: OptimConfig, *, fused: bool = False, habana: bool = False
) -> torch.optim.Optimizer:
    """AdamW over what learns; DeepSpeed's own would be compiled at the first start.

    A group's `part` is one of `GROUPS`; its `lr_factor` is its peak rate over `config.lr`: all
    rates follow one schedule.

    Args:
        model: The model.
        config: Rates, decay and moments.
        fused: One kernel for all of an update, whose step count lies beside the weights: for
            weights that are updated on a GPU.
        habana: Habana's FusedAdamW, on an HPU, else torch's.
    """
    groups = [
        {
            "params": params,
            "part": group,
            "weight_decay": config.weight_decay if decays else 0.0,
            "lr": config.lr_by_part.get(group, config.lr),
            "lr_factor": config.lr_by_part.get(group, config.lr) / config.lr,
        }
        for (group, decays), params in parameter_groups(model).items()
    ]
    if habana:
        return fused_adamw(groups, lr=config.lr, betas=config.betas)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused or None)
