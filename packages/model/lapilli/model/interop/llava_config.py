"""Write and read LLaVA's `config.json`.

LLaVA's code runs on transformers 4.37, which knows `rope_theta` beside `rope_scaling` and no
`rope_parameters`, computes the heads' size, and has two scalings of positions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lapilli.model.config import LanguageConfig, ModelConfig, Part, VisionConfig
from lapilli.model.errors import ModelError
from lapilli.model.interop.visper import aux_of, visper_settings
from lapilli.model.parts.llava_folder import (
    CONFIG,
    LANGUAGES,
    decoder_kind,
    decoder_settings,
    is_llava_config,
    read_config,
)
from lapilli.model.parts.pretrained import local_folder
from lapilli.model.parts.vision import CONVNEXT, FAMILIES, TransformersTower
from lapilli.model.vlm import AUX_PARTS, VisionLanguageModel

__all__ = [
    "CONFIG", "LANGUAGES", "TOWER_FOLDER", "LlavaSettings", "check_llava", "convnext_name",
    "is_llava_config", "llava_config", "llava_model", "read_config",
]  # fmt: skip

CONVNEXT_NAMES = ("CLIP-convnext_large", "CLIP-convnext_xxlarge")
CONVNEXT_SIZE = re.compile(r"(.*CLIP-convnext_.*)-res(\d{1,5})")  # VisPer-LM's own ending
TOWER_FOLDER = "mm_vision_tower"
"""In an export: the tower as it was trained, for LLaVA to load in the original's place."""

SCALINGS = ("linear", "dynamic")

FEATURES: dict[Literal["default", "full"], str] = {"default": "patch", "full": "cls_patch"}
"""LLaVA's `mm_vision_select_feature` by transformers' `vision_feature_select_strategy`."""


@dataclass(frozen=True)
class LlavaSettings:
    """What LLaVA's config says beside the language model's own.

    Attributes:
        tower: `mm_vision_tower`: a folder, or a hub name that begins with `openai` or `laion`.
        layer: `mm_vision_select_layer`.
        aspect: `image_aspect_ratio`: `pad`, or `square` for what the tower's image processor does.
        dtype: Of the weights.
    """

    tower: str
    layer: int
    aspect: Literal["pad", "square"]
    dtype: str


def check_llava(model: VisionLanguageModel) -> None:
    """Reject a model that LLaVA's config cannot express.

    Raises:
        ModelError: Names the part.
    """
    visper_settings(model.config.aux)
    vision, projector = model.config.vision, model.config.projector
    if vision.tower == CONVNEXT and model.config.aux.mode:
        convnext_name(model)
    elif vision.tower != "clip" or not isinstance(model.vision, TransformersTower):
        raise ModelError(
            f"vision.tower: {vision.tower}; LLaVA has CLIP towers only, and VisPer-LM {CONVNEXT} "
            "too, beside task tokens"
        )
    if vision.skip:
        raise ModelError(f"vision.skip: {vision.skip}; LLaVA takes all of a tower's patches")
    if not _is_projector(projector):
        raise ModelError(f"projector: {projector}; LLaVA has linear, mlpNx_gelu and identity")
    _language(model)


def convnext_name(model: VisionLanguageModel) -> str:
    """What VisPer-LM calls a ConvNeXt: the weights' name, with the images' size behind it.

    Raises:
        ModelError: Weights under a name that it does not know, or random ones.
    """
    name = model.config.vision.pretrained.rstrip("/")
    if not name.rpartition("/")[2].startswith(CONVNEXT_NAMES):
        raise ModelError(
            f"vision.pretrained: {name!r}; VisPer-LM knows a {CONVNEXT} by a name that begins with "
            f"{' or '.join(CONVNEXT_NAMES)}, as the hub has it; rename the folder"
        )
    place = str(Path(name).resolve()) if Path(name).is_dir() else name
    return f"{place}-res{model.vision.image_size}"


def llava_config(model: VisionLanguageModel, settings: LlavaSettings) -> dict[str, Any]:
    """What LLaVA builds a model of.

    Raises:
        ModelError: A part that LLaVA does not have.
    """
    check_llava(model)
    kind, aux = str(model.language.config.model_type), model.config.aux
    return (
        _language(model)
        | visper_settings(aux)
        | {
            "model_type": f"{'ola' if aux.mode else 'llava'}_{kind}",
            "architectures": [f"{'Ola' if aux.mode else ''}{LANGUAGES[kind]}"],
            "mm_projector_type": model.config.projector,
            "mm_hidden_size": model.vision.hidden_size,
            "mm_vision_tower": settings.tower,
            "mm_vision_select_layer": settings.layer,
            "mm_vision_select_feature": FEATURES[
                model.config.vision.vision_feature_select_strategy
            ],
            "mm_patch_merge_type": "flat",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "image_aspect_ratio": settings.aspect,
            "tokenizer_padding_side": "left",  # a batch then answers as its prompts do alone
            "use_mm_proj": True,
            "torch_dtype": settings.dtype,
        }
    )


def _language(model: VisionLanguageModel) -> dict[str, Any]:
    """The language model's settings in the words of transformers 4.37."""
    config: dict[str, Any] = model.language.config.to_dict()
    kind = str(config["model_type"])
    if kind not in LANGUAGES:
        raise ModelError(
            f"language: {kind}; LLaVA's loader has {' and '.join(LANGUAGES)}; export with --to hf"
        )
    for name in ("dtype", "transformers_version", "_name_or_path", "auto_map"):
        config.pop(name, None)
    heads = int(config["num_attention_heads"])
    size = config.pop("head_dim", None) or config["hidden_size"] // heads
    if size * heads != config["hidden_size"]:
        raise ModelError(
            f"language: heads of {size} times {heads} are not hidden_size "
            f"{config['hidden_size']}, as LLaVA's transformers has it; export with --to hf"
        )
    if config.pop("mlp_bias", False):
        raise ModelError("language: mlp_bias; LLaVA's transformers has none; export with --to hf")
    theta, scaling = _positions(config.pop("rope_parameters", None) or {}, kind)
    config.pop("rope_scaling", None)
    return config | {"rope_theta": theta} | ({"rope_scaling": scaling} if scaling else {})


def _positions(rope: Mapping[str, Any], kind: str) -> tuple[float, dict[str, Any] | None]:
    """`rope_theta` and `rope_scaling`."""
    scaling = str(rope.get("rope_type", "default"))
    theta = float(rope.get("rope_theta", 10000.0))
    if scaling == "default":
        return theta, None
    if scaling not in SCALINGS or kind != "llama" or float(rope.get("factor", 0)) <= 1:
        raise ModelError(
            f"language: rope_type {scaling}; LLaVA's transformers has {' and '.join(SCALINGS)}, "
            "for llama alone; export with --to hf"
        )
    return theta, {"type": scaling, "factor": float(rope["factor"])}


def llava_model(folder: Path, config: Mapping[str, Any], base: str = "") -> ModelConfig:
    """What a folder in LLaVA's layout is made of; every part learns.

    Args:
        folder: The folder.
        config: Its `config.json`.
        base: Folder of the language model that an adapter is for; empty where the folder has all
            weights.

    Raises:
        ModelError: A part that this package does not have, or a tower that is not here.
    """
    kind = decoder_kind(folder, config)
    merge, projector = config.get("mm_patch_merge_type", "flat"), config.get("mm_projector_type")
    aspect, projector = config.get("image_aspect_ratio"), projector or "linear"
    if merge != "flat" or aspect not in ("pad", "square", None):
        raise ModelError(
            f"{folder / CONFIG}: image_aspect_ratio {aspect} with mm_patch_merge_type {merge}; "
            "expected pad or square, and flat: an image has one square here"
        )
    if not _is_projector(str(projector)):
        raise ModelError(
            f"{folder / CONFIG}: mm_projector_type {projector}; expected linear, mlpNx_gelu or "
            "identity"
        )
    aux = aux_of(folder, config)
    parts: list[Part] = ["vision", "projector", "language"]
    parts.extend(part for part in AUX_PARTS if (aux.heads if part == "predictors" else aux.mode))
    return ModelConfig(
        vision=_tower(folder, config),
        language=_based(base, config) if base else _whole(folder, kind, config),
        projector=str(projector),
        trainable=tuple(parts),
        aux=aux,
    )


def _is_projector(name: str) -> bool:
    return name in ("linear", "identity") or bool(re.fullmatch(r"mlp[1-9]x_gelu", name))


def _based(base: str, config: Mapping[str, Any]) -> LanguageConfig:
    rows = config.get("vocab_size")
    return LanguageConfig(
        pretrained=base, allow_pickle=True, vocab_size=rows if isinstance(rows, int) else 0
    )


def _whole(folder: Path, kind: str, config: Mapping[str, Any]) -> LanguageConfig:
    settings = decoder_settings(folder, kind, config)
    return replace(LanguageConfig(model_type=kind), settings=settings)


def _tower(folder: Path, config: Mapping[str, Any]) -> VisionConfig:
    """The tower that the folder brings, or the one that it names."""
    own, named = folder / TOWER_FOLDER, str(config.get("mm_vision_tower") or "")
    if match := CONVNEXT_SIZE.fullmatch(named):
        return _convnext(folder, match[1], int(match[2]))
    found = own if own.is_dir() else local_folder(named)
    if not named or found is None:
        raise ModelError(
            f"{folder / CONFIG}: mm_vision_tower {named!r} is not on this machine; download it, or "
            "name a folder that has it"
        )
    name = str(found)
    kind = str(read_config(Path(name)).get("model_type", "clip")).removesuffix("_vision_model")
    if kind not in FAMILIES:
        raise ModelError(f"{name}: a {kind}; expected a tower of {', '.join(FAMILIES)}")
    layer, features = config.get("mm_vision_select_layer"), config.get("mm_vision_select_feature")
    strategies: dict[Any, Literal["default", "full"]] = {
        None: "default", **{feature: strategy for strategy, feature in FEATURES.items()}
    }  # fmt: skip
    if not isinstance(layer, int) or features not in strategies:
        raise ModelError(
            f"{folder / CONFIG}: mm_vision_select_layer {layer!r} and mm_vision_select_feature "
            f"{features!r}; expected a number, and patch or cls_patch"
        )
    return VisionConfig(
        tower=kind, pretrained=name, vision_feature_layer=layer,
        vision_feature_select_strategy=strategies[features], allow_pickle=True,
    )  # fmt: skip


def _convnext(folder: Path, name: str, size: int) -> VisionConfig:
    """The tower that VisPer-LM names, whose config is open_clip's."""
    found = local_folder(name, "open_clip_config.json")
    if found is None:
        raise ModelError(
            f"{folder / CONFIG}: mm_vision_tower {name!r} is not on this machine; download it"
        )
    return VisionConfig(
        tower=CONVNEXT, pretrained=str(found), vision_feature_layer=-1, image_size=size,
        allow_pickle=True,
    )  # fmt: skip
