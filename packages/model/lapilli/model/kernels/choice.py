"""Choose a model's kernels for a device, and say what was chosen."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Literal

from lapilli.model.config import ModelConfig
from lapilli.model.errors import ModelError
from lapilli.model.kernels.liger import FAMILIES
from lapilli.model.loss import choose_loss

__all__ = ["KernelChoice", "choose_kernels", "choose_merge", "wants_liger"]


@dataclass(frozen=True)
class KernelChoice:
    """The kernels chosen from the settings `merge`, `kernels` and `compile`.

    Attributes:
        merge: Implementation of the merge.
        layers: What computes norms, rotary embeddings and gated MLPs.
        loss: What computes the head's cross-entropy.
        reason: Why `auto` is not Liger on a device that could run it; empty otherwise.
    """

    merge: Literal["torch", "triton"]
    layers: Literal["torch", "liger", "compiled"]
    loss: Literal["torch", "liger"]
    reason: str = ""

    @property
    def note(self) -> str:
        """One line that names the choice, printed when a run starts."""
        why = f" ({self.reason})" if self.reason else ""
        return f"kernels: merge {self.merge}, layers {self.layers}{why}, loss {self.loss}"


@cache
def choose_merge(wanted: str, device: str) -> Literal["torch", "triton"]:
    """`auto` is Triton on CUDA, where torch's builds bring it, and torch elsewhere."""
    if wanted == "auto":
        has_triton = device == "cuda" and importlib.util.find_spec("triton") is not None
        return "triton" if has_triton else "torch"
    return "triton" if wanted == "triton" else "torch"


def choose_kernels(config: ModelConfig, family: str, device: str) -> KernelChoice:
    """Resolve a model's kernel settings for a device type; no weight is read.

    Args:
        config: The model's settings.
        family: transformers' `model_type` of the language model.
        device: `cuda`, `cpu` or `hpu`.

    Raises:
        ModelError: `liger` asked for where it cannot run.
    """
    merge = choose_merge(config.merge, device)
    loss = choose_loss(config.kernels, device)
    if config.compile == "blocks":
        wants_liger(config, family)
        return KernelChoice(merge, "compiled", loss)
    if config.kernels == "torch" or (config.kernels == "auto" and device != "cuda"):
        return KernelChoice(merge, "torch", loss)
    if wants_liger(config, family):
        return KernelChoice(merge, "liger", loss)
    reason = "liger-kernel is not installed" if family in FAMILIES else f"Liger has no {family}"
    return KernelChoice(merge, "torch", loss, reason)


def wants_liger(config: ModelConfig, family: str) -> bool:
    """Whether a decoder's layers are to run Liger's kernels where the device can.

    Raises:
        ModelError: `liger` asked for an architecture that it does not know, where it is not
            installed, or together with `compile`.
    """
    is_installed = importlib.util.find_spec("liger_kernel") is not None
    if config.kernels == "auto":
        return is_installed and family in FAMILIES and config.compile == "none"
    if config.kernels == "torch":
        return False
    if family not in FAMILIES:
        raise ModelError(
            f"model.kernels: Liger has no {family}, it knows {', '.join(sorted(FAMILIES))}; set "
            "model.kernels: auto"
        )
    if not is_installed:
        raise ModelError(
            "model.kernels: liger is not installed; pip install 'lapilli[liger]', or set "
            "model.kernels: auto"
        )
    if config.compile != "none":
        raise ModelError(
            f"model.kernels: liger with model.compile: {config.compile}, which fuses the same "
            "operations itself; set model.kernels: auto or model.compile: none"
        )
    return True
