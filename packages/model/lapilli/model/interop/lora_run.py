"""Export a run with adapters as PEFT's folder and LLaVA's.

LLaVA's loader takes `config.json` and `non_lora_trainables.bin` from the same folder; PEFT's takes
`adapter_config.json` and `adapter_model.safetensors`. An adapter of the tower, which neither has a
place for, is a folder of its own for transformers' tower. The language model below the adapters is
written beside them where it lies nowhere else: random, or trained by an earlier run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lapilli.model.errors import ModelError
from lapilli.model.interop.foreign import BASE_FOLDER
from lapilli.model.interop.llava import LEFT_OVER, TOWER, VISION_FOLDER
from lapilli.model.interop.llava_config import CONFIG
from lapilli.model.interop.peft import PREFIX, adapter_of, write_adapter
from lapilli.model.interop.weights import (
    Progress,
    adapted_layers,
    plain_weights,
    write_weights,
)
from lapilli.model.parts.vision import CONVNEXT
from lapilli.model.parts.weight_files import save_tensors
from lapilli.model.vlm import VisionLanguageModel

__all__ = ["VISION_FOLDER", "check_adapters", "write_base", "write_lora_run"]


def check_adapters(model: VisionLanguageModel) -> None:
    """Refuse a model without adapters, or with parts that have no place beside them.

    Raises:
        ModelError: It has none, or task tokens, or a tower that is not transformers'.
    """
    if model.config.aux.mode:
        raise ModelError(
            f"aux.mode: {model.config.aux.mode}; adapters have no place for task tokens, export "
            "with --to llava"
        )
    if model.config.vision.tower == CONVNEXT:
        raise ModelError(
            f"vision.tower: {CONVNEXT} has no place beside adapters; generate from the run itself"
        )
    if model.config.lora is None or not any(map(adapted_layers, _parts(model).values())):
        raise ModelError(
            "lora: the model was trained without adapters; expected a run with model.lora, or "
            "export with --to hf or --to llava"
        )


def write_base(
    model: VisionLanguageModel,
    output: Path,
    dtype: torch.dtype,
    *,
    shard_size: str = "5GB",
    on_progress: Progress = lambda done, total: None,
) -> Path:
    """Write `base/`: the language model below its adapters, as transformers' causal model.

    Returns:
        The folder.
    """
    folder = output / BASE_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    weights = plain_weights(model.language, merged=False)
    if getattr(model.language.config, "tie_word_embeddings", False):
        weights.pop("lm_head.weight", None)
    write_weights(weights, folder, dtype, shard_size=shard_size, on_progress=on_progress)
    model.language.config.save_pretrained(folder)
    settings: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    settings.pop("quantization_config", None)
    settings |= {"architectures": [type(model.language).__name__]}
    settings |= {"dtype": str(dtype).removeprefix("torch.")}
    if isinstance(rope := settings.get("rope_parameters"), dict):  # for transformers below 5
        given: dict[str, Any] = {**rope}
        theta, kind = given.pop("rope_theta", None), given.pop("rope_type", "default")
        settings["rope_theta"] = theta
        if kind != "default":
            settings["rope_scaling"] = {"rope_type": kind, **given}
    (folder / CONFIG).write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return folder


def write_lora_run(
    model: VisionLanguageModel, output: Path, *, base: str = "", rows: int = 0
) -> list[Path]:
    """Write the adapters as PEFT's folders, and whatever else learnt as LLaVA's file.

    Args:
        model: A model with adapters.
        output: The folder: the language model's adapter, `non_lora_trainables.bin`, and
            `vision_tower/` with the tower's adapter.
        base: Hub name or folder of the language model that the adapter is for; empty for the one
            that the model's config names.
        rows: As `adapter_of` has it.

    Returns:
        The folders with an adapter.

    Raises:
        ModelError: The model has no adapter.
    """
    check_adapters(model)
    config, ours = model.config, _parts(model)
    assert config.lora is not None
    adapted = {part: module for part, module in ours.items() if adapted_layers(module)}
    output.mkdir(parents=True, exist_ok=True)
    folders: list[Path] = []
    for part, module in adapted.items():
        folder = output if part == "language" else output / VISION_FOLDER
        named = (base or config.language.pretrained, "CAUSAL_LM", rows)
        if part == "vision":
            named = (config.vision.pretrained, "", 0)
        adapter = adapter_of(module, config.lora, base=named[0], task=named[1], rows=named[2])
        write_adapter(adapter, folder)
        folders.append(folder)
    save_tensors(_left_over(model, adapted.keys()), output / LEFT_OVER)
    return folders


def _parts(model: VisionLanguageModel) -> dict[str, Any]:
    vision: Any = model.vision
    return {"language": model.language, "vision": getattr(vision, "encoder", vision)}


def _left_over(model: VisionLanguageModel, adapted: Any) -> dict[str, Tensor]:
    """What learnt without adapters, under the names it has in LLaVA's model within PEFT's.

    The projector always: LLaVA takes it from nowhere else.
    """
    names = {"projector": "model.mm_projector.", "vision": f"model.{TOWER}", "language": ""}
    if model.config.vision.tower != "dinov2":
        names["vision"] += "vision_model."
    found = {
        f"{PREFIX}{names[part]}{name}": value.detach()
        for part, module in _parts(model).items()
        if part not in adapted  # there a bias that learnt is in the adapter's file
        for name, value in module.named_parameters()
        if value.requires_grad
    }
    for name, weight in plain_weights(model.projector).items():
        found[f"{PREFIX}{names['projector']}{name}"] = weight.make()
    return {name: value.cpu().clone() for name, value in found.items()}
