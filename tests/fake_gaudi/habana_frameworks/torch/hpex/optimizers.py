"""The fused optimizer, with Habana's own defaults and its count of steps by group."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim import Optimizer

from habana_frameworks import CALLS


class FusedAdamW(Optimizer):
    """AdamW. The count of steps is the group's; a tensor's own stays as it is."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"bias_correction": bias_correction})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert closure is None
        CALLS.append("fused_adamw")
        for group in self.param_groups:
            learnt = [p for p in group["params"] if p.grad is not None]
            if not learnt:
                continue
            group["step"] = group.get("step", 0) + 1
            first, second = group["betas"]
            rate = group["lr"]
            if group["bias_correction"]:
                rate *= math.sqrt(1 - second ** group["step"]) / (1 - first ** group["step"])
            for parameter in learnt:
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                gradient = parameter.grad
                state["exp_avg"].mul_(first).add_(gradient, alpha=1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
                parameter.mul_(1 - group["weight_decay"] * group["lr"])
                root = state["exp_avg_sq"].sqrt().add_(group["eps"])
                parameter.addcdiv_(state["exp_avg"], root, value=-rate)
        return None
