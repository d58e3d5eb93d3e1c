"""Export a trained vision tower as a folder that LLaVA's loader accepts.

LLaVA reads its tower from what `mm_vision_tower` names, whatever weights lie in the checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lapilli.model.errors import ModelError
from lapilli.model.interop.llava_config import CONFIG, TOWER_FOLDER, convnext_name
from lapilli.model.interop.weights import Weight, plain_weights, write_weights
from lapilli.model.parts.trainable import is_adapter
from lapilli.model.parts.vision import CONVNEXT, FAMILIES, TransformersTower, build_tower
from lapilli.model.vlm import DTYPES, VisionLanguageModel

__all__ = ["PROCESSOR", "TowerImages", "published_tower", "tower_bytes", "write_tower"]

PROCESSOR = "preprocessor_config.json"
PREFIXES = ("openai", "laion")  # names that LLaVA takes without a folder
BICUBIC = 3
COUNTS = ("stage_names", "out_features", "out_indices")  # of DINOv2: they count all the layers


@dataclass(frozen=True)
class TowerImages:
    """How images become a tower's input; `lapilli.data` decides, as plain values.

    Attributes:
        size: Side of the square images, in pixels.
        aspect: `pad`, `crop` or `stretch`.
    """

    size: int
    aspect: str


def published_tower(
    model: VisionLanguageModel, images: TowerImages, *, for_llava: bool = True
) -> str:
    """Name of the tower as published: a hub name or an absolute path; empty if there is none.

    A ConvNeXt's weights lie in VisPer-LM's checkpoints, whatever its name stands for.
    Nothing where the weights are others than those published (they learnt, in this run or in an
    earlier one), or where the image processor beside them makes other input.

    Args:
        model: The model.
        images: How images become the tower's input.
        for_llava: Whether the name is one that LLaVA takes for a CLIP tower.
    """
    config, tower = model.config.vision, model.vision
    if config.tower == CONVNEXT and for_llava:  # the checkpoint has the weights
        return convnext_name(model)
    name = config.pretrained
    if not name or not isinstance(tower, TransformersTower) or tower.image_size != tower.own_size:
        return ""
    is_here = Path(name).is_dir()
    if for_llava and not is_here and not name.startswith(PREFIXES):
        return ""
    held: dict[str, Tensor] = tower.encoder.state_dict()
    if any(is_adapter(n) for n in held) or not _is_processor_same(model, images):
        return ""
    original: Any = build_tower(replace(config, mean=None, std=None))
    dtype = DTYPES[model.config.dtype]
    source = original.encoder.state_dict()
    if held.keys() != source.keys() or not all(
        torch.equal(v.cpu(), source[n].to(dtype).to(v.dtype)) for n, v in held.items()
    ):
        return ""
    return str(Path(name).resolve()) if is_here else name


def _is_processor_same(model: VisionLanguageModel, images: TowerImages) -> bool:
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        given: dict[str, Any] = ImageProcessingMixin.get_image_processor_dict(
            model.config.vision.pretrained
        )[0]
    except OSError:
        return False
    expected = _processor(model, images)
    same = ("image_mean", "image_std")
    if any(list(given.get(name) or []) != expected[name] for name in same):
        return False
    sizes = _side(given.get("size")), _side(given.get("crop_size"))
    if images.aspect == "stretch":
        square = given.get("size")
        is_square = isinstance(square, dict) and "height" in square
        return is_square and sizes[0] == images.size and not given.get("do_center_crop")
    is_short = not isinstance(given.get("size"), dict) or "shortest_edge" in given["size"]
    crops = given.get("do_center_crop", True) and sizes[1] == images.size
    return sizes[0] == images.size and (images.aspect == "pad" or (is_short and bool(crops)))


def _side(size: object) -> object:
    """The one number of a size that `preprocessor_config.json` spells in several ways."""
    if isinstance(size, dict):
        found: set[object] = set(size.values())  # pyright: ignore
        return found.pop() if len(found) == 1 else None
    return size


def tower_bytes(model: VisionLanguageModel, dtype: torch.dtype) -> int:
    """What `write_tower` writes, in bytes of weights."""
    return sum(
        value.numel() * dtype.itemsize
        for name, value in model.vision.named_parameters()
        if not is_adapter(name)
    )


def write_tower(
    model: VisionLanguageModel, output: Path, images: TowerImages, dtype: torch.dtype
) -> Path:
    """Write `mm_vision_tower/`: a folder of transformers' vision model, adapters merged.

    It has no layer behind the taken one, so that LLaVA's `mm_vision_select_layer` is -1.

    Returns:
        The folder.

    Raises:
        ModelError: A tower of one's own.
    """
    tower: Any = model.vision
    family = FAMILIES.get(model.config.vision.tower)
    if family is None:
        raise ModelError(
            f"vision.tower: {model.config.vision.tower} is no vision model of transformers; "
            "generate from the run itself"
        )
    folder = output / TOWER_FOLDER
    folder.mkdir(parents=True)
    below = "" if model.config.vision.tower == "dinov2" else "vision_model."
    weights = {below + name: weight for name, weight in plain_weights(tower.encoder).items()}
    for leaf, fill in (("weight", torch.ones), ("bias", torch.zeros)):
        name = f"{below}{family.norm}.{leaf}"
        weights.setdefault(name, Weight.of(fill(tower.hidden_size)))
    settings: dict[str, Any] = tower.encoder.config.to_dict()
    for name in ("dtype", "transformers_version", "_name_or_path", *COUNTS):
        settings.pop(name, None)
    settings |= {
        "architectures": [f"{family.prefix}Model"],
        "image_size": tower.image_size,
        "num_hidden_layers": len(tower.encoder.get_submodule(family.layers)),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    write_weights(weights, folder, dtype)
    for name, content in ((CONFIG, settings), (PROCESSOR, _processor(model, images))):
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    return folder


def _processor(model: VisionLanguageModel, images: TowerImages) -> dict[str, Any]:
    """CLIPImageProcessor's settings; LLaVA pads by itself before it."""
    vision, family = model.config.vision, FAMILIES[model.config.vision.tower]
    square = {"height": images.size, "width": images.size}
    is_stretched = images.aspect == "stretch"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": square if is_stretched else {"shortest_edge": images.size},
        "resample": BICUBIC,
        "do_center_crop": not is_stretched,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vision.mean or family.mean),
        "image_std": list(vision.std or family.std),
        "do_convert_rgb": True,
    }
