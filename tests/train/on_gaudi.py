"""A Gaudi that is a CPU: puts `tests/fake_gaudi` on the path and sends `hpu` to the CPU."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["on_gaudi"]

BRIDGE = Path(__file__).parents[1] / "fake_gaudi"
PACKAGE = "habana_frameworks"


class HpuIsCpu(TorchFunctionMode):
    """Inside, `hpu` is the CPU for tensors, once the bridge has registered it."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.pin_memory:
            return args[0]
        named = {name: _cpu(value) for name, value in (kwargs or {}).items()}
        return func(*map(_cpu, args), **named)


def _cpu(value: Any) -> Any:
    if not isinstance(value, torch.device | str) or str(value).partition(":")[0] != "hpu":
        return value
    if f"{PACKAGE}.torch.core" not in sys.modules:
        raise RuntimeError("hpu: the bridge that registers it is not imported")
    return torch.device("cpu")


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]
    sys.modules.pop("torch.hpu", None)
    if hasattr(torch, "hpu"):
        del torch.hpu  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def on_gaudi() -> Generator[list[str]]:
    """A machine with one HPU inside; yields what is called of the bridge, in order."""
    _forget()
    sys.path.insert(0, str(BRIDGE))
    importlib.invalidate_caches()
    calls: list[str] = importlib.import_module(PACKAGE).CALLS
    try:
        with HpuIsCpu():
            yield calls
    finally:
        sys.path.remove(str(BRIDGE))
        _forget()
