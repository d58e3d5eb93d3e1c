"""Freeze parts, add adapters, group parameters, and set training modes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, cast

from torch import nn

from lapilli.model.config import LoraConfig, ModelConfig
from lapilli.model.deepspeed_internals import shape_of
from lapilli.model.errors import ModelError
from lapilli.model.parts.added_rows import ADDED, add_rows
from lapilli.model.parts.quantized import numbers_of
from lapilli.model.parts.qwen1 import qwen1_names
from lapilli.model.parts.recomputation import is_recomputed

__all__ = [
    "add_adapters", "base_name", "freeze", "group_of", "is_adapter", "parameter_counts",
    "parameter_groups", "set_modes", "trainable_parameters",
]  # fmt: skip

ADAPTED = ("language", "vision")
ALL = "all-linear"


def freeze(model: nn.Module, trainable: Collection[str]) -> None:
    """Train the named parts (direct children of `model`) and freeze the others.

    Weights in 4 bits are bytes, which have no gradient.
    """
    for name, child in model.named_children():
        for value in child.parameters():
            value.requires_grad_(name in trainable and value.is_floating_point())


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name; one shared by two modules is listed once."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def parameter_counts(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Numbers by part (direct children of `model`): all, and those that learn.

    Weights in 4 bits count as the numbers they stand for.
    """
    return {
        name: (
            sum(numbers_of(p) for p in part.parameters()),
            sum(numbers_of(p) for p in part.parameters() if p.requires_grad),
        )
        for name, part in model.named_children()
    }


def group_of(name: str) -> str:
    """Which of `GROUPS` a parameter belongs to: its part, or the adapters."""
    return "adapters" if is_adapter(name) else name.partition(".")[0]


def is_adapter(name: str) -> bool:
    """Whether a parameter was added to the model to learn: a low-rank matrix, or added rows."""
    return ".lora_" in name or ADDED in name.split(".")


def parameter_groups(model: nn.Module) -> dict[tuple[str, bool], list[nn.Parameter]]:
    """The parameters that learn, by (one of `GROUPS`, whether weight decay applies).

    Vectors (biases, norms' weights) get none.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, value in trainable_parameters(model).items():
        decays = len(shape_of(value)) >= 2
        groups.setdefault((group_of(name), decays), []).append(value)
    return groups


def base_name(name: str) -> str:
    """A parameter's name before adapters were put around its layer."""
    return name.replace(".base_layer.", ".")


def _trainable_parts(model: nn.Module) -> Collection[str]:
    return cast("ModelConfig", model.config).trainable


def add_adapters(model: nn.Module, lora: LoraConfig) -> None:
    """Put LoRA adapters (arXiv 2106.09685) on linear layers of the parts that learn.

    A part that gets any learns through them alone: its own weights freeze, but for biases by
    `lora.bias`. The head and the embeddings get none; rows that `language.vocab_size` adds to them
    learn by themselves (`AddedRows`) where the language model gets adapters. Layers of a Qwen-1 are
    matched by its own names too; q, k and v found as its fused `c_attn` share one A.

    Raises:
        ModelError: No layer is matched; lists the names there are.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    trainable = _trainable_parts(model)
    parts = [part for part in ADAPTED if part in trainable]
    layers = {part: _linear_layers(model, part) for part in parts}
    language: Any = model.get_submodule("language")
    fused = {n: theirs for n, theirs in qwen1_names(language).items() if _names(theirs, lora)}
    matched = {
        part: [
            name
            for name in names
            if _is_target(f"{part}.{name}", lora.target) or (part == "language" and name in fused)
        ]
        for part, names in layers.items()
    }
    if not any(matched.values()):
        raise ModelError(_nothing_matched(lora.target, layers))
    if lora.projector:
        matched["projector"] = _projector_layers(model)
    for part, names in matched.items():
        if names:
            settings = PeftConfig(
                r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, bias=lora.bias,
                target_modules=names,
                fan_in_fan_out=isinstance(model.get_submodule(f"{part}.{names[0]}"), Conv1D),
            )  # fmt: skip
            inject_adapter_in_model(settings, model.get_submodule(part))
    if matched.get("language"):
        _share_inputs(language, fused)
        add_rows(language)


def _projector_layers(model: nn.Module) -> list[str]:
    """The projector's linear layers; one that is a layer itself has no name below it."""
    found = _linear_layers(model, "projector")
    if not all(found) or not found:
        raise ModelError(
            f"lora.projector: true with projector {cast('Any', model.config).projector}, which has "
            "no linear layers inside; take mlp2x_gelu, or leave lora.projector out"
        )
    return found


def _names(path: str, lora: LoraConfig) -> bool:
    """Whether a target names a Qwen-1's layer by that model's own name."""
    return lora.target != ALL and _is_target(path, lora.target)


def _share_inputs(language: Any, fused: Mapping[str, str]) -> None:
    """Give layers that were one the A of the first: an adapter of the fused layer has one."""
    shared: dict[str, nn.Parameter] = {}
    for name, theirs in fused.items():
        first = language.get_submodule(name).lora_A["default"]
        first.weight = shared.setdefault(theirs, first.weight)


def _linear_layers(model: nn.Module, part: str) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    whole = model.get_submodule(part)
    language: Any = model.get_submodule("language")
    head = language.get_output_embeddings()
    return [
        name
        for name, module in whole.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]


def _is_target(path: str, target: str) -> bool:
    return target == ALL or bool(re.fullmatch(rf"(?:.*\.)?(?:{target})", path))


def _nothing_matched(target: str, layers: dict[str, list[str]]) -> str:
    kinds = sorted({name.rpartition(".")[2] for names in layers.values() for name in names})
    example = next((f"{part}.{names[0]}" for part, names in layers.items() if names), "none")
    return (
        f"lora.target: {target!r} matches no layer; expected all-linear or a regular expression "
        f"over {', '.join(kinds)} (or over whole paths such as {example})"
    )


def set_modes(model: nn.Module) -> None:
    """Dropout for what learns and for nothing else; loaded and random parts come in other modes."""
    trainable = _trainable_parts(model)
    for name, part in model.named_children():
        part.train(name in trainable)
        for module in part.modules():
            # transformers recomputes a layer only in training mode; its parts stay as they are
            if is_recomputed(module):
                module.training = True
