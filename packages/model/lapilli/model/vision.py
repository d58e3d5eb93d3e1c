"""Vision towers: pixels to patch features.

Shape suffix legend: N images, H height, W width, T tokens an image, C tower's hidden size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lapilli.model.config import VisionConfig
from lapilli.model.errors import ModelError
from lapilli.model.extension import load_builder
from lapilli.model.pretrained import check_readable, check_settings, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "FAMILIES", "TOWERS", "Family", "Tower", "TransformersTower", "build_tower",
    "with_normalisation",
]  # fmt: skip


@dataclass(frozen=True)
class Family:
    """What sets a family of transformers' vision models apart.

    Attributes:
        prefix: Its classes are `{prefix}Config` and `{prefix}Model`.
        layers: Path of its list of layers.
        norm: Name of the norm after the last layer, which hidden states do not pass.
        class_tokens: Tokens before the patches.
        mean: Per channel, what its weights were trained with.
        std: Per channel.
    """

    prefix: str
    layers: str
    norm: str
    class_tokens: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


FAMILIES = {
    "clip": Family(
        "CLIPVision", "encoder.layers", "post_layernorm", 1,
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711),
    ),
    # also SigLIP 2 of fixed resolution, which is the same architecture
    "siglip": Family(
        "SiglipVision", "encoder.layers", "post_layernorm", 0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    ),
    "dinov2": Family(
        "Dinov2", "encoder.layer", "layernorm", 1, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ),
}  # fmt: skip


class Tower(nn.Module):
    """What a tower of one's own must be: these three numbers and a forward.

    Attributes:
        image_size: Side of the images, in pixels.
        num_tokens: Feature rows an image gives, T.
        hidden_size: Size of a feature row, C.
    """

    image_size: int
    num_tokens: int
    hidden_size: int

    @abstractmethod
    def forward(self, pixels_NHW3: Tensor) -> Tensor:
        """uint8 pixels [N, H, W, 3] to features [N, T, C]."""
        raise NotImplementedError


class TransformersTower(Tower):
    """One hidden state of a vision model of transformers; the model is the child `name`.

    Only the layers up to that state are kept, no norm and no pooling after it: what does not
    reach the output would never get a gradient.
    """

    def __init__(self, name: str, config: VisionConfig) -> None:
        super().__init__()
        self._name, self._family = name, FAMILIES[name]
        if config.features == "cls_patch" and not self._family.class_tokens:
            raise ModelError(
                f"vision.features: cls_patch, but {name} has no class token; expected patch"
            )
        loaded: Any = _load(name, self._family, config)
        self._keep_layers(loaded, config.layer)
        self.add_module(name, loaded)
        self._skipped = self._family.class_tokens if config.features == "patch" else 0
        self.image_size = int(loaded.config.image_size)
        self.num_patches = (self.image_size // int(loaded.config.patch_size)) ** 2
        self.class_tokens = self._family.class_tokens
        self.num_tokens = self.num_patches + self.class_tokens - self._skipped
        self.hidden_size = int(loaded.config.hidden_size)
        mean, std = config.mean or self._family.mean, config.std or self._family.std
        # No buffers: a model cast to bf16 casts its buffers too, and a mean of 122.77 becomes 123.
        self._scale = 255 * torch.tensor([mean, std], dtype=torch.float32, device="cpu")

    def _keep_layers(self, loaded: Any, layer: int) -> None:
        owner = loaded.get_submodule(self._family.layers.rpartition(".")[0])
        attribute = self._family.layers.rpartition(".")[2]
        kept = _kept_layers(layer, int(loaded.config.num_hidden_layers))
        setattr(owner, attribute, getattr(owner, attribute)[:kept])
        setattr(loaded, self._family.norm, nn.Identity())
        if hasattr(loaded.embeddings, "mask_token"):
            loaded.embeddings.mask_token = None  # DINOv2's own training masks patches with it

    @property
    def encoder(self) -> Any:
        """Transformers' model."""
        return self.get_submodule(self._name)

    def forward(self, pixels_NHW3: Tensor) -> Tensor:
        """Normalise on the device in fp32, then encode in the weights' dtype."""
        if self._scale.device != pixels_NHW3.device:
            self._scale = self._scale.to(pixels_NHW3.device)
        mean, std = self._scale
        normal_N3HW = ((pixels_NHW3.float() - mean) / std).permute(0, 3, 1, 2)
        output = self.encoder(pixel_values=normal_N3HW.to(self.encoder.dtype))
        return output.last_hidden_state[:, self._skipped :]


def _kept_layers(layer: int, layers: int) -> int:
    kept = layer if layer >= 0 else layers + 1 + layer
    if not 1 <= kept <= layers:
        raise ModelError(f"vision.layer: {layer}; the tower has {layers} layers")
    return kept


def _load(name: str, family: Family, config: VisionConfig) -> PreTrainedModel:
    import transformers

    settings_class: Any = getattr(transformers, f"{family.prefix}Config")
    model_class: Any = getattr(transformers, f"{family.prefix}Model")
    without_pooling = {"vision_use_head": False} if name == "siglip" else {}
    if not config.pretrained:
        known: PreTrainedConfig = settings_class()
        check_settings("vision.settings", config.settings, known)
        with one_line(f"vision.settings: no {name} tower can be built of them"):
            return model_class(settings_class(**config.settings, **without_pooling))
    with one_line(
        f"vision.pretrained: {config.pretrained!r} cannot be loaded; expected a hub name or a "
        f"folder with a {name} vision model in safetensors"
    ):
        check_readable(config.pretrained)
        _check_kind(name, config.pretrained)
        return model_class.from_pretrained(
            config.pretrained,
            dtype=torch.float32,
            use_safetensors=None if config.allow_pickle else True,
            **without_pooling,
        )


def _check_kind(name: str, pretrained: str) -> None:
    """Another architecture's weights would leave a model that is random without a word."""
    from transformers import AutoConfig

    kind = AutoConfig.from_pretrained(pretrained).model_type
    if kind not in (name, f"{name}_vision_model"):
        raise ValueError(f"it is a {kind}")


def with_normalisation(config: VisionConfig) -> VisionConfig:
    """A config with mean and std: its own, those that come with the weights, or the family's."""
    if config.tower not in FAMILIES or (config.mean and config.std):
        return config
    family, given = FAMILIES[config.tower], _preprocessing(config.pretrained)
    mean = config.mean or given.get("image_mean") or family.mean
    std = config.std or given.get("image_std") or family.std
    return replace(config, mean=_channels(mean), std=_channels(std))


def _channels(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _preprocessing(pretrained: str) -> dict[str, Any]:
    """What `preprocessor_config.json` beside the weights says; nothing, if there is none."""
    if not pretrained:
        return {}
    from transformers.image_processing_base import ImageProcessingMixin

    check_readable(pretrained)
    try:
        return ImageProcessingMixin.get_image_processor_dict(pretrained)[0]
    except OSError:
        return {}


TOWERS: dict[str, Callable[[VisionConfig], Tower]] = {
    name: partial(TransformersTower, name) for name in FAMILIES
}


def build_tower(config: VisionConfig) -> Tower:
    """The tower a config names.

    Raises:
        ModelError: Unknown name, or weights that are not there.
    """
    return load_builder(config.tower, TOWERS, what="vision.tower")(config)
