"""Record where Python asks the device for a value: what would stall a GPU, seen on a CPU.

A CPU tensor is read without a stall, so nothing shows there by itself. `device_reads` therefore
watches the operations whose result, or whose shape, the host has to wait for.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Read", "device_reads", "without_values"]

# Their result or its shape is known on the device alone (`item`, `bool`, `int` and `float` of a
# tensor all come to the first).
READING = frozenset(
    {
        "_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy",
        "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount",
    }
)  # fmt: skip
METHODS = ("tolist", "numpy", "cpu", "__array__")  # these pass the dispatcher by
MASKS = (torch.bool, torch.uint8)
TORCH, HERE = str(Path(torch.__file__).parent), str(Path(__file__))


@dataclass(frozen=True)
class Read:
    """One read.

    Attributes:
        operation: Torch's name of it.
        where: `file:line function` of the nearest caller outside torch.
    """

    operation: str
    where: str

    def __str__(self) -> str:
        return f"{self.operation} at {self.where}"


def _caller() -> str:
    for frame in reversed(traceback.extract_stack()):
        if frame.name == "__torch_function__":  # a device that is another one's (`on_gaudi`)
            continue
        if not frame.filename.startswith(TORCH) and frame.filename != HERE:
            return f"{frame.filename}:{frame.lineno} {frame.name}"
    return "torch"


def _reads(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the host waits for the operation's result or its shape."""
    if name in READING:
        return True
    if name == "repeat_interleave":
        return isinstance(args[0], Tensor) and kwargs.get("output_size") is None
    if name in ("index", "index_put", "index_put_"):
        masked = any(i is not None and i.dtype in MASKS for i in args[1])
        # one value at the places of a mask is a masked fill, whose shape is known
        return masked and (name == "index" or args[2].numel() != 1)
    if name == "_to_copy":
        to = kwargs.get("device")
        return to is not None and torch.device(to).type == "cpu" and args[0].device.type != "cpu"
    return False


class _Watch(TorchDispatchMode):
    def __init__(self, found: list[Read]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if _reads(name, args, kwargs or {}):
            self._found.append(Read(name, _caller()))
        return func(*args, **(kwargs or {}))


def _noting(name: str, found: list[Read]) -> Callable[..., Any]:
    original = getattr(Tensor, name)

    def noted(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(Read(name, _caller()))
        return original(self, *args, **kwargs)

    return noted


@contextmanager
def device_reads() -> Generator[list[Read]]:
    """Record reads by this thread, and by the backward passes that it starts on a CPU.

    Copies of a batch to the device, and reads of what never leaves the host, belong outside.
    """
    found: list[Read] = []
    with ExitStack() as stack:
        for name in METHODS:
            stack.enter_context(patch.object(Tensor, name, _noting(name, found)))
        stack.enter_context(_Watch(found))
        yield found


@contextmanager
def without_values(model: nn.Module) -> Generator[None]:
    """Give a model weights that have shapes and no values; whoever asks for one gets an error.

    They lie on the host: in a torch built without CUDA, indexing and the autograd engine stop at a
    fake `cuda` tensor.
    """
    # what no parameter or buffer is, such as a tower's mean, stays as it is
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, value in [*module.named_parameters(recurse=False)]:
                fake = nn.Parameter(torch.empty_like(value), requires_grad=value.requires_grad)
                module.register_parameter(name, fake)
            for name, value in [*module.named_buffers(recurse=False)]:
                setattr(module, name, torch.empty_like(value))
        yield
