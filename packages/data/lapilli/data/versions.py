"""Versions of installed packages, for what a dataset or run records about its making."""

from __future__ import annotations

import importlib.metadata

__all__ = ["ABSENT", "installed_versions"]

ABSENT = "not installed"


def installed_versions(*names: str) -> dict[str, str]:
    """The version of each distribution, `ABSENT` where it has none.

    A node that runs from a checkout has no metadata of lapilli, one that builds or trains in a
    single process need not have Ray.
    """
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ABSENT
    return found
