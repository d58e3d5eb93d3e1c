"""Continue prompts side by side, which join and leave between steps.

Shape suffix legend: B rows, S positions of the longest row, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from lapilli.model.attention.forward import with_masks
from lapilli.model.config import Decoding
from lapilli.model.generate import Draws, draw_key, embed_prompts
from lapilli.model.kernels.compiled import uncompiled
from lapilli.model.vlm import VisionLanguageModel

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ContinuousBatch", "NewToken"]

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class NewToken:
    """A row's next token.

    Attributes:
        row: The number that `add` gave the row.
        token_id: The token.
        logprobs_V: float32 log probabilities of all tokens, on the CPU, for rows that want them.
    """

    row: int
    token_id: int
    logprobs_V: Tensor | None = None


@dataclass
class _Running:
    number: int
    draws: Draws | None
    wants_logprobs: bool
    length: int  # tokens written
    newest: int = 0


class ContinuousBatch:
    """Rows that are continued together, each as `generate` continues it alone.

    Keys and values of all rows lie in one cache, aligned at their ends; a new row is computed by
    itself and joins. A decoder that keeps a state instead of keys takes one row.

    Args:
        model: The model.
    """

    def __init__(self, model: VisionLanguageModel) -> None:
        self._model = model
        self._rows: list[_Running] = []
        self._cache: Any = None
        self._mask_BS = torch.zeros(0, 0, dtype=torch.int64)
        self._num_added = 0
        self._takes_positions = "position_ids" in signature(model.language.forward).parameters
        kinds = {*(getattr(model.language.config, "layer_types", None) or ATTENTION)}
        self._joins = kinds <= ATTENTION

    def __len__(self) -> int:
        """Rows that run."""
        return len(self._rows)

    @property
    def has_room(self) -> bool:
        """Whether another row can join now."""
        return self._joins or not self._rows

    @torch.inference_mode()
    def add(
        self,
        prompt: NDArray[np.int64],
        pixels: NDArray[np.uint8],
        decoding: Decoding,
        *,
        wants_logprobs: bool = False,
    ) -> NewToken:
        """Compute a prompt, and let it join.

        Args:
            prompt: int64 [n], a negative id at an image's place.
            pixels: uint8 [images, H, W, 3], in the order of the places.
            decoding: Greedy or drawn.
            wants_logprobs: Whether its tokens come with all log probabilities.

        Returns:
            Its first token.

        Raises:
            ModelError: More or fewer places than images, or too many tokens.
        """
        embedded_BSD, mask_BS = embed_prompts(self._model, [prompt], [pixels], decoding)
        drawn = decoding.temperature > 0
        key = draw_key(decoding.seed, prompt, pixels)
        row = _Running(
            number=self._num_added, draws=Draws([key], decoding) if drawn else None,
            wants_logprobs=wants_logprobs, length=0,
        )  # fmt: skip
        self._num_added += 1
        logits_BV, cache = self._forward(mask_BS, self._new_cache(), inputs_embeds=embedded_BSD)
        self._join(row, cache, mask_BS)
        return self._choose([row], logits_BV)[0]

    @torch.inference_mode()
    def step(self) -> list[NewToken]:
        """The next token of every row, in the order in which they came."""
        if not self._rows:
            return []
        newest_B1 = torch.tensor([[row.newest] for row in self._rows], device=self._device)
        one_B1 = torch.ones_like(newest_B1)
        self._mask_BS = torch.cat([self._mask_BS, one_B1], 1)
        logits_BV, self._cache = self._forward(self._mask_BS, self._cache, input_ids=newest_B1)
        return self._choose(self._rows, logits_BV)

    def remove(self, number: int) -> None:
        """End a row."""
        kept = [place for place, row in enumerate(self._rows) if row.number != number]
        if len(kept) == len(self._rows):
            return
        self._rows = [self._rows[place] for place in kept]
        if not kept:
            self._cache = None
            return
        chosen = torch.tensor(kept, device=self._device)
        mask_BS = self._mask_BS[chosen]
        unused = int(mask_BS.any(0).to(torch.uint8).argmax())
        self._mask_BS = mask_BS[:, unused:]
        for layer in self._cache.layers:
            layer.keys = layer.keys[chosen, :, unused:]
            layer.values = layer.values[chosen, :, unused:]

    @property
    def _device(self) -> torch.device:
        return self._model.language.device

    def _new_cache(self) -> Any:
        """A cache that keeps all keys, which can be joined; None for what the decoder makes."""
        if not self._joins:
            return None
        from transformers import DynamicCache

        return DynamicCache()

    def _forward(self, mask_BS: Tensor, cache: Any, **given: Tensor) -> tuple[Tensor, Any]:
        new = next(iter(given.values())).shape[1]
        if self._takes_positions:
            positions_BS = (mask_BS.cumsum(-1) - 1).clamp(min=0)
            given["position_ids"] = positions_BS[:, -new:]
        with _own_attention(self._model):
            found = self._model.language(
                **given, attention_mask=mask_BS, past_key_values=cache, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
        return found.logits[:, -1], found.past_key_values

    def _join(self, row: _Running, cache: Any, mask_BS: Tensor) -> None:
        self._rows.append(row)
        if self._cache is None:
            self._cache, self._mask_BS = cache, mask_BS
            return
        longest = max(self._mask_BS.shape[1], mask_BS.shape[1])
        old, new = longest - self._mask_BS.shape[1], longest - mask_BS.shape[1]
        self._mask_BS = torch.cat([pad(self._mask_BS, (old, 0)), pad(mask_BS, (new, 0))])
        for mine, other in zip(self._cache.layers, cache.layers, strict=True):
            for name in ("keys", "values"):
                both = (
                    pad(getattr(mine, name), (0, 0, old, 0)),
                    pad(getattr(other, name), (0, 0, new, 0)),
                )
                setattr(mine, name, torch.cat(both))

    def _choose(self, rows: list[_Running], logits_BV: Tensor) -> list[NewToken]:
        scores_BV = logits_BV
        for place, row in enumerate(rows):
            if row.draws is not None:
                written = torch.zeros(1, row.length, dtype=torch.int64)
                if scores_BV is logits_BV:
                    scores_BV = logits_BV.float()
                scores_BV[place] = row.draws(written, logits_BV[place : place + 1])[0]
        found: list[NewToken] = []
        for place, (row, token) in enumerate(zip(rows, scores_BV.argmax(-1).tolist(), strict=True)):
            logprobs = None
            if row.wants_logprobs:
                logprobs = torch.log_softmax(logits_BV[place].float(), -1).cpu()
            row.newest, row.length = token, row.length + 1
            found.append(NewToken(row.number, token, logprobs))
        return found


@contextmanager
def _own_attention(model: VisionLanguageModel) -> Generator[None]:
    with with_masks(model.language), uncompiled(model.config):
        yield
