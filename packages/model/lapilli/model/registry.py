"""Extension points: a name in a registry, or `package.module:name`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from lapilli.model.errors import ModelError
from lapilli.model.torch_internals import tensor_holders, unset_fake_temporarily

__all__ = ["build_own", "load_builder"]


Part = TypeVar("Part", bound=nn.Module)


def build_own(build: Callable[[], Part]) -> Part:
    """Build a part of one's own, within a model of fake tensors too.

    Its code may compute with real tensors (a schedule, weights that it reads). Under fake tensors
    it runs with real ones, which are then replaced by fake ones.
    """
    with unset_fake_temporarily() as active:
        part = build()
    if active is None:
        return part
    mode: Any = active
    modules: list[Any] = [*part.modules()]
    for module in modules:
        for held in tensor_holders(module):
            found = {name: value for name, value in held.items() if isinstance(value, Tensor)}
            held.update({name: mode.from_tensor(value) for name, value in found.items()})
    return part


def load_builder(
    name: str, registry: Mapping[str, Callable[..., Any]], *, what: str
) -> Callable[..., Any]:
    """Look a builder up in `registry`, or import it if it has the form `package.module:name`.

    The working folder is not searched, unless PYTHONPATH names it.

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
        with _without_working_folder():
            found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ModelError(
            f"{what}: {name!r} does not import ({error}); install it, or put its folder into "
            "PYTHONPATH (the working folder is not searched by itself)"
        ) from None
    if not callable(found):
        raise ModelError(f"{what}: {name!r} is a {type(found).__name__}; expected a callable")
    return found


@contextmanager
def _without_working_folder() -> Generator[None]:
    """Take off the import path what `python -m` and `python -c` put first: where the user stands.

    A folder that was downloaded may hold a module of any name. One that is installed, or named by
    PYTHONPATH, stays.
    """
    folder, before = str(Path.cwd()), [*sys.path]
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if folder not in {str(Path(path).absolute()) for path in named if path}:
        left_out = 0 if sys.flags.safe_path else 1
        left_out += named.count("") if any(named) else 0  # an empty entry stands for it too
        for _ in range(left_out):
            place = next((n for n, path in enumerate(sys.path) if path in ("", folder)), None)
            if place is not None:
                del sys.path[place]
    shorter = [*sys.path]
    try:
        yield
    finally:
        added = [path for path in sys.path if path not in shorter]  # by what was imported
        sys.path[:] = [*added, *before]
