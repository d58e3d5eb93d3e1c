"""Frozen teachers of transformers: features of a batch of images, for a build's targets.

Each builder takes a target's settings (`lapilli.data.config.TargetConfig`) and gives a function of
uint8 [N, size, size, 3] to float32 [N, rows, width]. A teacher runs on the GPU it finds, else on
the CPU, in fp32, and is loaded from safetensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor

from lapilli.model.config import IMAGE_MEANS
from lapilli.model.errors import ModelError
from lapilli.model.parts.pretrained import check_readable, one_line, without_report

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["TargetSettings", "Teaching", "clip_image", "depth_anything_v2", "dinov2", "oneformer"]

CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_STD = (0.229, 0.224, 0.225)

Teaching: TypeAlias = "Callable[[NDArray[np.uint8]], NDArray[np.float32]]"


class TargetSettings(Protocol):
    """What of a target's settings a teacher is made of."""

    @property
    def pretrained(self) -> str:
        """Hub name or folder of the weights."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the teacher's own."""
        ...

    @property
    def rows(self) -> int:
        """Vectors an image."""
        ...


def depth_anything_v2(target: TargetSettings) -> Teaching:
    """Depth-Anything-V2's encoder: the mean of its four levels, without the class token."""
    from transformers import DepthAnythingForDepthEstimation

    encoder = _loaded(DepthAnythingForDepthEstimation, target, ()).backbone

    def features(pixels_N3HW: Tensor) -> Tensor:
        levels = encoder(pixels_N3HW).feature_maps
        return torch.stack([level[:, 1:] for level in levels]).mean(0)

    return _teaching(encoder, features, "dinov2", IMAGENET_STD)


def oneformer(target: TargetSettings) -> Teaching:
    """OneFormer's encoder: its last map, resized bilinearly to the target's square of rows."""
    from transformers import OneFormerForUniversalSegmentation

    whole = _loaded(OneFormerForUniversalSegmentation, target, ())
    encoder, side = whole.model.pixel_level_module.encoder, round(target.rows**0.5)

    def features(pixels_N3HW: Tensor) -> Tensor:
        last_NCHW = encoder(pixels_N3HW).feature_maps[-1]
        resized = torch.nn.functional.interpolate(
            last_NCHW, size=(side, side), mode="bilinear", align_corners=False
        )
        return resized.flatten(2).mT

    return _teaching(encoder, features, "dinov2", IMAGENET_STD)


def clip_image(target: TargetSettings) -> Teaching:
    """CLIP's embedding of an image, on which Stable Diffusion's unCLIP is conditioned: one row."""
    from transformers import CLIPVisionModelWithProjection

    model = _loaded(CLIPVisionModelWithProjection, target, ())

    def features(pixels_N3HW: Tensor) -> Tensor:
        return model(pixels_N3HW).image_embeds.unsqueeze(1)

    return _teaching(model, features, "clip", CLIP_STD)


def dinov2(target: TargetSettings) -> Teaching:
    """DINOv2's patches: the mean of `settings.layers` (0 the embeddings) after the last norm."""
    from transformers import Dinov2Model

    model = _loaded(Dinov2Model, target, ("layers",))
    layers: Sequence[int] = target.settings.get("layers") or [int(model.config.num_hidden_layers)]

    def features(pixels_N3HW: Tensor) -> Tensor:
        states = model(pixels_N3HW, output_hidden_states=True).hidden_states
        return torch.stack([model.layernorm(states[layer])[:, 1:] for layer in layers]).mean(0)

    return _teaching(model, features, "dinov2", IMAGENET_STD)


def _loaded(kind: Any, target: TargetSettings, known: Sequence[str]) -> Any:
    """A model of transformers, frozen, on this process's device.

    Raises:
        ModelError: No weights, weights of another model, or a setting that it does not have.
    """
    if unknown := sorted(set(target.settings) - set(known)):
        raise ModelError(
            f"settings: {unknown[0]!r} is unknown; expected {', '.join(known) or 'none'}"
        )
    if not target.pretrained:
        raise ModelError("pretrained: empty; expected the hub name or folder of its weights")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with one_line(f"pretrained: {target.pretrained!r} cannot be loaded as {kind.__name__}"):
        check_readable(target.pretrained)
        with without_report():
            model, info = kind.from_pretrained(
                target.pretrained, dtype=torch.float32, use_safetensors=True,
                output_loading_info=True,
            )  # fmt: skip
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"it has no {missing[0]}")
    return model.eval().requires_grad_(False).to(device)


def _teaching(
    model: Any, features: Callable[[Tensor], Tensor], family: str, std: Sequence[float]
) -> Teaching:
    """Normalise, compute and bring to the host."""
    device = next(model.parameters()).device
    mean_3 = torch.tensor(IMAGE_MEANS[family], device=device)
    std_3 = torch.tensor(std, device=device)

    @torch.inference_mode()
    def teach(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        scaled_NHW3 = torch.from_numpy(pixels).to(device).float() / 255
        return features(((scaled_NHW3 - mean_3) / std_3).permute(0, 3, 1, 2)).cpu().numpy()

    return teach
