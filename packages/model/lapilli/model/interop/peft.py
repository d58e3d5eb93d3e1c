"""Read and write PEFT's LoRA folders without importing PEFT.

An adapter adds `(B A) s` to a layer's weight, s = alpha / r, or alpha / sqrt(r) where the folder
says `use_rslora` (Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lapilli.model.config import LoraConfig
from lapilli.model.errors import ModelError
from lapilli.model.interop.weights import adapted_layers, low_rank, plain_weights
from lapilli.model.parts.added_rows import added_rows, source_rows, table_names
from lapilli.model.parts.trainable import base_name, is_adapter
from lapilli.model.parts.weight_files import read_object, read_tensors, save_tensors

__all__ = [
    "PREFIX", "SETTINGS", "A", "Adapter", "B", "adapter_of", "merge_adapter", "read_adapter",
    "read_settings", "write_adapter",
]  # fmt: skip

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Adapter:
    """What a folder holds.

    Attributes:
        settings: `adapter_config.json`.
        tensors: By the adapted model's names: `layer.lora_A.weight` [r, in],
            `layer.lora_B.weight` [out, r], and whole tensors that were trained beside.
        origins: The name that a layer had in the folder, where `renamed` gave it another.
    """

    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    origins: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def base(self) -> str:
        """Hub name or folder of the model that it is for; empty where the folder does not say."""
        return str(self.settings.get("base_model_name_or_path") or "")

    def renamed(self, rename: Callable[[str], str | None]) -> Adapter:
        """The adapter by another model's names.

        Args:
            rename: A layer's or a tensor's new name; None leaves it out.
        """
        tensors: dict[str, Tensor] = {}
        origins: dict[str, str] = {}
        for name, value in self.tensors.items():
            end = next((end for end in (A, B) if name.endswith(end)), "")
            old = name.removesuffix(end)
            new = rename(old)
            if new is not None:
                tensors[new + end] = value
                origins[new] = old
        return replace(self, tensors=tensors, origins=origins)

    def scale(self, layer: str) -> float:
        """What a layer's product is multiplied by."""
        rank = self.tensors[layer + A].shape[0]
        alpha = float(self.settings["lora_alpha"])
        patterns: dict[str, float] = self.settings.get("alpha_pattern") or {}
        name = self.origins.get(layer, layer)
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                alpha = float(value)
                break
        return alpha / (rank**0.5 if self.settings.get("use_rslora") else rank)


def read_adapter(folder: Path) -> Adapter:
    """Read a LoRA folder.

    Raises:
        ModelError: Not there, damaged, or of another kind than LoRA on linear layers.
    """
    settings = read_settings(folder)
    new, old = folder / WEIGHTS, (folder / WEIGHTS).with_suffix(".bin")  # PEFT before 0.7, LLaVA's
    if not (new.is_file() or old.is_file()):
        raise ModelError(f"{folder}: no adapter can be read (no {WEIGHTS}); copy the file too")
    found = read_tensors(new if new.is_file() else old)
    if settings.get("peft_type") != "LORA" or settings.get("use_dora"):
        kind = "DoRA" if settings.get("use_dora") else settings.get("peft_type")
        raise ModelError(f"{folder}: an adapter of kind {kind}; expected LORA without DoRA")
    # a bias that was trained is named as it lay inside the adapted layer
    tensors = {
        name.removeprefix(PREFIX).replace(".base_layer.", "."): value
        for name, value in found.items()
    }
    for name in tensors:
        if ("lora_" in name and not name.endswith((A, B))) or "token_adapter" in name:
            raise ModelError(f"{folder}: {name}; expected LoRA on linear layers (lora_A, lora_B)")
        if name.endswith(A) and name.replace(A, B) not in tensors:
            raise ModelError(f"{folder}: {name} without its lora_B; the file is not whole")
    return Adapter(settings, tensors)


def read_settings(folder: Path) -> dict[str, Any]:
    """An adapter's `adapter_config.json`.

    Raises:
        ModelError: Not there, damaged, or without what an adapter of LoRA needs.
    """
    try:
        settings = read_object(folder / SETTINGS)
    except ModelError as error:
        raise ModelError(
            f"{folder}: no adapter can be read ({error}); expected {SETTINGS} and {WEIGHTS}"
        ) from None
    if settings.get("peft_type") == "LORA":
        _check_settings(folder, settings)
    return settings


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """The numbers that `Adapter.scale` takes are numbers."""
    patterns: object = settings.get("alpha_pattern") or {}
    given = [settings.get("lora_alpha")]
    if isinstance(patterns, dict):
        given += cast("dict[str, object]", patterns).values()
    if not isinstance(patterns, dict) or not all(type(one) in (int, float) for one in given):
        raise ModelError(
            f"{folder / SETTINGS}: lora_alpha {given[0]!r:.40} or an alpha_pattern is no number"
        )
    for pattern in cast("dict[str, object]", patterns):
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError):
            raise ModelError(
                f"{folder / SETTINGS}: alpha_pattern {pattern[:60]!r} is no regular expression"
            ) from None


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """Write a folder that PEFT's `PeftModel.from_pretrained` loads."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {
        PREFIX + _inside(adapter, name): value.contiguous()
        for name, value in adapter.tensors.items()
    }
    save_tensors(named, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / SETTINGS).write_text(json.dumps(dict(adapter.settings), indent=2), encoding="utf-8")


def _inside(adapter: Adapter, name: str) -> str:
    """A tensor's name in PEFT's model, whose layers have their adapter's around them."""
    layer, _, leaf = name.rpartition(".")
    return f"{layer}.base_layer.{leaf}" if layer + A in adapter.tensors else name


def adapter_of(
    part: nn.Module, lora: LoraConfig, *, base: str = "", task: str = "", rows: int = 0
) -> Adapter:
    """The adapter that a part was trained with, biases that learnt included.

    Args:
        part: A model's `language` or `vision.encoder`, with its adapters in it.
        lora: What they were made by.
        base: Hub name or folder of the model that the adapter is for.
        task: PEFT's name of what the model does: `CAUSAL_LM` for a language model.
        rows: Rows of a vocabulary that has grown, as its reader grows the base: a tokenizer's
            length. 0 takes all there are.

    Raises:
        ModelError: The part has no adapter.
    """
    layers = adapted_layers(part)
    if not layers:
        raise ModelError(f"{type(part).__name__}: trained without adapters; expected some in it")
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[name + A] = layer.lora_A["default"].weight.detach().cpu().clone()  # or shared
        tensors[name + B] = layer.lora_B["default"].weight.detach().cpu()
    for name, value in part.named_parameters():
        if value.requires_grad and not is_adapter(name):
            tensors[base_name(name)] = value.detach().cpu()
    if added_rows(part) is not None:  # whole tables, as PEFT saves those that were resized
        weights, most = plain_weights(part), max(rows, source_rows(part)) if rows else None
        if most is None or most > source_rows(part):  # else no token has a row that was added
            tables = {name: weights[name].make().cpu()[:most] for name in _own_tables(part)}
            tensors.update({name: value.clone() for name, value in tables.items()})
    settings = {
        "peft_type": "LORA",
        "task_type": task or None,
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": lora.bias,
        "fan_in_fan_out": bool(next(iter(layers.values())).fan_in_fan_out),
        "target_modules": sorted(layers),
    }
    return Adapter(settings, tensors)


def _own_tables(part: Any) -> list[str]:
    """The vocabulary's tables; a tied head is the embedding once more."""
    parameters = dict(part.named_parameters())
    return [name for name in table_names(part) if name in parameters]


@torch.no_grad()
def merge_adapter(adapter: Adapter, model: nn.Module) -> list[str]:
    """Add an adapter to the weights in place; tensors trained beside replace the model's.

    Args:
        adapter: The adapter.
        model: What was adapted; a whole model's `language` for an adapter of a language model.

    Returns:
        The names of the parameters that changed.

    Raises:
        ModelError: A layer that the model does not have, or has in another shape; then the model
            is as it was.
    """
    parameters = {
        base_name(name): value for name, value in model.named_parameters(remove_duplicate=False)
    }
    changes: dict[str, Tensor] = {}
    for name, value in adapter.tensors.items():
        if name.endswith(B):
            continue
        layer = name.removesuffix(A)
        target = f"{layer}.weight" if name.endswith(A) else name
        if target not in parameters:
            raise ModelError(f"adapter: {target} is not in the model; expected its base model")
        weight = parameters[target]
        new = weight.float() + _product(adapter, layer, weight) if name.endswith(A) else value
        if new.shape != weight.shape:
            raise ModelError(
                f"adapter: {target} of shape {tuple(new.shape)}, the model's has "
                f"{tuple(weight.shape)}; expected its base model"
            )
        changes[target] = new
    for name, value in changes.items():
        parameters[name].copy_(value)
    return sorted(changes)


def _product(adapter: Adapter, layer: str, weight: Tensor) -> Tensor:
    first, second = (adapter.tensors[layer + part].to(weight.device) for part in (A, B))
    is_transposed = bool(adapter.settings.get("fan_in_fan_out"))
    made = low_rank(first, second, adapter.scale(layer), is_transposed=is_transposed)
    if made.shape != weight.shape:
        raise ModelError(
            f"adapter: {layer} adapts shape {tuple(made.shape)}, the model's has "
            f"{tuple(weight.shape)}; expected its base model"
        )
    return made
