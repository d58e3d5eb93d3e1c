"""Open edges: a name in a registry, or `package.module:name` for a part of one's own."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TypeVar

from lapilli.data.errors import DataError

__all__ = ["load_named"]

T = TypeVar("T")


def load_named(name: str, registry: Mapping[str, T], kind: type[T], *, what: str) -> T:
    """Look `name` up in `registry`, or import it if it is spelt `package.module:name`.

    Args:
        name: The name a recipe gives.
        registry: The names this package knows.
        kind: The class the imported object must be an instance of.
        what: The setting's name, for the error.

    Raises:
        DataError: Unknown name, module that does not import, or an object of another kind.
    """
    if name in registry:
        return registry[name]
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        known = ", ".join(sorted(registry))
        raise DataError(
            f"{what}: {name!r} is unknown; expected one of {known}, or package.module:name"
        )
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise DataError(f"{what}: {name!r} does not import ({error}); check PYTHONPATH") from None
    if not isinstance(found, kind):
        raise DataError(f"{what}: {name!r} is a {type(found).__name__}; expected a {kind.__name__}")
    return found
