"""Open edges: a name in a registry, or `package.module:name` for a part of one's own."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from lapilli.model.errors import ModelError

__all__ = ["load_builder"]


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
