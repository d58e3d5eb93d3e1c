"""VisPer-LM's files: LLaVA's layout with task tokens, predictors and their settings beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lapilli.model.auxiliary.perceiver import HEAD_SIZE, HEADS
from lapilli.model.config import TARGET_SHAPES, AuxConfig
from lapilli.model.errors import ModelError
from lapilli.model.interop.weights import Weight, plain_weights
from lapilli.model.vlm import AUX_PARTS, VisionLanguageModel

__all__ = ["aux_of", "aux_parts", "visper_settings", "visper_weights"]

TASK, PREDICTS = AUX_PARTS
# What VisPer-LM calls layers and weight, by task.
PREFIXES = {
    "gen": ("img_layer_indices", "img_loss_weight"),
    "depth": ("depth_layer_indices", "depth_loss_weight"),
    "seg": ("seg_layer_indices", "seg_loss_weight"),
}
TOKENS = re.compile(r"(?:model\.)?(special_[a-z]+_tokens)")
PREDICTOR = re.compile(r"image_[a-z]+_heads\.\d+\..+|[a-z]+_logit_scale")
LEVELS = re.compile(r"\.linear_[23]\.")  # MLPs of a teacher's other levels, which no loss trains
TEACHERS = ("da_v2_head.", "dav2_backbone.", "oneformer.", "pipe.")  # kept beside by some runs


def visper_weights(model: VisionLanguageModel) -> dict[str, Weight]:
    """Task tokens and predictors under VisPer-LM's names; none of a model without.

    Its predictors of depth have three MLPs, of which its loss trains the first: the others are
    written as copies of that.
    """
    found: dict[str, Weight] = {}
    parts = dict(model.named_children())
    for name, weight in plain_weights(parts[TASK]).items() if TASK in parts else ():
        found[f"model.{name}"] = weight
    for name, weight in plain_weights(parts[PREDICTS]).items() if PREDICTS in parts else ():
        if name.endswith("logit_scale"):
            weight = Weight((), partial(_scalar, weight))
        found[name] = weight
        if ".linear_1." in name:
            for level in (2, 3):  # copies: safetensors takes no tensor twice
                found[name.replace("linear_1", f"linear_{level}")] = weight.then(torch.clone)
    return found


def _scalar(weight: Weight) -> Tensor:
    return weight.make().squeeze(0)


def visper_settings(aux: AuxConfig) -> dict[str, Any]:
    """What VisPer-LM's `config.json` says of them; empty without.

    Raises:
        ModelError: Tasks, or a number of layers, that it does not have.
    """
    if not aux.mode:
        return {}
    if unknown := [task for task in aux.tasks if task not in PREFIXES]:
        raise ModelError(f"aux.mode: {unknown[0]}; VisPer-LM has {', '.join(PREFIXES)}")
    found: dict[str, Any] = {"aux_mode": aux.mode, "num_task_tokens": aux.num_task_tokens}
    found["contrastive_loss_weight"] = aux.contrastive_weight
    for task in aux.tasks if aux.heads else ():
        rows, width = aux.shape(task)
        layers, weight = PREFIXES[task]
        found[f"image_{task}"] = {
            "depth": 1, "num_heads": HEADS, "dim_head": HEAD_SIZE, "ff_mult": 1,
            "num_tokens": rows, "output_dim": width,
            layers: "-".join(map(str, aux.layers.get(task, ()))),
            weight: aux.weight(task),
        }  # fmt: skip
    return found


def aux_of(folder: Path, config: Mapping[str, Any]) -> AuxConfig:
    """Task tokens and predictors of a `config.json`; none where it names none.

    Raises:
        ModelError: Settings that VisPer-LM does not write.
    """
    mode = config.get("aux_mode")
    if not mode:
        return AuxConfig()
    layers: dict[str, tuple[int, ...]] = {}
    weights: dict[str, float] = {}
    shapes: dict[str, tuple[int, int]] = {}
    try:
        for task, (indices_name, weight_name) in PREFIXES.items():
            if task not in str(mode).split("-") or f"image_{task}" not in config:
                continue
            said: Any = config[f"image_{task}"]
            if not (said["depth"], said["num_heads"], said["dim_head"], said["ff_mult"]) == (
                1, HEADS, HEAD_SIZE, 1
            ):  # fmt: skip
                raise ValueError(f"image_{task} of another size than 1 layer of 4 heads of 32")
            shape = int(said["num_tokens"]), int(said["output_dim"])
            if shape != TARGET_SHAPES[task]:
                shapes[task] = shape
            indices = str(said[indices_name])
            layers[task] = tuple(map(int, indices.split("-"))) if indices else ()
            weights[task] = float(said[weight_name])
        return AuxConfig(
            mode=str(mode),
            num_task_tokens=int(config["num_task_tokens"]),
            layers={task: found for task, found in layers.items() if found},
            weights=weights,
            contrastive_weight=float(config.get("contrastive_loss_weight", 0.3)),
            shapes=shapes,
        )
    except (KeyError, TypeError, ValueError, ModelError) as error:
        raise ModelError(
            f"{folder / 'config.json'}: aux_mode {mode!r}, and {error} is missing or wrong; "
            "expected VisPer-LM's settings"
        ) from None


def aux_parts(
    path: Path, tensors: dict[str, Tensor], model: VisionLanguageModel
) -> dict[str, dict[str, Tensor]]:
    """Take what is VisPer-LM's own out of a checkpoint's tensors, by part of ours.

    Predictors are left behind by a model that predicts nothing.

    Raises:
        ModelError: Task tokens, and a model without.
    """
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in AUX_PARTS}
    for name in [*tensors]:
        bare = name.removeprefix("module.")
        if match := TOKENS.fullmatch(bare):
            parts["task_tokens"][match[1]] = tensors.pop(name)
        elif PREDICTOR.fullmatch(bare):
            value = tensors.pop(name)
            if not LEVELS.search(bare):
                parts["predictors"][bare] = value.reshape(1) if not value.dim() else value
        elif bare.startswith(TEACHERS):
            del tensors[name]
    if parts["task_tokens"] and not model.config.aux.mode:
        tasks = ", ".join(sorted(parts["task_tokens"]))
        raise ModelError(f"{path}: has {tasks}; set model.aux.mode to its tasks in their order")
    if not model.config.aux.heads:
        parts["predictors"] = {}
    return parts
