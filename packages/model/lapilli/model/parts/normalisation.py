"""Mean and deviation of a tower's images: the config's, those beside the weights, the family's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lapilli.model.config import VisionConfig
from lapilli.model.parts.pretrained import check_readable, one_line
from lapilli.model.parts.vision import CONVNEXT, FAMILIES, TOWERS

__all__ = ["tower_mean", "with_normalisation"]


def with_normalisation(config: VisionConfig) -> VisionConfig:
    """A config with mean and std: its own, those that come with the weights, or the family's."""
    if config.tower not in TOWERS or (config.mean and config.std):
        return config
    family, given = FAMILIES.get(config.tower, FAMILIES["clip"]), _published(config)
    mean = config.mean or given.get("image_mean") or family.mean
    std = config.std or given.get("image_std") or family.std
    return replace(config, mean=_channels(mean), std=_channels(std))


def tower_mean(name: str) -> tuple[float, float, float]:
    """The mean that a tower subtracts from pixels in 0 to 1, per channel.

    Args:
        name: A family in `FAMILIES`, or the hub name or folder of a vision model.

    Raises:
        ModelError: There is no such model, or none whose mean is known.
    """
    if name in FAMILIES:
        return FAMILIES[name].mean
    with one_line(
        f"tower: {name!r} cannot be read; expected {', '.join(FAMILIES)}, or a vision model's hub "
        "name or folder with its config.json"
    ):
        from transformers import AutoConfig

        check_readable(name)
        kind = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
        family = kind.removesuffix("_vision_model")
        if family not in FAMILIES:
            raise ValueError(f"it is a {kind}")
    mean = with_normalisation(VisionConfig(tower=family, pretrained=name)).mean
    assert mean is not None  # a family has one
    return mean


def _channels(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _published(config: VisionConfig) -> dict[str, Any]:
    """`image_mean` and `image_std` as they come with the weights; empty if they do not."""
    pretrained = config.pretrained
    if config.tower == CONVNEXT:
        from lapilli.model.parts.convnext import published_norm

        given = published_norm(pretrained)
        return {"image_mean": given.get("mean"), "image_std": given.get("std")}
    if not pretrained:
        return {}
    from transformers.image_processing_base import ImageProcessingMixin

    check_readable(pretrained)
    try:
        return ImageProcessingMixin.get_image_processor_dict(pretrained)[0]
    except OSError:
        return {}
