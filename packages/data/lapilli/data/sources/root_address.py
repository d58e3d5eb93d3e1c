"""Recipes whose root is an address: each source then names its files by addresses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath
from typing import TypeVar

from lapilli.data.config import BuildConfig
from lapilli.data.io.addresses import ROOT_MARK, split_root
from lapilli.data.io.filesystems import is_remote

__all__ = ["moved_root", "with_root_address"]

Recipe = TypeVar("Recipe", bound=BuildConfig)
NOWHERE = "/"  # a root that no file of the recipe is below


def with_root_address(config: Recipe) -> Recipe:
    """The same recipe with a local root; a recipe whose root is a folder as it is.

    Paths of annotations and images below the root become addresses; absolute ones and addresses
    stay. The root is marked in those of images, which are named by their paths below it.
    """
    if not is_remote(config.root):
        return config
    root = config.root.rstrip("/")

    def below(path: str, slash: str = "/") -> str:
        if is_remote(path) or PurePosixPath(path).is_absolute():
            return path
        return f"{root}{slash}{'' if path == '.' else path.removeprefix('./')}"

    sources = [
        replace(
            source,
            annotations=below(source.annotations)
            if isinstance(source.annotations, str)
            else [below(one) for one in source.annotations],
            images=below(source.images, ROOT_MARK),
        )
        for source in config.sources
    ]
    return replace(config, root=NOWHERE, sources=sources)


def moved_root(config: Recipe, root: str) -> Recipe:
    """The recipe of a dataset with its annotations and images at another folder or address."""
    marked = [parts for one in config.sources if (parts := split_root(one.images))]
    if not marked:
        return with_root_address(replace(config, root=root))
    start = f"{marked[0][0]}/"

    def relative(path: str) -> str:
        return path.removeprefix(start)

    sources = [
        replace(
            source,
            annotations=relative(source.annotations)
            if isinstance(source.annotations, str)
            else [relative(one) for one in source.annotations],
            images=parts[1] or "." if (parts := split_root(source.images)) else source.images,
        )
        for source in config.sources
    ]
    return with_root_address(replace(config, root=root, sources=sources))
