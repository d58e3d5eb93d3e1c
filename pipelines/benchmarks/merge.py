"""The merge forward and backward against the bytes it must move, and against other ways to merge.

The floor is the time that a plain copy takes for as many bytes. The ways take turns, round by
round; told are medians. On a GPU a round is timed by events, with the L2 cache flushed before it,
and the Triton kernels must not wait for the device; without one the eager twin and transformers'
way are timed on the CPU. `--compile` prints what ptxas makes of the kernels, which needs no GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lapilli.model.merging import merge
from lapilli.model.torch_internals import keep_gpu_busy
from pipelines.benchmarks.harness import add_row, provenance
from pipelines.benchmarks.sides.merge_kernels import compile_kernels
from pipelines.cli.command import parse, say

__all__ = ["MergeConfig", "main"]

Way = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
CAPABILITIES = (80, 90, 100)
FLUSH_BYTES = 256 * 2**20  # more than any card's L2 cache


@dataclass(frozen=True)
class MergeConfig:
    """What is measured; the defaults are 16 rows of LLaVA-1.5-7B with an image each.

    Attributes:
        rows: B.
        image_tokens: Feature rows of a row.
        text_tokens: Text of a row.
        hidden: D.
        vocabulary: V.
        dtype: bfloat16, float16 or float32.
        trains_embedding: Whether the embedding has a gradient.
        rounds: How often each way is timed.
        compiled: Measure torch.compile of the eager way too; on a CPU it needs a C++ compiler.
        compile: Print the kernels' registers and spills for sm_80, sm_90, sm_100, and stop.
        save: Add rows to `results/merge.csv`.
    """

    rows: int = 16
    image_tokens: int = 576
    text_tokens: int = 200
    hidden: int = 4096
    vocabulary: int = 32000
    dtype: str = "bfloat16"
    trains_embedding: bool = False
    rounds: int = 50
    compiled: bool = True
    compile: bool = False
    save: bool = True


def main(argv: Sequence[str]) -> int:
    """Measure, tell, and add a row for each way."""
    config = parse(MergeConfig, argv, "The merge against the bytes it must move.")
    if config.compile:
        return _tell_kernels(config)
    head = provenance(("torch", "transformers"), "merge", argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    head |= {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}
    for figures in measure(config, device):
        say(
            f"{figures['way']:>14}: forward {figures['forward_us']:>9} us "
            f"({figures['forward_of_copy']} of copy), backward {figures['backward_us']:>9} us "
            f"({figures['backward_of_copy']}), transient {figures['transient_mb']} MB"
        )
        if config.save:
            add_row("merge", head | figures)
    return 0


def _tell_kernels(config: MergeConfig) -> int:
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[config.dtype]
    for capability in CAPABILITIES:
        for kernel in compile_kernels(capability, hidden=config.hidden, dtype=short):
            say(
                f"sm_{capability:<4} {kernel.name:<26} {kernel.registers:>3} registers, "
                f"{kernel.spill_bytes} bytes spilled, loads of {kernel.widest_load} bytes, "
                f"cubin {len(kernel.cubin)} bytes"
            )
    return 0


def least_bytes(config: MergeConfig) -> tuple[int, int]:
    """Bytes that forward and backward must move: each input row read once, each output once."""
    size = torch.finfo(getattr(torch, config.dtype)).bits // 8
    images, text = config.rows * config.image_tokens, config.rows * config.text_tokens
    row, positions = config.hidden * size, images + text
    forward = 2 * positions * row + positions * (8 + 4) + images * 4
    backward = 2 * images * row + images * (4 + 4)
    if config.trains_embedding:
        backward += (text + config.vocabulary) * row + positions * (8 + 4)
    return forward, backward


def inputs(config: MergeConfig, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random ids, an image in the middle of every row, an embedding and features."""
    torch.manual_seed(0)
    dtype: torch.dtype = getattr(torch, config.dtype)
    length = config.image_tokens + config.text_tokens
    ids = torch.randint(0, config.vocabulary, (config.rows, length))
    start = config.text_tokens // 2
    index = torch.full(ids.shape, -1, dtype=torch.int32)
    images = torch.arange(config.rows * config.image_tokens, dtype=torch.int32)
    index[:, start : start + config.image_tokens] = images.view(config.rows, -1)
    embedding = torch.randn(config.vocabulary, config.hidden, dtype=dtype)
    features = torch.randn(len(images), config.hidden, dtype=dtype)
    return (
        ids.to(device),
        index.to(device),
        embedding.to(device).requires_grad_(config.trains_embedding),
        features.to(device).requires_grad_(),
    )


def ways(device: torch.device, *, compiled: bool = True) -> dict[str, Way]:
    """The ways by name; what needs a GPU is left out without one."""

    def masked_scatter(ids: Tensor, index: Tensor, table: Tensor, rows: Tensor) -> Tensor:
        """As transformers' LLaVA merges: the mask's count, then the scatter."""
        embedded = torch.nn.functional.embedding(ids, table)
        mask = (index >= 0).unsqueeze(-1).expand_as(embedded)
        assert embedded[mask].numel() == rows.numel()
        return embedded.masked_scatter(mask, rows)

    def index_copy(ids: Tensor, index: Tensor, table: Tensor, rows: Tensor) -> Tensor:
        embedded = torch.nn.functional.embedding(ids, table).flatten(0, 1)
        return embedded.index_copy(0, places, rows).view(*ids.shape, -1)

    def eager(*tensors: Tensor) -> Tensor:
        return merge(*tensors, implementation="torch")

    places = torch.empty(0)

    def with_places(ids: Tensor, index: Tensor, table: Tensor, rows: Tensor) -> Tensor:
        # positions come from the host in a real run; found once, outside what is timed
        nonlocal places
        if places.numel() != rows.shape[0]:
            places = (index.flatten() >= 0).nonzero().flatten()
        return index_copy(ids, index, table, rows)

    found: dict[str, Way] = {
        "torch": eager,
        "masked_scatter": masked_scatter,
        "index_copy": with_places,
    }
    if compiled:
        made: Any = torch.compile(eager)
        found["torch.compile"] = made
    if device.type == "cuda":
        found["triton"] = lambda *tensors: merge(*tensors, implementation="triton")
    return found


def measure(config: MergeConfig, device: torch.device) -> list[dict[str, Any]]:
    """Medians of each way, and how near they come to a copy of the bytes."""
    tensors = inputs(config, device)
    entries = ways(device, compiled=config.compiled)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in entries}
    merged = {name: way(*tensors) for name, way in entries.items()}
    assert all(torch.equal(value, merged["torch"]) for value in merged.values())
    gradient = torch.randn_like(merged.pop("torch"))
    del merged
    transient = {name: _transient(way, tensors, gradient) for name, way in entries.items()}
    if device.type == "cuda":
        _must_not_wait(entries["triton"], tensors, gradient)
    least = least_bytes(config)
    copies: list[tuple[float, float]] = []
    for _ in range(config.rounds):
        copies.append((_copy(least[0], device), _copy(least[1], device)))
        for name, way in entries.items():
            times[name].append(_round(way, tensors, gradient))
    floor = [statistics.median(column) for column in zip(*copies, strict=True)]
    rows: list[dict[str, Any]] = []
    for name, pairs in times.items():
        ours = [statistics.median(column) for column in zip(*pairs, strict=True)]
        rows.append({
            "way": name, "rows": config.rows, "image_tokens": config.image_tokens,
            "text_tokens": config.text_tokens, "hidden": config.hidden, "dtype": config.dtype,
            "trains_embedding": config.trains_embedding,
            "forward_bytes": least[0], "backward_bytes": least[1],
            "copy_gb_per_s": round(least[0] / floor[0] / 1e9, 1),
            "forward_us": round(ours[0] * 1e6, 1), "backward_us": round(ours[1] * 1e6, 1),
            "forward_of_copy": round(floor[0] / ours[0], 3),
            "backward_of_copy": round(floor[1] / ours[1], 3),
            "transient_mb": transient[name],
        })  # fmt: skip
    return rows


def _copy(moved: int, device: torch.device) -> float:
    """Seconds in which a plain copy moves as many bytes, read and written together."""
    source = torch.zeros(moved // 8, dtype=torch.int32, device=device)
    return _seconds(source.clone, device)[0]


def _round(way: Way, tensors: tuple[Tensor, ...], gradient: Tensor) -> tuple[float, float]:
    ids, index, table, rows = tensors
    forward, merged = _seconds(lambda: way(ids, index, table, rows), gradient.device)
    backward, _ = _seconds(lambda: _gradients(merged, tensors, gradient), gradient.device)
    return forward, backward


def _gradients(merged: Tensor, tensors: tuple[Tensor, ...], gradient: Tensor) -> object:
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    return torch.autograd.grad(merged, leaves, gradient)


def _seconds(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    if device.type == "cpu":
        started = time.perf_counter()
        result = work()
        return time.perf_counter() - started, result
    torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device).zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # the host runs ahead meanwhile, so that its own time for a launch is not measured
    keep_gpu_busy(2_000_000)
    start.record()
    result = work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3, result


def _transient(way: Way, tensors: tuple[Tensor, ...], gradient: Tensor) -> float | str:
    """Most memory beyond what stays (the merged rows and the gradients), in MB."""
    if not gradient.is_cuda:
        return ""
    ids, index, table, rows = tensors
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    merged = way(ids, index, table, rows)
    kept = _gradients(merged, tensors, gradient)
    extra = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    del merged, kept
    return round(extra / 1e6, 1)


def _must_not_wait(way: Way, tensors: tuple[Tensor, ...], gradient: Tensor) -> None:
    """Raise where the host waits for the device."""
    ids, index, table, rows = tensors
    torch.cuda.set_sync_debug_mode("error")
    try:
        _gradients(way(ids, index, table, rows), tensors, gradient)
    finally:
        torch.cuda.set_sync_debug_mode("default")
