"""Greedy decoding after a prompt with images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from lapilli.model.errors import ModelError
from lapilli.model.vlm import VisionLanguageModel

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["generate_greedy"]


@torch.inference_mode()
def generate_greedy(
    model: VisionLanguageModel,
    prompts: Sequence[NDArray[np.int64]],
    pixels: Sequence[NDArray[np.uint8]],
    *,
    end_id: int,
    max_new_tokens: int,
) -> list[list[int]]:
    """Continue each prompt with the likeliest token until `end_id`.

    Args:
        model: The model.
        prompts: int64 [n] each, a negative id (-200) at an image's place.
        pixels: uint8 [images, H, W, 3] each, in the order of the places.
        end_id: The token that ends an answer.
        max_new_tokens: Longest answer, in tokens.

    Returns:
        The new ids of each prompt, without `end_id`.

    Raises:
        ModelError: A prompt has more or fewer places than images; names it by its number.
    """
    for number, (ids, images) in enumerate(zip(prompts, pixels, strict=True)):
        if int((ids < 0).sum()) != len(images):
            raise ModelError(
                f"prompt {number}: {int((ids < 0).sum())} image places for {len(images)} images"
            )
    from transformers import GenerationConfig

    device = model.language.device
    input_ids, merge_index, mask = _left_pad(prompts, model.vision.num_tokens)
    stacked = torch.from_numpy(np.concatenate(pixels)).to(device)
    embedded = model.embed(input_ids.to(device), merge_index.to(device), stacked)
    produced = model.language.generate(
        inputs_embeds=embedded,
        attention_mask=mask.to(device),
        # the model's own settings may sample or penalise repetition
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=end_id,
            pad_token_id=end_id,
        ),
    )
    return [_until(row, end_id) for row in produced.tolist()]


def _until(ids: list[int], end_id: int) -> list[int]:
    return ids[: ids.index(end_id)] if end_id in ids else ids


def _left_pad(
    prompts: Sequence[NDArray[np.int64]], image_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Expand image places and align the prompts' ends: ids, merge index and mask, [B, S] each."""
    expanded = [np.repeat(p, np.where(p < 0, image_tokens, 1)) for p in prompts]
    shape = len(prompts), max(map(len, expanded))
    input_ids, merge_index = np.zeros(shape, np.int64), np.full(shape, -1, np.int32)
    mask = np.zeros(shape, np.int64)
    features = 0
    for row, ids in enumerate(expanded):
        start = shape[1] - len(ids)
        slots = ids < 0
        count = int(slots.sum())
        input_ids[row, start:] = np.where(slots, 0, ids)
        merge_index[row, start:][slots] = np.arange(features, features + count, dtype=np.int32)
        mask[row, start:] = 1
        features += count
    return torch.from_numpy(input_ids), torch.from_numpy(merge_index), torch.from_numpy(mask)
