"""A step's matrix products alone: the same operators on operands of the same sizes and strides.

The floor of a step that computes the same function with the same kernels for its products:
what it takes beyond is spent between products.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lapilli.model.torch_internals import TorchDispatchMode

__all__ = ["PRODUCTS", "Recorder", "product_seconds"]

PRODUCTS = frozenset({
    "aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::convolution",
    "aten::convolution_backward", "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
})  # fmt: skip
Call = Callable[[], object]


def product_seconds(step: Callable[[], None], rounds: int) -> float:
    """Median seconds of a step's products, attention's among them, without what stands between.

    Args:
        step: One whole step on a CPU, not compiled.
        rounds: Times that the products are run.

    Returns:
        Seconds of one step's products.
    """
    recorder = Recorder()
    with recorder:
        step()
    assert recorder.calls, "a step without a matrix product"
    found: list[float] = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        for call in recorder.calls:
            call()
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


class Recorder(TorchDispatchMode):
    """Keeps a call of each product that runs, on copies of its operands."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        if func.name().split(".")[0] in PRODUCTS:
            copies = [_copy(operand) for operand in args]
            self.calls.append(lambda: func(*copies, **kwargs))
        return func(*args, **kwargs)


def _copy(operand: Any) -> Any:
    """A tensor's numbers in memory of their own, laid out alike; anything else as it is."""
    if not isinstance(operand, Tensor):
        return operand
    memory = operand.untyped_storage().clone()
    copied = torch.empty(0, dtype=operand.dtype)
    return copied.set_(memory, operand.storage_offset(), operand.shape, operand.stride())
