"""Generate after prompts with images: greedy or sampled, in batches, streaming tokens.

Only the weights and `Decoding` decide an answer. A base model's own generation settings
(`generation_config.json`, old keys of `config.json`, a `generate` method) are ignored.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakSet

import numpy as np
import torch

from lapilli.model.attention.forward import with_masks
from lapilli.model.config import Decoding
from lapilli.model.errors import ModelError
from lapilli.model.kernels.compiled import uncompiled
from lapilli.model.parts.positions import positions_of
from lapilli.model.vlm import VisionLanguageModel

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Draws", "Gathering", "Watch", "check_positions", "draw_key", "embed_prompts",
    "expanded_length", "generate", "generate_greedy", "next_logits",
]  # fmt: skip

Gathering: TypeAlias = Callable[[Sequence[torch.nn.Parameter]], AbstractContextManager[None]]
Watch: TypeAlias = Callable[[int, int], bool]
"""Called with a prompt's number and its newest id; True ends that answer."""


@torch.inference_mode()
def generate(
    model: VisionLanguageModel,
    prompts: Sequence[NDArray[np.int64]],
    pixels: Sequence[NDArray[np.uint8]],
    decoding: Decoding,
    *,
    end_ids: Sequence[int] = (),
    watch: Watch | None = None,
    gathered: Gathering | None = None,
) -> list[list[int]]:
    """Continue each prompt until one of `end_ids`, or until `watch` ends it.

    Args:
        model: The model.
        prompts: int64 [n] each, a negative id (-200) at an image's place.
        pixels: uint8 [images, H, W, 3] each, in the order of the places.
        decoding: Greedy or drawn, and how long.
        end_ids: Tokens each of which ends an answer.
        watch: Called with every new id of every running answer, except `end_ids`. Used to stream
            answers, and to end one at a text of several tokens.
        gathered: For weights that are partitioned over the ranks of a process group: makes some
            whole inside. All ranks call this, and take as many steps as the last of them.

    Returns:
        The new ids of each prompt: without one of `end_ids`, with the id at which `watch` ended it.

    Raises:
        ModelError: A prompt has more or fewer places than images, or more tokens than the language
            model has positions; names it by its number.

    Warns:
        UserWarning: Once for a model, if a rotary one is taken beyond its positions.
    """
    if not prompts:
        return []
    keys = [draw_key(decoding.seed, *one) for one in zip(prompts, pixels, strict=True)]
    draws = [Draws(keys, decoding)] if decoding.temperature > 0 else []
    answers = _Answers(len(prompts), end_ids, watch)
    _run(model, prompts, pixels, decoding, [*draws], answers, gathered)
    return answers.ids


@torch.inference_mode()
def next_logits(
    model: VisionLanguageModel,
    prompts: Sequence[NDArray[np.int64]],
    pixels: Sequence[NDArray[np.uint8]],
) -> torch.Tensor:
    """The logits of the token behind each prompt, of one forward of all of them.

    Args:
        model: The model.
        prompts: As `generate` takes them.
        pixels: Likewise.

    Returns:
        float32 [prompts, vocabulary], on the CPU.

    Raises:
        ModelError: As `generate`.
    """
    seen = _Logits()
    answers = _Answers(len(prompts), (), None)
    _run(model, prompts, pixels, Decoding(max_new_tokens=1), [seen], answers, None)
    return seen.logits_BV


class _Logits:
    """A logits processor that keeps the scores of the first step."""

    logits_BV: torch.Tensor

    def __call__(self, ids_BS: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        del ids_BS
        self.logits_BV = scores_BV.float().cpu()
        return scores_BV


def _run(
    model: VisionLanguageModel,
    prompts: Sequence[NDArray[np.int64]],
    pixels: Sequence[NDArray[np.uint8]],
    decoding: Decoding,
    processors: list[Any],
    answers: _Answers,
    gathered: Gathering | None,
) -> None:
    """Continue the prompts; `answers` sees every step."""
    embedded, mask = embed_prompts(model, prompts, pixels, decoding, gathered)
    with with_masks(model.language), uncompiled(model.config), _own_settings(model.language) as run:
        run(
            inputs_embeds=embedded,
            attention_mask=mask,
            generation_config=_settings(decoding),
            logits_processor=processors,
            stopping_criteria=[answers],
            synced_gpus=gathered is not None,
        )


def embed_prompts(
    model: VisionLanguageModel,
    prompts: Sequence[NDArray[np.int64]],
    pixels: Sequence[NDArray[np.uint8]],
    decoding: Decoding,
    gathered: Gathering | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of prompts aligned at their ends, [B, S, D], and their mask, [B, S].

    Raises:
        ModelError: As `generate`.
    """
    for number, (ids, images) in enumerate(zip(prompts, pixels, strict=True)):
        if int((ids < 0).sum()) != len(images):
            raise ModelError(
                f"prompt {number}: {int((ids < 0).sum())} image places for {len(images)} images"
            )
    lengths = [(f"prompt {n}", expanded_length(model, ids)) for n, ids in enumerate(prompts)]
    check_positions(model, lengths, decoding)
    device = model.language.device
    input_ids, merge_index, mask = _left_pad(prompts, model.image_tokens)
    stacked = torch.from_numpy(np.concatenate(pixels)).to(device)
    table = model.language.get_input_embeddings().weight  # `embed` reads it past its module
    with gathered([table]) if gathered else nullcontext():
        embedded = model.embed(input_ids.to(device), merge_index.to(device), stacked)
    return embedded, mask.to(device)


@contextmanager
def _own_settings(language: Any) -> Generator[Callable[..., torch.Tensor]]:
    """The `generate` of transformers itself, with nothing on the model to fill settings from.

    It fills what a given configuration leaves open from the model's, whatever names that has. A
    folder with code may also have put a `generate` of its own on the model; it is passed by.
    """
    from transformers import GenerationConfig
    from transformers.generation.utils import GenerationMixin

    of_the_base = language.generation_config
    language.generation_config = GenerationConfig()
    try:
        yield lambda **given: GenerationMixin.generate(language, **given)  # type: ignore[arg-type]
    finally:
        language.generation_config = of_the_base


def _settings(decoding: Decoding) -> Any:
    """Settings for transformers: always its likeliest token; `Draws` leaves it one to choose."""
    from transformers import GenerationConfig

    # finished rows are cut by `_Answers`, so the id of padding is never seen
    return GenerationConfig(
        do_sample=False, max_new_tokens=decoding.max_new_tokens, pad_token_id=0, use_cache=True
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


class _Answers:
    """A stopping criterion that collects the answers of all prompts, step by step."""

    def __init__(self, count: int, end_ids: Sequence[int], watch: Watch | None) -> None:
        self.ids: list[list[int]] = [[] for _ in range(count)]
        self._end_ids, self._watch = frozenset(end_ids), watch
        self._has_ended = [False] * count

    def __call__(self, ids_BS: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        del scores
        for row, newest in enumerate(ids_BS[:, -1].tolist()):
            if self._has_ended[row]:
                continue
            if newest in self._end_ids:
                self._has_ended[row] = True
                continue
            self.ids[row].append(newest)
            if self._watch is not None:
                self._has_ended[row] = self._watch(row, newest)
        return torch.tensor(self._has_ended, device=ids_BS.device)


class Draws:
    """A logits processor that leaves one token a row, drawn with the row's own numbers.

    Inverse transform: the token at which the cumulated probabilities, in the order of the ids,
    reach a uniform number. The number of step n is the n-th of a stream that the row's key seeds,
    so it depends on no other row.
    """

    def __init__(self, keys: Sequence[int], decoding: Decoding) -> None:
        streams = [np.random.Generator(np.random.Philox(key=key)) for key in keys]
        uniform = np.stack([stream.random(decoding.max_new_tokens) for stream in streams])
        self._uniform_BT = torch.from_numpy(1.0 - uniform).float()  # (0, 1]: never an empty token
        self._temperature, self._top_p = decoding.temperature, decoding.top_p

    def __call__(self, ids_BS: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        """Scores of minus infinity but for the token that is drawn; `ids_BS` are those so far."""
        # without its largest score a low temperature overflows to Inf
        scores_BV = scores_BV.float() - scores_BV.float().amax(-1, keepdim=True)
        shares_BV = torch.softmax(scores_BV / self._temperature, -1)
        if self._top_p < 1.0:
            shares_BV = _likeliest(shares_BV, self._top_p)
        cumulated_BV = shares_BV.cumsum(-1)
        uniform_B1 = self._uniform_BT[:, ids_BS.shape[1], None].to(scores_BV.device)
        is_reached_BV = (cumulated_BV >= uniform_B1 * cumulated_BV[:, -1:]) & (shares_BV > 0)
        drawn_B1 = is_reached_BV.to(torch.uint8).argmax(-1, keepdim=True)  # the first
        return torch.full_like(scores_BV, -torch.inf).scatter_(-1, drawn_B1, 0.0)


def _likeliest(shares_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero but for the fewest likeliest tokens that hold this share, at least one."""
    sorted_BV, order_BV = shares_BV.sort(dim=-1, descending=True, stable=True)
    is_kept_BV = sorted_BV.cumsum(-1) - sorted_BV < top_p
    is_kept_BV[:, 0] = True
    return torch.zeros_like(shares_BV).scatter_(-1, order_BV, sorted_BV * is_kept_BV)


def draw_key(seed: int, prompt: NDArray[np.int64], pixels: NDArray[np.uint8]) -> int:
    """What seeds an answer's draws: the seed and all that the model is shown."""
    found = hashlib.blake2b(digest_size=16)
    found.update(f"{seed} {len(prompt)} {pixels.shape}".encode())
    found.update(np.ascontiguousarray(prompt, "<i8").tobytes())
    found.update(np.ascontiguousarray(pixels).tobytes())
    return int.from_bytes(found.digest(), "little")


def expanded_length(model: VisionLanguageModel, prompt: NDArray[np.int64]) -> int:
    """Tokens of a prompt with those of its images."""
    return len(prompt) + int((prompt < 0).sum()) * (model.image_tokens - 1)


_TOLD: WeakSet[VisionLanguageModel] = WeakSet()


def check_positions(
    model: VisionLanguageModel,
    lengths: Iterable[tuple[str, int]],
    decoding: Decoding,
    *,
    strict: bool = False,
) -> None:
    """Compare prompts and their answers with the language model's positions.

    Args:
        model: The model.
        lengths: Name of each prompt, and its tokens with those of its images.
        decoding: How long answers may be.
        strict: Whether a model that can go beyond its positions may not.

    Raises:
        ModelError: The model cannot or may not go beyond its positions; names the prompt.

    Warns:
        UserWarning: Once for a model that can.
    """
    known = positions_of(model.language)
    if known is None:
        return
    for what, length in lengths:
        longest = length + decoding.max_new_tokens
        if longest <= known.limit:
            continue
        said = (
            f"{what}: {length} tokens and up to {decoding.max_new_tokens} new ones make {longest}, "
            f"the language model has {known.limit} positions"
        )
        if known.is_fixed or strict:
            raise ModelError(f"{said}; ask something shorter or lower max_new_tokens")
        if model not in _TOLD:
            _TOLD.add(model)
            warnings.warn(f"{said}; what it writes beyond them may be meaningless", stacklevel=2)


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
