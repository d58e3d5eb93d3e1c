"""transformers' `LlavaForConditionalGeneration` folder, written and read.

Weights keep their bits in both directions. The tower is written as it is held here, without the
layers behind the taken one, so its `vision_feature_layer` is -1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lapilli.model.config import LanguageConfig, ModelConfig, VisionConfig
from lapilli.model.errors import ModelError
from lapilli.model.pretrained import one_line
from lapilli.model.vlm import VisionLanguageModel, build_model

__all__ = ["FACTS", "Preprocessing", "read_facts", "read_hf", "write_hf", "write_processor"]

FACTS = "lapilli.json"
"""Beside transformers' files: what they have no place for."""

IMAGE_TOKEN = "<image>"


@dataclass(frozen=True)
class Preprocessing:
    """How images and messages become the model's input; `lapilli.data` decides, as plain values.

    Attributes:
        size: Side of the square images, in pixels.
        aspect: `pad`, `crop` or `stretch`.
        fill: RGB colour of the padding, 0 to 255.
        chat_template: Jinja source that writes messages with `<image>` at an image's place.
    """

    size: int
    aspect: str
    fill: tuple[int, int, int]
    chat_template: str


def _normalisation(model: VisionLanguageModel) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the pixels, as the tower takes them off."""
    vision = model.config.vision
    if vision.mean is None or vision.std is None:
        raise ModelError(
            f"vision: tower {vision.tower} has no mean and std of its own; set vision.mean and "
            "vision.std"
        )
    return vision.mean, vision.std


def write_processor(
    tokenizer: Any, model: VisionLanguageModel, how: Preprocessing, output: Path
) -> int:
    """Write tokenizer, image processor and chat template; `tokenizer` gets the image token.

    transformers' LLaVA processor pads with the image mean it normalises by.

    Returns:
        The image token's id.

    Raises:
        ModelError: A padding colour that the processor cannot have.
    """
    from transformers import AddedToken, LlavaImageProcessor, LlavaProcessor

    mean, std = _normalisation(model)
    padding = tuple(int(255 * value) for value in mean)
    if how.aspect == "pad" and tuple(how.fill) != padding:
        raise ModelError(
            f"view: pads with {tuple(how.fill)}; transformers' LLaVA processor pads with the "
            f"normalisation's mean {padding} alone, so it cannot be exported with its images"
        )
    square = {"height": how.size, "width": how.size}
    images = LlavaImageProcessor(
        do_pad=how.aspect == "pad",
        size=square if how.aspect == "stretch" else {"shortest_edge": how.size},
        do_center_crop=how.aspect != "stretch",
        crop_size=square,
        image_mean=list(mean),
        image_std=list(std),
    )
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=how.size // int(model.vision.num_tokens**0.5),
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which "default" takes off again
        image_token=IMAGE_TOKEN,
        chat_template=how.chat_template,
    )
    processor.save_pretrained(output)
    return int(processor.image_token_id)


def write_hf(
    model: VisionLanguageModel,
    output: Path,
    *,
    image_token_id: int,
    dtype: torch.dtype = torch.float32,
    facts: Mapping[str, Any] | None = None,
    shard_size: str = "5GB",
) -> None:
    """Write config and weights (safetensors, several files above `shard_size`).

    The image token needs a row of the embedding. Where the vocabulary has none left it grows by
    rows that are the mean of the others: their logit is the mean logit, which never is the
    largest.

    Args:
        model: The model.
        output: Folder to write; made if it is not there.
        image_token_id: Marks a feature's place in `input_ids`.
        dtype: Of the written weights.
        facts: JSON values kept beside, for `read_facts`.
        shard_size: Most bytes in one file, as transformers spells it.

    Raises:
        ModelError: A part that transformers' LLaVA does not have.
    """
    from transformers import LlavaForConditionalGeneration

    rows = max(model.vocab_size, image_token_id + 1)
    state = _to_hf(model, rows)
    with torch.device("meta"):
        twin: Any = LlavaForConditionalGeneration(_config(model, rows, image_token_id))
    # what has no counterpart here does not reach the output: the norm behind the taken layer
    norms = {name: value for name, value in twin.state_dict().items() if "post_layernorm" in name}
    for name, value in norms.items():
        fill = torch.ones if name.endswith("weight") else torch.zeros
        state[name] = fill(value.shape)
    twin.load_state_dict(state, assign=True, strict=True)
    twin.to(dtype)
    twin.tie_weights()
    output.mkdir(parents=True, exist_ok=True)
    twin.save_pretrained(output, max_shard_size=shard_size)
    kept = {**(facts or {}), "vocab_size": model.vocab_size}
    (output / FACTS).write_text(json.dumps(kept, indent=1), encoding="utf-8")


def read_facts(folder: Path) -> dict[str, Any]:
    """What `write_hf` kept beside transformers' files; empty for a folder of others."""
    path = folder / FACTS
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def read_hf(folder: Path | str) -> VisionLanguageModel:
    """The model of a `LlavaForConditionalGeneration` folder, in fp32; every part learns.

    Raises:
        ModelError: No such folder, or a part that this package does not have.
    """
    from transformers import LlavaForConditionalGeneration

    with one_line(
        f"{str(folder)!r} cannot be loaded; expected a folder that transformers' "
        "LlavaForConditionalGeneration wrote"
    ):
        twin: Any = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True
        )
    config = twin.config
    if config.vision_config.model_type != "clip_vision_model":
        raise ModelError(f"{folder}: tower {config.vision_config.model_type}; expected CLIP")
    if config.vision_feature_select_strategy != "default" or isinstance(
        config.vision_feature_layer, list
    ):
        raise ModelError(
            f"{folder}: takes {config.vision_feature_select_strategy!r} of layer "
            f"{config.vision_feature_layer}; expected the patches ('default') of one layer"
        )
    if config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
        raise ModelError(
            f"{folder}: projector {config.projector_hidden_act}; expected gelu, biased"
        )
    rows = int(read_facts(Path(folder)).get("vocab_size", config.text_config.vocab_size))
    model = build_model(_our_config(config, rows))
    _load(model, twin, rows)
    return model.eval()


def _our_config(config: Any, rows: int) -> ModelConfig:
    text: dict[str, Any] = config.text_config.to_dict()
    kind = str(text.pop("model_type"))
    return ModelConfig(
        VisionConfig(
            settings=_settings(config.vision_config), layer=int(config.vision_feature_layer)
        ),
        replace(
            LanguageConfig(kind), settings={**_settings(config.text_config), "vocab_size": rows}
        ),
        projector="mlp2x_gelu",
        trainable=("vision", "projector", "language"),
    )


def _settings(config: Any) -> dict[str, Any]:
    """What differs from the architecture's defaults, as a recipe would write it."""
    other = {"model_type", "transformers_version", "dtype", "architectures", "_name_or_path"}
    return {key: value for key, value in config.to_diff_dict().items() if key not in other}


def _load(model: VisionLanguageModel, twin: Any, rows: int) -> None:
    ours: Any = model
    kept = set(ours.vision.clip.state_dict())
    tower = twin.model.vision_tower.state_dict()
    ours.vision.clip.load_state_dict({n: value for n, value in tower.items() if n in kept})
    ours.projector[0].load_state_dict(twin.model.multi_modal_projector.linear_1.state_dict())
    ours.projector[2].load_state_dict(twin.model.multi_modal_projector.linear_2.state_dict())
    language = {f"model.{n}": v for n, v in twin.model.language_model.state_dict().items()}
    language |= {f"lm_head.{n}": v for n, v in twin.lm_head.state_dict().items()}
    ours.language.load_state_dict(
        {n: v[:rows] if _has_vocabulary(n) else v for n, v in language.items()}
    )


def _has_vocabulary(name: str) -> bool:
    return name.startswith("lm_head.") or name.endswith("embed_tokens.weight")


def _config(model: VisionLanguageModel, rows: int, image_token_id: int) -> Any:
    from transformers import LlavaConfig

    ours: Any = model
    vision = ours.vision.clip.config.to_dict()
    vision["num_hidden_layers"] = len(ours.vision.clip.encoder.layers)
    text = {**model.language.config.to_dict(), "vocab_size": rows}
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token_id,
        image_seq_length=model.vision.num_tokens,
        vision_feature_layer=-1,
        tie_word_embeddings=bool(text.get("tie_word_embeddings")),
    )


def _to_hf(model: VisionLanguageModel, rows: int) -> dict[str, Tensor]:
    """Our tensors under transformers' names."""
    ours: Any = model
    if model.config.vision.features != "patch":
        raise ModelError("vision.features: the export has no class token; expected patch")
    if not hasattr(ours.vision, "clip"):
        raise ModelError(
            f"vision.tower: {model.config.vision.tower} has no counterpart in transformers' LLaVA; "
            "expected clip"
        )
    if model.config.projector != "mlp2x_gelu":
        raise ModelError(
            f"projector: {model.config.projector} has no counterpart in transformers' LLaVA, which "
            "has two layers with GELU between; expected mlp2x_gelu"
        )
    tower = {f"model.vision_tower.{n}": v for n, v in ours.vision.clip.state_dict().items()}
    state = {n: v for n, v in tower.items() if "post_layernorm" not in n}
    for place, name in ((0, "linear_1"), (2, "linear_2")):
        for key, value in ours.projector[place].state_dict().items():
            state[f"model.multi_modal_projector.{name}.{key}"] = value
    for name, value in model.language.state_dict().items():
        grown = _grow(value, rows) if _has_vocabulary(name) else value
        below = name.removeprefix("model.")
        state[name if below == name else f"model.language_model.{below}"] = grown
    return {name: value.detach() for name, value in state.items()}


def _grow(value: Tensor, rows: int) -> Tensor:
    missing = rows - value.shape[0]
    if missing <= 0:
        return value
    mean = value.float().mean(0, keepdim=True).to(value.dtype)
    return torch.cat([value, mean.expand(missing, *value.shape[1:])])
