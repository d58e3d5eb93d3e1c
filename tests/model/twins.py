"""Small models, and transformers' LLaVA with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

from lapilli.data.batches.collate import Batch, BatchShape, collate
from lapilli.data.dataset.dataset import Sample
from lapilli.model.config import LanguageConfig, ModelConfig, VisionConfig
from lapilli.model.interop.llava import LlavaForm
from lapilli.model.interop.llava_tower import TowerImages
from lapilli.model.vlm import VisionLanguageModel

IMAGE_ID, END_ID, VOCABULARY, SIDE = 60, 63, 64, 24  # transformers marks image slots in the ids
TOKENS = 9  # of an image
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}
DINOV2: dict[str, Any] = {**TOWER, "mlp_ratio": 2}
DINOV2.pop("intermediate_size")
TOWERS = {"clip": TOWER, "siglip": TOWER, "dinov2": DINOV2}
DECODER: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": VOCABULARY, "initializer_range": 0.2,
    "pad_token_id": 0,
}  # fmt: skip
# What some architectures cannot do without, or scale their embeddings and logits with.
MORE: dict[str, dict[str, Any]] = {
    "phi": {"num_key_value_heads": 2, "resid_pdrop": 0.0},
    "qwen3": {"head_dim": 12},
    "gemma": {"head_dim": 12},
    "gemma2": {"head_dim": 12, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 12},
    "gemma3_text": {"head_dim": 12, "query_pre_attn_scalar": 12},
    "cohere": {"logit_scale": 0.25},
    "stablelm": {"num_attention_heads": 3, "num_key_value_heads": 3},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0},
}


def config(
    tower: str = "clip",
    language: str = "llama",
    *,
    layer: int = -2,
    strategy: Any = "default",
    **values: Any,
) -> ModelConfig:
    """A model of a few thousand parameters in which everything learns."""
    fields: dict[str, Any] = {
        "trainable": ("vision", "projector", "language"),
        "head_chunk": 4,
        "seed": 1,
        **values,
    }
    return ModelConfig(
        vision=VisionConfig(
            tower,
            settings=TOWERS[tower],
            vision_feature_layer=layer,
            vision_feature_select_strategy=strategy,
        ),
        language=LanguageConfig(
            language, settings={**DECODER, **MORE.get(language, {})}, attention="eager"
        ),
        **fields,
    )


def llava_form(place: Path) -> LlavaForm:
    """A checkpoint in LLaVA's layout that lies in `place`, with the model's own tower."""
    return LlavaForm(TowerImages(SIDE, "pad"), place)


def transformers_twin(model: VisionLanguageModel) -> Any:
    """transformers' LLaVA with this model's weights; its tower keeps the layers ours leaves out."""
    vision, language = model.config.vision, model.config.language
    name = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}.get(
        vision.tower, vision.tower
    )
    strategy = "full" if vision.tower == "siglip" else vision.vision_feature_select_strategy
    made: Any = LlavaConfig(
        vision_config=AutoConfig.for_model(name, **vision.settings),
        text_config=AutoConfig.for_model(language.model_type, **language.settings),
        image_token_index=IMAGE_ID,
        vision_feature_layer=vision.vision_feature_layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=model.language.config.tie_word_embeddings,
    )
    made._attn_implementation = "eager"
    twin: Any = LlavaForConditionalGeneration(made).eval()
    parts: Any = model
    missing = twin.model.vision_tower.load_state_dict(
        parts.vision.encoder.state_dict(), strict=False
    )
    assert not missing.unexpected_keys
    twin.model.multi_modal_projector.linear_1.load_state_dict(parts.projector[0].state_dict())
    twin.model.multi_modal_projector.linear_2.load_state_dict(parts.projector[2].state_dict())
    twin.model.language_model.load_state_dict(model.language.model.state_dict())
    twin.lm_head = copy_of_head(model)
    return twin


def copy_of_head(model: VisionLanguageModel) -> torch.nn.Linear:
    """The head with its bias, which transformers' LLaVA has no place for (Phi has one)."""
    head = model.language.get_output_embeddings()
    copy = torch.nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)
    copy.load_state_dict(head.state_dict())
    return copy


def samples(seed: int, images: tuple[int, ...]) -> list[Sample]:
    """A sample of another length for each number of images."""
    generator = np.random.default_rng(seed)
    made = []
    for number, count in enumerate(images):
        text = generator.integers(1, 59, 6 + 3 * number).astype(np.int32)
        ids = np.insert(text, generator.integers(1, 5, count), -200)
        spans = np.array([[len(ids) - 4, len(ids) - 2], [len(ids) - 1, len(ids)]], np.int32)
        pixels = generator.integers(0, 256, (count, SIDE, SIDE, 3)).astype(np.uint8)
        made.append(Sample(f"sample-{number}", ids, spans, pixels))
    return made


def batch(images: tuple[int, ...], length: int = 48) -> Batch:
    """A batch of at most four rows with so many images each."""
    return collate(samples(7, images), BatchShape(4, (length,), TOKENS, 4), SIDE)


def inputs(batch: Batch, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """A batch as our model takes it."""
    names = ("input_ids", "position_ids", "merge_index", "pixels", "predict_positions", "targets")
    return {name: torch.from_numpy(getattr(batch, name)).to(device) for name in names}


def forward(model: VisionLanguageModel, batch: Batch) -> torch.Tensor:
    """The summed loss of a batch."""
    return model(**inputs(batch, model.language.device))


def loss_of_text(model: VisionLanguageModel, batch: Batch) -> torch.Tensor:
    """The summed loss of a batch without images from the language model's own logits."""
    logits = model.language(torch.from_numpy(batch.input_ids)).logits.flatten(0, 1)
    keep = batch.targets >= 0
    return torch.nn.functional.cross_entropy(
        logits[torch.from_numpy(batch.predict_positions[keep])],
        torch.from_numpy(batch.targets[keep]),
        reduction="sum",
    )


def normal_pixels(pixels: np.ndarray, model: VisionLanguageModel) -> torch.Tensor:
    """fp32 [N, 3, H, W], as transformers' image processors make them."""
    mean, std = (torch.tensor(v) for v in (model.config.vision.mean, model.config.vision.std))
    return ((torch.from_numpy(pixels).float() / 255 - mean) / std).permute(0, 3, 1, 2)


def transformers_inputs(model: VisionLanguageModel, batch: Batch) -> dict[str, Any]:
    """A batch as transformers' LLaVA takes it."""
    inputs: dict[str, Any] = {
        "input_ids": torch.from_numpy(np.where(batch.merge_index >= 0, IMAGE_ID, batch.input_ids)),
        "attention_mask": torch.from_numpy(batch.segment_ids),
    }
    if batch.num_images:
        inputs["pixel_values"] = normal_pixels(batch.pixels[: batch.num_images], model)
    return inputs
