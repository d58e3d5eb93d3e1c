"""What a run with adapters leaves for others: PEFT's folder, and LLaVA's beside it.

LLaVA's loader takes `config.json` and `non_lora_trainables.bin` from the same folder; PEFT's takes
`adapter_config.json` and `adapter_model.safetensors`. An adapter of the tower, which neither has a
place for, is a folder of its own for transformers' tower.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from lapilli.model.errors import ModelError
from lapilli.model.interop.files import save_tensors
from lapilli.model.interop.llava import LEFT_OVER, TOWER
from lapilli.model.interop.peft import PREFIX, adapter_of, write_adapter
from lapilli.model.interop.weights import adapted_layers
from lapilli.model.vlm import VisionLanguageModel

__all__ = ["VISION_FOLDER", "write_lora_run"]

VISION_FOLDER = "vision_tower"


def write_lora_run(model: VisionLanguageModel, output: Path, *, base: str = "") -> list[Path]:
    """Write the adapters as PEFT's folders, and whatever else learnt as LLaVA's file.

    Args:
        model: A model with adapters.
        output: The folder: the language model's adapter, `non_lora_trainables.bin`, and
            `vision_tower/` with the tower's adapter.
        base: Hub name or folder of the language model that the adapter is for; empty for the one
            that the model's config names.

    Returns:
        The folders with an adapter.

    Raises:
        ModelError: The model has no adapter.
    """
    config, ours = model.config, _parts(model)
    adapted = {part: module for part, module in ours.items() if adapted_layers(module)}
    if config.lora is None or not adapted:
        raise ModelError(
            "lora: the model was trained without adapters; expected a run with model.lora, or "
            "export with --to hf or --to llava"
        )
    output.mkdir(parents=True, exist_ok=True)
    folders: list[Path] = []
    for part, module in adapted.items():
        folder = output if part == "language" else output / VISION_FOLDER
        named = (base or config.language.pretrained, "CAUSAL_LM")
        if part == "vision":
            named = (config.vision.pretrained, "")
        write_adapter(adapter_of(module, config.lora, base=named[0], task=named[1]), folder)
        folders.append(folder)
    save_tensors(_left_over(model, adapted.keys()), output / LEFT_OVER)
    return folders


def _parts(model: VisionLanguageModel) -> dict[str, Any]:
    vision: Any = model.vision
    return {"language": model.language, "vision": getattr(vision, "encoder", vision)}


def _left_over(model: VisionLanguageModel, adapted: Any) -> dict[str, Tensor]:
    """What learnt without adapters, under the names it has in LLaVA's model within PEFT's."""
    names = {"projector": "model.mm_projector.", "vision": f"model.{TOWER}", "language": ""}
    if model.config.vision.tower != "dinov2":
        names["vision"] += "vision_model."
    parts = {**_parts(model), "projector": model.projector}
    return {
        f"{PREFIX}{names[part]}{name}": value.detach().cpu().clone()
        for part, module in parts.items()
        if part not in adapted  # there a bias that learnt is in the adapter's file
        for name, value in module.named_parameters()
        if value.requires_grad
    }
