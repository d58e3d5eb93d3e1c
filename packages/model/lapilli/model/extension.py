"""Open edges: a name in a registry, or `package.module:name` for a part of one's own."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lapilli.model.errors import ModelError

__all__ = ["build_own", "load_builder"]


Part = TypeVar("Part", bound=nn.Module)


def build_own(build: Callable[[], Part]) -> Part:
    """Build a part of one's own, within a model of fake tensors too.

    What its code does with numbers (a schedule, weights that it reads) takes real tensors. Where
    fake ones are made, it gets those, and its tensors are then replaced by fake ones.
    """
    with unset_fake_temporarily() as active:
        part = build()
    if active is None:
        return part
    mode: Any = active
    modules: list[Any] = [*part.modules()]
    for module in modules:
        for held in (module._parameters, module._buffers, vars(module)):
            found = {name: value for name, value in held.items() if isinstance(value, Tensor)}
            held.update({name: mode.from_tensor(value) for name, value in found.items()})
    return part


def load_builder(
    name: str, registry: Mapping[str, Callable[..., Any]], *, what: str
) -> Callable[..., Any]:
    """Look a builder up in `registry`, or import it if it is spelt `package.module:name`.

    Raises:
        ModelError: Unknown name, a module that does not import, or something not callable.
    """
    if name in registry:
        return registry[name]
    module_name, separator, attribute = name.partition(":")
    if not separator:
        known = ", ".join(sorted(registry))
        raise ModelError(f"{what}: {name!r} is unknown; expected {known}, or package.module:name")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ModelError(f"{what}: {name!r} does not import ({error}); check PYTHONPATH") from None
    if not callable(found):
        raise ModelError(f"{what}: {name!r} is a {type(found).__name__}; expected a callable")
    return found
