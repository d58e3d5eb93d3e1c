"""Replace `fill: mean` of a recipe's views by the tower's colour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lapilli.data.images.view import ImageSpec
from lapilli.model.config import IMAGE_MEANS

__all__ = ["filled_views"]


def filled_views(views: Mapping[str, ImageSpec]) -> dict[str, ImageSpec]:
    """The views with `fill: mean` replaced by the colour that LLaVA and transformers pad with.

    Raises:
        ModelError: A tower that cannot be read; names it.
    """
    return {name: _filled(spec) for name, spec in views.items()}


def _filled(spec: ImageSpec) -> ImageSpec:
    if spec.fill != "mean":
        return spec
    red, green, blue = (int(255 * value) for value in _mean(spec.tower))
    return replace(spec, fill=(red, green, blue), tower="")


def _mean(tower: str) -> tuple[float, float, float]:
    if tower in IMAGE_MEANS:
        return IMAGE_MEANS[tower]
    from lapilli.model.parts.normalisation import tower_mean  # torch: a model's own files are read

    return tower_mean(tower)
