"""Frozen teachers whose features a build stores: named ones, or `package.module:name`."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from lapilli.data.config import TargetConfig
from lapilli.data.errors import DataError
from lapilli.data.io.whole_file import read_whole
from lapilli.data.record import excerpt
from lapilli.data.registry import load_named

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["TEACHERS", "Teacher", "load_teacher", "with_revision"]

# Loaded by name: they need torch and transformers, which this package does not.
TEACHERS = MappingProxyType(
    {
        "depth_anything_v2": "lapilli.model.auxiliary.teachers:depth_anything_v2",
        "oneformer": "lapilli.model.auxiliary.teachers:oneformer",
        "clip_image": "lapilli.model.auxiliary.teachers:clip_image",
        "dinov2": "lapilli.model.auxiliary.teachers:dinov2",
    }
)


class Teacher(Protocol):
    """Features of a batch of images."""

    def __call__(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[N, rows, width] of uint8 [N, size, size, 3], the same whatever the batch.

        An image that it refuses has a number that is not finite.
        """
        ...


_LOADED: dict[str, Teacher] = {}  # of this process, by settings; one at most


def load_teacher(target: TargetConfig) -> Teacher:
    """The teacher of a target's settings, loaded once a process.

    Raises:
        DataError: Unknown, or it cannot be loaded.
    """
    key = repr(target.facts())
    if key not in _LOADED:
        _LOADED.clear()
        _LOADED[key] = _load(target)
    return _LOADED[key]


def _load(target: TargetConfig) -> Teacher:
    name = TEACHERS.get(target.teacher, target.teacher)
    if ":" not in name:
        raise DataError(
            f"targets.teacher: {name!r} is unknown; expected one of {', '.join(TEACHERS)}, or "
            "package.module:name"
        )
    builder: Any = load_named(name, {}, object, what="targets.teacher")
    try:
        return builder(target)
    except Exception as error:  # of a teacher's own code
        said = excerpt(str(error), 300)
        raise DataError(f"targets.teacher: {target.teacher} cannot be made: {said}") from None


def with_revision(weights: str) -> str:
    """A hub name with the revision that this machine has of it; anything else as it is."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
        from huggingface_hub.file_download import repo_folder_name

        folder = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=weights, repo_type="model")
        revision = read_whole(folder / "refs" / "main", 1000).decode("ascii").strip()
    except (ImportError, OSError, ValueError, DataError):
        return weights
    return f"{weights}@{revision[:12]}"
