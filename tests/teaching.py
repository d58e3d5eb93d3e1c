"""Teachers for tests: means of an image's blocks, which a test computes by itself too."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapilli.data.config import TargetConfig

__all__ = ["block_means", "blocks", "dying", "odd", "wide"]

PATIENCE = 60.0  # seconds
Teacher = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


def block_means(pixels: NDArray[np.uint8], rows: int, width: int) -> NDArray[np.float32]:
    """[N, rows, width]: sine of the mean colours of square blocks times 1, 2, ..."""
    count, size = pixels.shape[:2]
    side = round(rows**0.5)
    grid = pixels.reshape(count, side, size // side, side, size // side, 3).astype(np.float64)
    means = grid.mean((2, 4, 5)).reshape(count, rows, 1) / 40
    return np.sin(means * np.arange(1, width + 1)).astype(np.float32)


def blocks(target: TargetConfig) -> Teacher:
    """A teacher of `block_means` that answers once `settings.loadings` of it have been loaded.

    `settings.seconds` is what an image takes it.
    """
    _note(target.settings)

    def teach(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        _wait_for_others(target.settings)
        time.sleep(float(target.settings.get("seconds", 0)) * len(pixels))
        return block_means(pixels, target.rows, target.width)

    return teach


def odd(target: TargetConfig) -> Teacher:
    """A teacher that gives no number for images that are dark on the left."""

    def teach(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        found = block_means(pixels, target.rows, target.width)
        found[pixels[:, :, 0].mean((1, 2)) < target.settings["least"]] = np.nan
        return found

    return teach


def dying(target: TargetConfig) -> Teacher:
    """A teacher whose process is killed the first time that it is asked."""
    teach = blocks(target)

    def once(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        try:
            (Path(target.settings["folder"]) / "died").touch(exist_ok=False)
        except FileExistsError:
            return teach(pixels)
        os.kill(os.getpid(), 9)
        raise AssertionError("unreachable")

    return once


def _note(settings: dict[str, Any]) -> None:
    """Count loadings, where a test asks for it."""
    if folder := settings.get("folder"):
        (Path(folder) / f"loaded-{os.getpid()}-{time.monotonic_ns()}").touch()


def _wait_for_others(settings: dict[str, Any]) -> None:
    """Wait for the other actors, so that the first does not do all while they start."""
    give_up = time.monotonic() + PATIENCE
    loadings = int(settings.get("loadings", 0))
    while loadings and len([*Path(settings["folder"]).glob("loaded-*")]) < loadings:
        if time.monotonic() > give_up:
            raise RuntimeError(f"{loadings} teachers were never loaded")
        time.sleep(0.02)


def wide(target: TargetConfig) -> Teacher:
    """A teacher whose vectors are longer than its settings say."""
    return lambda pixels: block_means(pixels, target.rows, target.width + 1)
