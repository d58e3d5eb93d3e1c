"""Recipes whose root is an address: each source then names its files by addresses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath
from typing import TypeVar

from lapilli.data.config import BuildConfig
from lapilli.data.io.filesystems import is_remote
from lapilli.data.io.remote_path import RemotePath

__all__ = ["with_root_address"]

Recipe = TypeVar("Recipe", bound=BuildConfig)
NOWHERE = "/"  # a root that no file of the recipe is below


def with_root_address(config: Recipe) -> Recipe:
    """The same recipe with a local root; a recipe whose root is a folder as it is.

    Paths of annotations and images below the root become addresses; absolute ones and addresses
    stay.
    """
    if not is_remote(config.root):
        return config
    root = RemotePath(config.root.rstrip("/"))

    def below(path: str) -> str:
        if is_remote(path) or PurePosixPath(path).is_absolute():
            return path
        return str(root) if path in (".", "") else str(root / path.removeprefix("./"))

    sources = [
        replace(
            source,
            annotations=below(source.annotations)
            if isinstance(source.annotations, str)
            else [below(one) for one in source.annotations],
            images=below(source.images),
        )
        for source in config.sources
    ]
    return replace(config, root=NOWHERE, sources=sources)
