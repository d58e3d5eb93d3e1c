"""What lapilli uses of torch without a public way.

`tests/contracts/test_private_internals.py` looks whether the installed torch has each of them.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "FAKE_TENSOR_LOGGER", "FakeTensorMode", "TorchDispatchMode", "computes_fp16",
    "fused_attention_choice", "keep_gpu_busy", "set_tensor_data", "tensor_holders",
    "unset_fake_temporarily", "without_stacks",
]  # fmt: skip

# FakeTensorMode, unset_fake_temporarily, TorchDispatchMode: torch's manual names them by these
# private modules and has no others. If they move, importing this module raises ImportError.
FAKE_TENSOR_LOGGER = "torch._subclasses.fake_tensor"


@contextmanager
def without_stacks() -> Generator[None]:
    """Do not log the stack of an operation that fake tensors cannot do; it is raised all the same.

    Used: the logger of torch's private module; `torch._logging` has no level that leaves it out. If
    the logger is renamed, stacks are logged before the error's one line.
    """
    logger = logging.getLogger(FAKE_TENSOR_LOGGER)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def set_tensor_data() -> Generator[None]:
    """Let `Module.to` set fake tensors' data instead of swapping them with their successors.

    Used: that `Module.to` looks up `torch.utils.swap_tensors`, which fails where anything refers to
    a tensor weakly, as torch itself does. `torch.__future__` has a switch for real tensors alone.
    If it is looked up otherwise, a model that calls `to` cannot be sketched, and torch's error says
    so.
    """

    def set_data(tensor: Tensor, successor: Tensor) -> None:
        tensor.data = successor.data

    with patch("torch.utils.swap_tensors", set_data):
        yield


def tensor_holders(module: nn.Module) -> Sequence[dict[str, Any]]:
    """The dictionaries that hold a module's own tensors: parameters, buffers, plain attributes.

    Used: `_parameters` and `_buffers`. `register_parameter` refuses tensors that are no Parameter,
    and parameters made by a fake mode are of another class. If they went, AttributeError is raised.
    """
    own: Any = module
    return (own._parameters, own._buffers, vars(module))


def computes_fp16() -> bool:
    """Whether this processor computes fp16, as DeepSpeed asks too.

    Used: `torch.ops.mkldnn._is_mkldnn_fp16_supported`. `torch.cpu.get_capabilities` lists the
    processor's instructions, and not what torch's kernels can do with them. If it went,
    AttributeError is raised where fp16 is asked for on a CPU.
    """
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def fused_attention_choice(
    query: Tensor, key: Tensor, seen: Tensor | None, dropout: float, *, shares: bool
) -> str:
    """The kernel that `scaled_dot_product_attention` takes, in the small letters of its name.

    Used: `torch._fused_sdp_choice`, which it asks itself. The public `can_use_flash_attention` and
    its like tell what a kernel could do, and not which of them torch prefers on a card. If it went,
    AttributeError is raised where a run records its kernels.
    """
    torch_: Any = torch
    chosen = torch_._fused_sdp_choice(
        query, key, key, seen, dropout, seen is None, enable_gqa=shares
    )
    return SDPBackend(chosen).name.lower()


def keep_gpu_busy(cycles: int) -> None:
    """Occupy the GPU, so that the host's time for the launches that follow is not measured.

    Used: `torch.cuda._sleep`, in benchmarks alone; nothing public waits on the device. If it went,
    the benchmark raises AttributeError.
    """
    torch.cuda._sleep(cycles)  # pyright: ignore[reportPrivateUsage]
