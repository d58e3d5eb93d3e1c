"""Merge image features into text embeddings: the contract and its eager implementation.

One pass forward, one backward, no data-dependent shape and no host synchronisation. Each feature
row is used at most once, so its gradient is a copy and needs no atomics.

Shape suffix legend: B rows, S tokens, V vocabulary, D hidden size, F feature rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from lapilli.model.errors import ModelError
from lapilli.model.kernels.choice import choose_merge

__all__ = ["IMPLEMENTATIONS", "Implementation", "merge"]

Implementation = Literal["auto", "torch", "triton"]


class _TorchMerge(torch.autograd.Function):
    """The eager twin: what every faster implementation must equal."""

    @staticmethod
    def forward(
        ctx: Any,
        input_ids_BS: Tensor,
        merge_index_BS: Tensor,
        embedding_VD: Tensor,
        features_FD: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(input_ids_BS, merge_index_BS)
        ctx.sizes = embedding_VD.shape[0], features_FD.shape[0]
        merged_BSD = torch.nn.functional.embedding(input_ids_BS, embedding_VD)
        if features_FD.shape[0] == 0:
            return merged_BSD
        images_BSD = features_FD[merge_index_BS.clamp(min=0).long()]
        return torch.where((merge_index_BS >= 0).unsqueeze(-1), images_BSD, merged_BSD)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor | None, Tensor | None]:
        (gradient_BSD,) = gradients
        input_ids_BS, merge_index_BS = ctx.saved_tensors
        vocabulary, rows = ctx.sizes
        embedding_VD = features_FD = None
        if ctx.needs_input_grad[2]:
            text_BSD = gradient_BSD.masked_fill((merge_index_BS >= 0).unsqueeze(-1), 0.0)
            # sorts by id and sums segments on a GPU: deterministic, unlike index_add_
            embedding_VD = torch.ops.aten.embedding_dense_backward(
                text_BSD, input_ids_BS, vocabulary, -1, False
            )
        if ctx.needs_input_grad[3]:
            # text goes to a scratch row behind the features, so that no shape depends on the data
            scratch = torch.where(merge_index_BS >= 0, merge_index_BS, rows).flatten().long()
            padded = gradient_BSD.new_zeros(rows + 1, gradient_BSD.shape[-1])
            features_FD = padded.index_copy_(0, scratch, gradient_BSD.flatten(0, 1))[:rows]
        return None, None, embedding_VD, features_FD


def _torch(input_ids: Tensor, merge_index: Tensor, embedding: Tensor, features: Tensor) -> Tensor:
    merged = _TorchMerge.apply(input_ids, merge_index, embedding, features)
    assert isinstance(merged, Tensor)
    return merged


def _triton(input_ids: Tensor, merge_index: Tensor, embedding: Tensor, features: Tensor) -> Tensor:
    try:
        from lapilli.model.kernels.merge import merge_triton
    except ModuleNotFoundError:
        raise ModelError(
            "merge: triton is not installed; pip install triton, or set model.merge to torch"
        ) from None
    return merge_triton(input_ids, merge_index, embedding, features)


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "torch": _torch,
    "triton": _triton,
}


def merge(
    input_ids: Tensor,
    merge_index: Tensor,
    embedding: Tensor,
    features: Tensor,
    *,
    implementation: Implementation = "torch",
    check: bool = False,
) -> Tensor:
    """`features[merge_index]` where the index is >= 0, else `embedding[input_ids]`.

    Args:
        input_ids: int64 [B, S]; a safe id at image slots.
        merge_index: int32 [B, S]; the feature row of each slot, -1 for text.
        embedding: [V, D].
        features: [F, D], of the embedding's dtype; a row no slot names gets gradient zero.
        implementation: Which implementation; `auto` is Triton on CUDA and torch elsewhere
            (`lapilli.model.kernels.choice.choose_merge`). Another is never changed silently.
        check: For debugging: read the indices on the host and raise on a bad one.

    Returns:
        [B, S, D]. Differentiable in `embedding` and `features`.

    Raises:
        ModelError: Unknown implementation, one that this machine cannot run, or with `check` an
            index out of range or used twice.
    """
    if implementation == "auto":
        implementation = choose_merge(implementation, embedding.device.type)
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(("auto", *IMPLEMENTATIONS))
        raise ModelError(f"merge: {implementation!r} is unknown; expected one of {known}")
    if check:
        _check(input_ids, merge_index, embedding, features)
    return IMPLEMENTATIONS[implementation](input_ids, merge_index, embedding, features)


def _check(input_ids: Tensor, merge_index: Tensor, embedding: Tensor, features: Tensor) -> None:
    if not merge_index.numel():
        return
    used = merge_index[merge_index >= 0]
    if int(merge_index.min()) < -1 or int(merge_index.max()) >= features.shape[0]:
        raise ModelError(f"merge_index: outside -1 to {features.shape[0] - 1}; check the collator")
    if len(used.unique()) != len(used):
        raise ModelError("merge_index: a feature row is used twice; check the collator")
    if int(input_ids.min()) < 0 or int(input_ids.max()) >= embedding.shape[0]:
        raise ModelError(f"input_ids: outside 0 to {embedding.shape[0] - 1}; check the tokenizer")
