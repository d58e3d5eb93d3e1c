"""Triton kernels that merge image features into text embeddings, as custom ops.

Forward copies one row from one of two places and notes where each feature row went, so that
backward is a gather: no atomics, one write of every gradient row, zero where a row is unused. A
trainable embedding's gradient is a stable sort by id and a segment sum in a fixed order.

Shape suffix legend: N = B x S positions, V vocabulary, D hidden size, F feature rows, C chunks of
`CHUNK` sorted positions.
"""
# Triton's compiler reads a kernel's arguments, not their types; launching casts to constants.
# ruff: noqa: ANN001, ANN202
# pyright: reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportArgumentType=false, reportReturnType=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from lapilli.model.errors import ModelError

__all__ = ["merge_triton"]

TILE_BYTES = 8192  # of a program; 4 warps then have four 16-byte loads each in flight
CHUNK = 64  # sorted positions whose sum is taken beforehand, if they are all of one id
# Triton decides when a kernel is defined, so once for the process.
INTERPRETED = knobs.runtime.interpret
SUM_ROWS = 8  # rows a step of the segment sum


@triton.jit(do_not_specialize=["rows"])
def merge_forward_kernel(
    ids, index, embedding, features, merged, places, rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    # neighbouring programs write the blocks of one row, so that DRAM pages are filled in order
    n = (program // blocks) * ROWS + tl.arange(0, ROWS)
    block = program % blocks
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = n < rows
    slot = tl.load(index + n, mask=inside, other=-1).to(tl.int64)
    token = tl.load(ids + n, mask=inside, other=0).to(tl.int64)
    is_image = slot >= 0
    whole = inside[:, None] & (d < D)[None, :]
    from_image = whole & is_image[:, None]
    from_text = whole & (slot < 0)[:, None]
    # a load that is masked off moves nothing: each row is read from one place
    image = tl.load(features + slot[:, None] * D + d[None, :], mask=from_image, other=0.0)
    text = tl.load(embedding + token[:, None] * D + d[None, :], mask=from_text, other=0.0)
    value = tl.where(is_image[:, None], image, text)
    tl.store(merged + n.to(tl.int64)[:, None] * D + d[None, :], value, mask=whole)
    tl.store(places + slot, n, mask=inside & is_image & (block == 0))


@triton.jit(do_not_specialize=["rows", "positions"])
def features_backward_kernel(
    gradient, index, places, result, rows, positions,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    f = (program // blocks) * ROWS + tl.arange(0, ROWS)
    d = (program % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = f < rows
    place = tl.load(places + f, mask=inside, other=-1)
    # `places` was never filled: an entry is true only if the index at that place points back
    possible = inside & (place >= 0) & (place < positions)
    is_used = possible & (tl.load(index + place, mask=possible, other=-1) == f)
    source = gradient + place.to(tl.int64)[:, None] * D + d[None, :]
    within = (d < D)[None, :]
    value = tl.load(source, mask=is_used[:, None] & within, other=0.0)
    target = result + f.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(target, value, mask=inside[:, None] & within)


@triton.jit(do_not_specialize=["positions"])
def segments_kernel(
    gradient, keys, order, first, last, partial, positions, vocabulary,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, SUM_ROWS: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    chunk = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    n = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = n < positions
    key = tl.load(keys + n, mask=inside, other=vocabulary)
    is_text = inside & (key < vocabulary) & (block == 0)
    before = tl.load(keys + n - 1, mask=inside & (n > 0), other=-1)
    after = tl.load(keys + n + 1, mask=n + 1 < positions, other=-1)
    tl.store(first + key, n, mask=is_text & (key != before))
    tl.store(last + key, n + 1, mask=is_text & (key != after))
    lowest = tl.load(keys + chunk * CHUNK)
    end = tl.minimum(chunk * CHUNK + CHUNK, positions)
    is_one_id = (end - chunk * CHUNK == CHUNK) & (tl.load(keys + end - 1) == lowest)
    if is_one_id & (lowest < vocabulary):
        d = block * BLOCK_D + tl.arange(0, BLOCK_D)
        total = tl.zeros((BLOCK_D,), SUM)
        for start in range(0, CHUNK, SUM_ROWS):
            m = chunk * CHUNK + start + tl.arange(0, SUM_ROWS)
            place = tl.load(order + m)
            source = gradient + place[:, None] * D + d[None, :]
            total += tl.sum(tl.load(source, mask=(d < D)[None, :], other=0.0).to(SUM), 0)
        tl.store(partial + chunk.to(tl.int64) * D + d, total, mask=d < D)


@triton.jit
def add_rows(
    total, gradient, order, begin, end, d,
    D: tl.constexpr, SUM_ROWS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    for start in range(begin, end, SUM_ROWS):
        m = start + tl.arange(0, SUM_ROWS)
        place = tl.load(order + m, mask=m < end, other=0)
        source = gradient + place[:, None] * D + d[None, :]
        mask = (m < end)[:, None] & (d < D)[None, :]
        total += tl.sum(tl.load(source, mask=mask, other=0.0).to(SUM), 0)
    return total


@triton.jit(do_not_specialize=["positions"])
def embedding_backward_kernel(
    gradient, keys, order, first, last, partial, result, positions,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, SUM_ROWS: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    v = tl.program_id(0) // blocks
    d = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = tl.load(first + v)
    possible = (begin >= 0) & (begin < positions)
    # as `places`: an entry is true only if the sorted ids there name this row
    is_used = possible & (tl.load(keys + begin, mask=possible, other=-1) == v)
    begin = tl.where(is_used, begin, 0)
    end = tl.where(is_used, tl.load(last + v), 0)
    head = tl.minimum((begin + CHUNK - 1) // CHUNK * CHUNK, end)
    tail = tl.maximum(end // CHUNK * CHUNK, head)
    total = tl.zeros((BLOCK_D,), SUM)
    total = add_rows(total, gradient, order, begin, head, d, D, SUM_ROWS, SUM)
    for chunk in range(head // CHUNK, tail // CHUNK):
        # several chunks lie between only where a whole one does, so head is a chunk's start
        total += tl.load(partial + tl.cast(chunk, tl.int64) * D + d, mask=d < D, other=0.0)
    total = add_rows(total, gradient, order, tail, end, d, D, SUM_ROWS, SUM)
    tl.store(result + v.to(tl.int64) * D + d, total.to(result.dtype.element_ty), mask=d < D)


def tile(hidden: int, itemsize: int) -> tuple[int, int]:
    """Columns and rows of a program: the least padding, then the widest."""
    widest = TILE_BYTES // itemsize
    widths = [16 << k for k in range(12) if 256 <= 16 << k <= widest]
    fitting = [w for w in widths if w < 2 * hidden] or [triton.next_power_of_2(hidden)]
    columns = min(fitting, key=lambda w: (-(-hidden // w) * w, -w))
    return columns, max(1, widest // columns)


def launchable(tensor: Tensor) -> bool:
    """Whether a kernel can run on the tensor's device; the interpreter takes any."""
    return tensor.is_cuda or INTERPRETED


@torch.library.custom_op("lapilli::merge", mutates_args=())
def merge_op(
    input_ids: Tensor, merge_index: Tensor, embedding: Tensor, features: Tensor
) -> tuple[Tensor, Tensor]:
    """Merged [B, S, D], and places [F] int32: where a feature row went, undefined for an unused."""
    rows, hidden, count = merge_index.numel(), embedding.shape[1], features.shape[0]
    merged = embedding.new_empty(*input_ids.shape, hidden)
    places = torch.empty(count, dtype=torch.int32, device=merged.device)
    if merged.numel():
        columns, tall = tile(hidden, merged.element_size())
        grid = (triton.cdiv(rows, tall) * triton.cdiv(hidden, columns),)
        merge_forward_kernel[grid](
            input_ids.contiguous(), merge_index.contiguous(), embedding.contiguous(),
            features.contiguous(), merged, places, rows, hidden, columns, tall,
        )  # fmt: skip
    return merged, places


@merge_op.register_fake
def _(
    input_ids: Tensor, merge_index: Tensor, embedding: Tensor, features: Tensor
) -> tuple[Tensor, Tensor]:
    del merge_index
    places = torch.empty(features.shape[0], dtype=torch.int32, device=features.device)
    return embedding.new_empty(*input_ids.shape, embedding.shape[1]), places


@torch.library.custom_op("lapilli::merge_features_backward", mutates_args=())
def features_backward_op(gradient: Tensor, merge_index: Tensor, places: Tensor) -> Tensor:
    """Gradient of the features [F, D]; zero for a row that stands nowhere."""
    rows, hidden = places.shape[0], gradient.shape[-1]
    result = gradient.new_empty(rows, hidden)
    if result.numel():
        columns, tall = tile(hidden, result.element_size())
        grid = (triton.cdiv(rows, tall) * triton.cdiv(hidden, columns),)
        features_backward_kernel[grid](
            gradient.contiguous(), merge_index.contiguous(), places, result, rows,
            merge_index.numel(), hidden, columns, tall,
        )  # fmt: skip
    return result


@features_backward_op.register_fake
def _(gradient: Tensor, merge_index: Tensor, places: Tensor) -> Tensor:
    del merge_index
    return gradient.new_empty(places.shape[0], gradient.shape[-1])


@torch.library.custom_op("lapilli::merge_embedding_backward", mutates_args=())
def embedding_backward_op(
    gradient: Tensor, input_ids: Tensor, merge_index: Tensor, vocabulary: int
) -> Tensor:
    """Gradient of the embedding [V, D], summed in fp32 (fp64 for fp64) in the positions' order."""
    rows, hidden = input_ids.numel(), gradient.shape[-1]
    result = gradient.new_empty(vocabulary, hidden)
    if not rows or not result.numel():
        return result.zero_()
    gradient = gradient.contiguous()
    # an image slot sorts behind every id
    ids = torch.where(merge_index >= 0, vocabulary, input_ids).flatten().int()
    keys, order = torch.sort(ids, stable=True)
    first = torch.empty(vocabulary, dtype=torch.int32, device=gradient.device)
    last = torch.empty_like(first)
    is_double = gradient.dtype == torch.float64
    chunks = triton.cdiv(rows, CHUNK)
    partial = gradient.new_empty(
        chunks, hidden, dtype=torch.float64 if is_double else torch.float32
    )
    columns = min(tile(hidden, 2)[0], 1024)
    settings = (hidden, columns, CHUNK, SUM_ROWS, tl.float64 if is_double else tl.float32)
    blocks = triton.cdiv(hidden, columns)
    segments_kernel[(chunks * blocks,)](
        gradient, keys, order, first, last, partial, rows, vocabulary, *settings
    )
    embedding_backward_kernel[(vocabulary * blocks,)](
        gradient, keys, order, first, last, partial, result, rows, *settings
    )
    return result


@embedding_backward_op.register_fake
def _(gradient: Tensor, input_ids: Tensor, merge_index: Tensor, vocabulary: int) -> Tensor:
    del input_ids, merge_index
    return gradient.new_empty(vocabulary, gradient.shape[-1])


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    input_ids, merge_index, embedding, _ = inputs
    ctx.save_for_backward(input_ids, merge_index, output[1])
    ctx.vocabulary = embedding.shape[0]


def _backward(
    ctx: Any, gradient: Tensor, _: Tensor | None
) -> tuple[None, None, Tensor | None, Tensor | None]:
    input_ids, merge_index, places = ctx.saved_tensors
    embedding = features = None
    if ctx.needs_input_grad[2]:
        embedding = embedding_backward_op(gradient, input_ids, merge_index, ctx.vocabulary)
    if ctx.needs_input_grad[3]:
        features = features_backward_op(gradient, merge_index, places)
    return None, None, embedding, features


merge_op.register_autograd(_backward, setup_context=_setup)


def merge_triton(
    input_ids: Tensor, merge_index: Tensor, embedding: Tensor, features: Tensor
) -> Tensor:
    """`lapilli.model.merging.merge` on a CUDA device, or anywhere under Triton's interpreter.

    Raises:
        ModelError: A device that no kernel runs on.
    """
    if not launchable(embedding):
        raise ModelError(
            f"merge: triton needs a CUDA device, the tensors are on {embedding.device.type}; set "
            "model.merge to torch"
        )
    return merge_op(input_ids, merge_index, embedding, features)[0]
