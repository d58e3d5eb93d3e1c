"""Decoding after prompts with images: greedy or sampled, in batches, streamed if asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from lapilli.model.errors import ModelError
from lapilli.model.vlm import VisionLanguageModel

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Decoding", "Gathering", "generate", "generate_greedy"]

Gathering: TypeAlias = Callable[[Sequence[torch.nn.Parameter]], AbstractContextManager[None]]


@dataclass(frozen=True)
class Decoding:
    """How an answer is written.

    Attributes:
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 takes the likeliest token; above, tokens are drawn, and the higher the
            flatter.
        top_p: Drawn from the likeliest tokens that hold this share of the probability.
        seed: Of what is drawn.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        if self.max_new_tokens < 1:
            raise ModelError(f"max_new_tokens: {self.max_new_tokens}; expected at least 1")
        if self.temperature < 0:
            raise ModelError(f"temperature: {self.temperature}; expected 0 or more")
        if not 0.0 < self.top_p <= 1.0:
            raise ModelError(f"top_p: {self.top_p}; expected above 0, at most 1")


@torch.inference_mode()
def generate(
    model: VisionLanguageModel,
    prompts: Sequence[NDArray[np.int64]],
    pixels: Sequence[NDArray[np.uint8]],
    decoding: Decoding,
    *,
    end_ids: Sequence[int],
    on_tokens: Callable[[list[int]], None] | None = None,
    stop: Callable[[list[int]], bool] | None = None,
    gathered: Gathering | None = None,
) -> list[list[int]]:
    """Continue each prompt until one of `end_ids`.

    Args:
        model: The model.
        prompts: int64 [n] each, a negative id (-200) at an image's place.
        pixels: uint8 [images, H, W, 3] each, in the order of the places.
        decoding: Greedy or drawn, and how long.
        end_ids: Tokens that end an answer.
        on_tokens: Called with the newest id of every prompt after each step.
        stop: Asked after each step with an answer's ids so far; True ends that answer, which is
            how a text that spans several tokens ends one.
        gathered: For weights that the ranks of a process group have shared out: makes some whole
            inside. All ranks call this, and take as many steps as the last of them.

    Returns:
        The new ids of each prompt, without what ended it.

    Raises:
        ModelError: A prompt has more or fewer places than images; names it by its number.
    """
    for number, (ids, images) in enumerate(zip(prompts, pixels, strict=True)):
        if int((ids < 0).sum()) != len(images):
            raise ModelError(
                f"prompt {number}: {int((ids < 0).sum())} image places for {len(images)} images"
            )
    if not prompts:
        return []
    device = model.language.device
    input_ids, merge_index, mask = _left_pad(prompts, model.vision.num_tokens)
    stacked = torch.from_numpy(np.concatenate(pixels)).to(device)
    table = model.language.get_input_embeddings().weight  # `embed` reads it past its module
    with gathered([table]) if gathered else nullcontext():
        embedded = model.embed(input_ids.to(device), merge_index.to(device), stacked)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(decoding.seed)
        produced = model.language.generate(
            inputs_embeds=embedded,
            attention_mask=mask.to(device),
            generation_config=_settings(decoding, end_ids),
            stopping_criteria=[_watch(on_tokens, stop)],
            synced_gpus=gathered is not None,
        )
    return [_until(row, end_ids) for row in produced.tolist()]


def _settings(decoding: Decoding, end_ids: Sequence[int]) -> Any:
    """Settings for transformers; the model's own may sample or penalise repetition."""
    from transformers import GenerationConfig

    sampled: dict[str, Any] = {"temperature": decoding.temperature, "top_p": decoding.top_p}
    sampled["top_k"] = 0  # transformers' own default keeps 50
    return GenerationConfig(
        do_sample=decoding.temperature > 0,
        max_new_tokens=decoding.max_new_tokens,
        eos_token_id=list(end_ids),
        pad_token_id=end_ids[0],
        **(sampled if decoding.temperature > 0 else {}),
    )


def generate_greedy(
    model: VisionLanguageModel,
    prompts: Sequence[NDArray[np.int64]],
    pixels: Sequence[NDArray[np.uint8]],
    *,
    end_id: int,
    max_new_tokens: int,
) -> list[list[int]]:
    """`generate` with the likeliest token at each step."""
    return generate(model, prompts, pixels, Decoding(max_new_tokens), end_ids=[end_id])


def _watch(
    on_tokens: Callable[[list[int]], None] | None, stop: Callable[[list[int]], bool] | None
) -> Callable[..., torch.Tensor]:
    """A stopping criterion: it sees every step, of every prompt, in batches too."""

    def ended(ids_BS: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        del scores
        if on_tokens is not None:
            on_tokens([int(i) for i in ids_BS[:, -1].tolist()])
        if stop is None:
            return torch.zeros(len(ids_BS), dtype=torch.bool, device=ids_BS.device)
        return torch.tensor([stop(row) for row in ids_BS.tolist()], device=ids_BS.device)

    return ended


def _until(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    return next((ids[:n] for n, token in enumerate(ids) if token in end_ids), ids)


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
