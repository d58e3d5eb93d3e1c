"""Extension points: a name in a registry, or `package.module:name`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from lapilli.data.errors import DataError

__all__ = ["load_named"]

T = TypeVar("T")


def load_named(name: str, registry: Mapping[str, T], kind: type[T], *, what: str) -> T:
    """Look `name` up in `registry`, or import it if it has the form `package.module:name`.

    The working folder is not searched, unless PYTHONPATH names it.

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
        with _without_working_folder():
            found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"{what}: {name!r} does not import ({error}); install it, or put its folder into "
            "PYTHONPATH (the working folder is not searched by itself)"
        ) from None
    if not isinstance(found, kind):
        raise DataError(f"{what}: {name!r} is a {type(found).__name__}; expected a {kind.__name__}")
    return found


@contextmanager
def _without_working_folder() -> Generator[None]:
    """Take off the import path what `python -m` and `python -c` put first: the working folder.

    A folder that was downloaded may hold a module of any name. One that is installed, or named by
    PYTHONPATH, stays.
    """
    folder, before = str(Path.cwd()), [*sys.path]
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if folder not in {str(Path(path).absolute()) for path in named if path}:
        left_out = 0 if sys.flags.safe_path else 1
        left_out += named.count("") if any(named) else 0  # an empty entry means it too
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
