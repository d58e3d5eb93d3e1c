"""Cross-entropy over the trained positions, as a sum; the step divides by the global count.

Shape suffix legend: B rows, S tokens, D hidden size, V vocabulary, P trained positions (of a
chunk, where one is worked on).
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, Literal

import torch
from torch import Tensor

from lapilli.model.errors import ModelError

__all__ = ["LossImplementation", "choose_loss", "trained_loss"]

IGNORE_INDEX = -100
LossImplementation = Literal["auto", "torch", "liger"]


def choose_loss(wanted: LossImplementation, device: str) -> Literal["torch", "liger"]:
    """Resolve an implementation of the loss for a device type.

    `auto` is `torch`: Liger reads the number of targets back to the host, which the rest of a step
    never does. What it saves on a GPU has not been measured.

    Raises:
        ModelError: Unknown, not installed, or not for this device.
    """
    if wanted in ("auto", "torch"):
        return "torch"
    if wanted != "liger":
        raise ModelError(
            f"model.kernels: {wanted!r} is unknown; expected one of auto, torch, liger"
        )
    if device != "cuda":
        raise ModelError(
            f"model.kernels: liger needs a CUDA device, this is {device}; set model.kernels: auto"
        )
    if importlib.util.find_spec("liger_kernel") is None:
        raise ModelError(
            "model.kernels: liger is not installed; pip install 'lapilli[liger]', or set "
            "model.kernels: auto"
        )
    return "liger"


def trained_loss(
    hidden: Tensor,
    positions: Tensor,
    targets: Tensor,
    head: Tensor,
    bias: Tensor | None = None,
    *,
    chunk: int,
    softcap: float | None = None,
    scale: float = 1.0,
    implementation: LossImplementation = "auto",
    each: Tensor | None = None,
    added: Tensor | None = None,
) -> Tensor:
    """Sum of the cross-entropies of the next token at the trained positions.

    No logit is computed for an image slot, a question or padding. The head works on `chunk`
    positions at a time, so logits take chunk x V and not P x V, and their gradient is taken while
    they are there: 6 P D V operations for a trained head, 4 P D V for a frozen one, where computing
    the logits again in backward takes 2 P D V more. A trained head's gradient is summed in fp32.

    Args:
        hidden: [B, S, D], the decoder's output after its last norm.
        positions: int64 [P], flattened positions in B x S.
        targets: int64 [P], the token that follows; -100 weighs nothing.
        head: [V, D], the output embedding.
        bias: [V], its bias, if it has one.
        chunk: Positions at once (Liger chooses its own).
        softcap: Logits become `softcap * tanh(logits / softcap)` (Gemma 2, arXiv 2408.00118).
        scale: Multiplies the logits, before soft-capping (Cohere's `logit_scale`, one over
            Granite's `logits_scaling`).
        implementation: `torch`, `liger` (a CUDA device and the extra `liger`), or `auto`
            (`choose_loss`).
        each: fp32 [P], filled with the loss of each position, detached; NaN with Liger, which
            returns the sum only.
        added: [R, D], what stands for the head's last R rows and learns beside a frozen head.

    Returns:
        fp32 scalar.

    Raises:
        ModelError: An implementation that this machine cannot run.
    """
    hidden_PD = hidden.flatten(0, 1).index_select(0, positions)
    if choose_loss(implementation, hidden.device.type) == "liger":
        if each is not None:
            each.fill_(torch.nan)
        if added is not None:
            head = torch.cat([head[: len(head) - len(added)], added])
        return _liger(hidden_PD, targets, head, bias, softcap, scale)
    loss = _ChunkedLoss.apply(hidden_PD, targets, head, bias, added, chunk, softcap, scale, each)
    assert isinstance(loss, Tensor)
    return loss


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradients in one pass over the chunks; backward only scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_PD: Tensor,
        targets_P: Tensor,
        head_VD: Tensor,
        bias_V: Tensor | None,
        added_RD: Tensor | None,
        chunk: int,
        softcap: float | None,
        scale: float,
        each_P: Tensor | None,
    ) -> Tensor:
        wants_hidden, _, wants_head, wants_bias, *_ = ctx.needs_input_grad
        first = len(head_VD) - (0 if added_RD is None else len(added_RD))
        known_VD = head_VD[:first]
        total = hidden_PD.new_zeros((), dtype=torch.float32)
        to_hidden = torch.empty_like(hidden_PD) if wants_hidden else None
        summed = torch.promote_types(head_VD.dtype, torch.float32)
        to_head = torch.zeros_like(head_VD, dtype=summed) if wants_head else None
        to_bias = head_VD.new_zeros(len(head_VD), dtype=summed) if wants_bias else None
        to_added = None if added_RD is None else torch.zeros_like(added_RD, dtype=summed)
        for start in range(0, len(targets_P), chunk):
            here = slice(start, start + chunk)
            logits_PV = _logits(hidden_PD[here], known_VD, bias_V, added_RD)
            losses_P, slope_PV = _chunk_loss(logits_PV, targets_P[here], softcap, scale)
            total += losses_P.sum().float()
            if each_P is not None:
                each_P[here] = losses_P
            if to_bias is not None:
                to_bias += slope_PV.sum(0)
            slope_PV = slope_PV.to(head_VD.dtype)
            if to_hidden is not None:
                torch.mm(slope_PV[:, :first], known_VD, out=to_hidden[here])
                if added_RD is not None:
                    to_hidden[here] += slope_PV[:, first:] @ added_RD
            if to_head is not None:
                _add_product(to_head[:first], slope_PV[:, :first], hidden_PD[here])
            if to_added is not None:
                _add_product(to_added, slope_PV[:, first:], hidden_PD[here])
        ctx.save_for_backward(to_hidden, to_head, to_bias, to_added)
        ctx.dtypes = head_VD.dtype, None if bias_V is None else bias_V.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        to_hidden, to_head, to_bias, to_added = ctx.saved_tensors
        head_dtype, bias_dtype = ctx.dtypes
        return (
            None if to_hidden is None else to_hidden * gradient.to(to_hidden.dtype),
            None,
            None if to_head is None else (to_head * gradient).to(head_dtype),
            None if to_bias is None else (to_bias * gradient).to(bias_dtype),
            None if to_added is None else (to_added * gradient).to(head_dtype),
            None, None, None, None,
        )  # fmt: skip


def _logits(
    hidden_PD: Tensor, known_VD: Tensor, bias_V: Tensor | None, added_RD: Tensor | None
) -> Tensor:
    """[P, V]: the head's output, with what its added rows give behind that of the others."""
    if added_RD is None:
        return torch.nn.functional.linear(hidden_PD, known_VD, bias_V)
    biases = (None, None) if bias_V is None else bias_V.split([len(known_VD), len(added_RD)])
    tables = zip((known_VD, added_RD), biases, strict=True)
    return torch.cat([torch.nn.functional.linear(hidden_PD, *table) for table in tables], 1)


def _add_product(total_VD: Tensor, slope_PV: Tensor, hidden_PD: Tensor) -> None:
    """Add a chunk's share of a table's gradient, in the sum's type."""
    if total_VD.dtype == slope_PV.dtype:
        total_VD.addmm_(slope_PV.T, hidden_PD)
    else:
        total_VD += slope_PV.T @ hidden_PD


def _chunk_loss(
    logits_PV: Tensor, targets_P: Tensor, softcap: float | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Loss of each position of a chunk, and its slope in the head's raw output, at least fp32."""
    logits_PV = logits_PV.to(torch.promote_types(logits_PV.dtype, torch.float32))
    if scale != 1.0:
        logits_PV = logits_PV * scale
    if softcap is not None:
        capped_PV = torch.tanh(logits_PV / softcap)
        logits_PV = capped_PV * softcap
    is_trained = targets_P != IGNORE_INDEX
    safe_P1 = targets_P.clamp(min=0).unsqueeze(1)
    sums_P1 = logits_PV.logsumexp(1, keepdim=True)
    losses_P1 = sums_P1 - logits_PV.gather(1, safe_P1)
    losses_P = losses_P1.squeeze(1) * is_trained
    slope_PV = logits_PV.sub_(sums_P1).exp_()
    slope_PV.scatter_add_(1, safe_P1, slope_PV.new_full((1, 1), -1.0).expand_as(safe_P1))
    slope_PV.mul_(is_trained.unsqueeze(1))
    if softcap is not None:
        slope_PV.mul_(1 - capped_PV.square())  # pyright: ignore[reportPossiblyUnboundVariable]
    return losses_P, slope_PV.mul_(scale) if scale != 1.0 else slope_PV


def _liger(
    hidden_PD: Tensor,
    targets_P: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    scale: float,
) -> Tensor:
    liger: Any = importlib.import_module("liger_kernel.transformers")

    loss = liger.LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORE_INDEX, reduction="sum", softcap=softcap, accum_dtype=torch.float32
    )
    if scale != 1.0:
        hidden_PD = hidden_PD * scale
        bias_V = None if bias_V is None else bias_V * scale
    return loss(head_VD, hidden_PD, targets_P, bias_V).float()
