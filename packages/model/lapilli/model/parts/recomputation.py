"""Run layers again in backward in place of keeping what they made (arXiv 1604.06174)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lapilli.model.config import ActivationPolicy
from lapilli.model.transformers_internals import set_recomputation

__all__ = ["apply_policy", "is_recomputed", "recomputable_layers", "recompute_all"]


def recomputable_layers(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The layers that can run again, by part, in order. A frozen tower keeps nothing: it has none.

    Args:
        model: A `VisionLanguageModel`.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    trainable: Any = getattr(model.config, "trainable", ())
    parts = [*(["vision"] if "vision" in trainable else []), "language"]
    modules = {part: [*model.get_submodule(part).modules()] for part in parts}
    found = {
        part: [module for module in inside if isinstance(module, GradientCheckpointingLayer)]
        for part, inside in modules.items()
    }
    return {part: [*layers] for part, layers in found.items() if layers}


def apply_policy(model: nn.Module, policy: ActivationPolicy) -> None:
    """Have the layers of a model do as a policy says; call `set_modes` afterwards.

    Args:
        model: A `VisionLanguageModel`.
        policy: Its numbers of layers may exceed what there is.
    """
    run = _offloaded if policy.offload else checkpoint
    again: Callable[..., Any] = partial(run, use_reentrant=False)
    for part, layers in recomputable_layers(model).items():
        for number, layer in enumerate(layers):
            set_recomputation(layer, again if number < policy.recompute.get(part, 0) else None)


def recompute_all(model: nn.Module, *, offload: bool = False) -> ActivationPolicy:
    """Have every layer run again, and return that policy."""
    layers = recomputable_layers(model)
    policy = ActivationPolicy({part: len(found) for part, found in layers.items()}, offload)
    apply_policy(model, policy)
    return policy


def is_recomputed(module: nn.Module) -> bool:
    """Whether a module is a layer that runs again in backward."""
    return bool(getattr(module, "gradient_checkpointing", False))


def _offloaded(function: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """`checkpoint`, whose saved inputs lie in the host's memory."""
    with saved_tensors_hooks(_to_host, _from_host):
        return checkpoint(function, *args, **settings)


def _to_host(saved: Tensor) -> tuple[torch.device, Tensor]:
    """A copy in pinned memory, which the host does not wait for; on a CPU a plain one.

    The copy back is given to the same stream, so that it comes after this one.
    """
    is_cuda = saved.device.type == "cuda"
    copy = torch.empty(saved.shape, dtype=saved.dtype, pin_memory=is_cuda)
    copy.copy_(saved.detach(), non_blocking=is_cuda)
    return saved.device, copy


def _from_host(kept: tuple[torch.device, Tensor]) -> Tensor:
    device, copy = kept
    return copy.to(device, non_blocking=device.type == "cuda")
