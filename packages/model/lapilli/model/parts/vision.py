"""Vision towers: pixels to patch features.

Shape suffix legend: N images, H height, W width, T tokens an image, C tower's hidden size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lapilli.model.config import IMAGE_MEANS, VisionConfig
from lapilli.model.errors import ModelError
from lapilli.model.parts.pretrained import (
    check_memory,
    check_readable,
    check_settings,
    one_line,
    settings_text,
)
from lapilli.model.registry import build_own, load_builder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "CONVNEXT", "FAMILIES", "TOWERS", "ConvNextTower", "Family", "Tower", "TowerShape",
    "TransformersTower", "build_tower", "skipped_rows", "tower_shape",
]  # fmt: skip

CONVNEXT = "clip_convnext"


@dataclass(frozen=True)
class Family:
    """What sets a family of transformers' vision models apart.

    Attributes:
        prefix: Its classes are `{prefix}Config` and `{prefix}Model`.
        layers: Path of its list of layers.
        norm: Name of the norm after the last layer, which hidden states do not pass.
        norms_rows: Whether all rows pass it at the end, and not the class token alone.
        positions: Name of the position embeddings below `embeddings`.
        class_tokens: Tokens before the patches.
        mean: Per channel, what its weights were trained with.
        std: Per channel.
    """

    prefix: str
    layers: str
    norm: str
    norms_rows: bool
    positions: str
    class_tokens: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


FAMILIES = {
    "clip": Family(
        prefix="CLIPVision",
        layers="encoder.layers",
        norm="post_layernorm",
        norms_rows=False,
        positions="position_embedding.weight",
        class_tokens=1,
        mean=IMAGE_MEANS["clip"],
        std=(0.26862954, 0.26130258, 0.27577711),
    ),
    # also SigLIP 2 of fixed resolution, which is the same architecture
    "siglip": Family(
        prefix="SiglipVision",
        layers="encoder.layers",
        norm="post_layernorm",
        norms_rows=True,
        positions="position_embedding.weight",
        class_tokens=0,
        mean=IMAGE_MEANS["siglip"],
        std=(0.5, 0.5, 0.5),
    ),
    "dinov2": Family(
        prefix="Dinov2",
        layers="encoder.layer",
        norm="layernorm",
        norms_rows=True,
        positions="position_embeddings",
        class_tokens=1,
        mean=IMAGE_MEANS["dinov2"],
        std=(0.229, 0.224, 0.225),
    ),
}


class Tower(nn.Module):
    """Protocol of a custom tower: three sizes and a forward.

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

    Only the layers up to that state are kept, the norm after it where `vision.norm` asks for it,
    and no pooling: what does not reach the output would never get a gradient.

    Attributes:
        own_size: Side of the images that the weights were trained with, in pixels. Where
            `image_size` is another, the positions were interpolated.
        num_patches: Patches of an image.
        class_tokens: Tokens before the patches.
    """

    def __init__(self, name: str, config: VisionConfig, *, weights: bool = True) -> None:
        super().__init__()
        self._name, self._family = name, FAMILIES[name]
        settings: Any = _settings(name, self._family, config)
        shape = _shape(name, settings, config)
        if not config.pretrained:
            settings.image_size = shape.image_size  # no positions to interpolate: all are random
        loaded: Any = _load(name, self._family, config, settings, weights=weights)
        self.own_size = int(loaded.config.image_size)
        if self.own_size != shape.image_size:
            _resize(loaded, self._family, shape.image_size)
        self._keep_layers(loaded, config)
        self.add_module(name, loaded)
        self.class_tokens = self._family.class_tokens
        self._skipped = skipped_rows(config)
        self.image_size, self.num_tokens = shape.image_size, shape.num_tokens
        self.num_patches = shape.num_tokens - self.class_tokens + self._skipped
        self.hidden_size = int(loaded.config.hidden_size)
        mean, std = config.mean or self._family.mean, config.std or self._family.std
        self._scale = _scale(mean, std)

    def _keep_layers(self, loaded: Any, config: VisionConfig) -> None:
        owner = loaded.get_submodule(self._family.layers.rpartition(".")[0])
        attribute = self._family.layers.rpartition(".")[2]
        layers = int(loaded.config.num_hidden_layers)
        kept = _kept_layers(config.vision_feature_layer, layers)
        setattr(owner, attribute, getattr(owner, attribute)[:kept])
        if not config.norm:
            setattr(loaded, self._family.norm, nn.Identity())
        if hasattr(loaded.embeddings, "mask_token"):
            loaded.embeddings.mask_token = None  # DINOv2's own training masks patches with it

    @property
    def encoder(self) -> Any:
        """Transformers' model."""
        return self.get_submodule(self._name)

    def forward(self, pixels_NHW3: Tensor) -> Tensor:
        """Normalise on the device in fp32, then encode in the weights' dtype."""
        self._scale = self._scale.to(pixels_NHW3.device)
        normal_N3HW = _normal(pixels_NHW3, self._scale, self.encoder.dtype)
        return self.encoder(pixel_values=normal_N3HW).last_hidden_state[:, self._skipped :]


class ConvNextTower(Tower):
    """open_clip's ConvNeXt; rows are the last stage's positions, as they leave it.

    The trunk is the child `clip_convnext`. It has no positions to learn: any size is its own.
    """

    def __init__(self, config: VisionConfig, *, weights: bool = True) -> None:
        super().__init__()
        from lapilli.model.parts.convnext import build_trunk

        shape = _convnext_shape(config)
        self.clip_convnext = build_trunk(config, weights=weights)
        self.image_size, self.num_tokens = shape.image_size, shape.num_tokens
        self.hidden_size = self.clip_convnext.settings.hidden_sizes[-1]
        self._skipped = config.skip
        self.num_patches = shape.num_tokens + config.skip
        family = FAMILIES["clip"]
        self._scale = _scale(config.mean or family.mean, config.std or family.std)

    def positions(self) -> dict[nn.Module, int]:
        """By module, how many positions it works on for each of `num_patches`."""
        return self.clip_convnext.positions()

    def forward(self, pixels_NHW3: Tensor) -> Tensor:
        """Normalise on the device in fp32, then encode in the weights' dtype."""
        self._scale = self._scale.to(pixels_NHW3.device)
        trunk = self.clip_convnext
        return trunk(_normal(pixels_NHW3, self._scale, trunk.dtype))[:, self._skipped :]


def _scale(mean: Sequence[float], std: Sequence[float]) -> Tensor:
    # No buffer: a model cast to bf16 casts its buffers too, and a mean of 122.77 becomes 123.
    return 255 * torch.tensor([[*mean], [*std]], dtype=torch.float32, device="cpu")


def _normal(pixels_NHW3: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    mean, std = scale
    return ((pixels_NHW3.float() - mean) / std).permute(0, 3, 1, 2).to(dtype)


def _kept_layers(layer: int, layers: int) -> int:
    kept = layer if layer >= 0 else layers + 1 + layer
    if not 1 <= kept <= layers:
        raise ModelError(f"vision.vision_feature_layer: {layer}; the tower has {layers} layers")
    return kept


def skipped_rows(config: VisionConfig) -> int:
    """Rows at the beginning of a family's output that are no feature rows."""
    is_default = config.vision_feature_select_strategy == "default"
    return (FAMILIES[config.tower].class_tokens if is_default else 0) + config.skip


@dataclass(frozen=True)
class TowerShape:
    """What a dataset must fit, known from a config alone.

    Attributes:
        image_size: Side of the images, in pixels.
        num_tokens: Feature rows an image gives.
    """

    image_size: int
    num_tokens: int


def tower_shape(config: VisionConfig) -> TowerShape | None:
    """Image size and number of feature rows of a tower; no weight is read.

    Returns:
        None for a custom tower, which must be built first.

    Raises:
        ModelError: No config that can be read, wrong settings, or an image size that the patch
            does not divide.
    """
    if config.tower == CONVNEXT:
        return _convnext_shape(config)
    family = FAMILIES.get(config.tower)
    if family is None:
        return None
    return _shape(config.tower, _settings(config.tower, family, config), config)


def _convnext_shape(config: VisionConfig) -> TowerShape:
    """Sizes of a ConvNeXt at the size asked for; the last stage alone is taken."""
    from lapilli.model.parts.convnext import convnext_settings

    asked = {
        "vision_feature_layer": (config.vision_feature_layer, -1),
        "vision_feature_select_strategy": (config.vision_feature_select_strategy, "default"),
        "norm": (config.norm, False),
    }
    for name, (given, expected) in asked.items():
        if given != expected:
            raise ModelError(
                f"vision.{name}: {given} with tower {CONVNEXT}, whose rows are those of its last "
                f"stage, before any norm; set {str(expected).lower()}"
            )
    settings = convnext_settings(config)
    size = config.image_size or settings.image_size
    _check_multiple(size, settings.reduction)
    return TowerShape(size, _left_over((size // settings.reduction) ** 2, config.skip))


def _shape(name: str, settings: PreTrainedConfig, config: VisionConfig) -> TowerShape:
    """Sizes of a tower at the size asked for."""
    family, sizes = FAMILIES[name], cast(Any, settings)
    if config.vision_feature_select_strategy == "full" and not family.class_tokens:
        raise ModelError(
            f"vision.vision_feature_select_strategy: full, but {name} has no class token; expected "
            "default"
        )
    layers = int(sizes.num_hidden_layers)
    kept = _kept_layers(config.vision_feature_layer, layers)
    if config.norm and not family.norms_rows:
        raise ModelError(
            f"vision.norm: true, but the last norm of {name} is for its class token alone; leave "
            "it out"
        )
    if config.norm and kept != layers:
        raise ModelError(
            f"vision.norm: true with vision_feature_layer {config.vision_feature_layer}; the norm "
            "comes after the last layer, set vision_feature_layer -1"
        )
    heads = int(sizes.num_attention_heads)
    if heads < 1 or sizes.hidden_size % heads:
        raise ModelError(
            f"vision: {name} tower with num_attention_heads {heads}; expected a divisor of "
            f"hidden_size {sizes.hidden_size}"
        )
    for given in (sizes.image_size, sizes.patch_size):
        if not isinstance(given, int) or given < 1:
            raise ModelError(
                f"vision: {name} tower with image_size {sizes.image_size!r} and patch_size "
                f"{sizes.patch_size!r}; expected a side in pixels each, of squares"
            )
    size, patch = config.image_size or int(sizes.image_size), int(sizes.patch_size)
    if size != sizes.image_size:
        _check_multiple(size, patch)
    if size < patch:
        raise ModelError(f"vision: images of {size} px are smaller than the patch, {patch}")
    rows = (size // patch) ** 2 + family.class_tokens - skipped_rows(replace(config, skip=0))
    return TowerShape(size, _left_over(rows, config.skip))


def _check_multiple(size: int, patch: int) -> None:
    if size % patch:
        fitting = {size // patch * patch, -(-size // patch) * patch} - {0}
        raise ModelError(
            f"vision.image_size: {size} is no multiple of the tower's patch, {patch}; set "
            f"{' or '.join(map(str, sorted(fitting)))}"
        )


def _left_over(rows: int, skip: int) -> int:
    if rows <= skip:
        raise ModelError(
            f"vision.skip: {skip} leaves none of an image's {rows} rows; expected fewer"
        )
    return rows - skip


def _settings(name: str, family: Family, config: VisionConfig) -> PreTrainedConfig:
    """Read transformers' config of a tower, from the recipe or beside the weights."""
    import transformers

    settings_class: Any = getattr(transformers, f"{family.prefix}Config")
    without_pooling = {"vision_use_head": False} if name == "siglip" else {}
    if not config.pretrained:
        check_settings("vision.settings", config.settings, settings_class())
        with one_line(
            f"vision.settings: no {name} tower can be built of {settings_text(config.settings)}"
        ):
            return settings_class(**config.settings, **without_pooling)
    with one_line(
        f"vision.pretrained: {config.pretrained!r} cannot be loaded; expected a hub name or a "
        f"folder with a {name} vision model in safetensors"
    ):
        check_readable(config.pretrained)
        _check_kind(name, config.pretrained)
        return settings_class.from_pretrained(config.pretrained, **without_pooling)


def _load(
    name: str, family: Family, config: VisionConfig, settings: PreTrainedConfig, *, weights: bool
) -> PreTrainedModel:
    import transformers

    model_class: Any = getattr(transformers, f"{family.prefix}Model")
    if not config.pretrained or not weights:
        what = config.pretrained or settings_text(config.settings)
        field = "pretrained" if config.pretrained else "settings"
        check_memory("vision.settings", settings)
        with one_line(f"vision.{field}: no {name} tower can be built of {what}"):
            return model_class(settings)
    with one_line(
        f"vision.pretrained: {config.pretrained!r} cannot be loaded; expected a hub name or a "
        f"folder with a {name} vision model in safetensors"
    ):
        return model_class.from_pretrained(
            config.pretrained,
            config=settings,
            dtype=torch.float32,
            use_safetensors=None if config.allow_pickle else True,
        )


def _resize(loaded: Any, family: Family, size: int) -> None:
    """Give a tower position embeddings for images of `size` px, interpolated as its family does.

    transformers would do it anew for every batch; here it is done once, in fp32, and what learns
    and what is written are the positions that are used.
    """
    old, patch = loaded.embeddings, int(loaded.config.patch_size)
    patches = (size // patch) ** 2
    with torch.no_grad():
        like_1TC = torch.empty(1, patches + family.class_tokens, int(loaded.config.hidden_size))
        positions_1TC = old.interpolate_pos_encoding(like_1TC, size, size)
    loaded.config.image_size = size
    with torch.random.fork_rng(devices=[]):  # its random weights are replaced
        made = type(old)(loaded.config)
    shape = made.get_parameter(family.positions).shape
    state = {**old.state_dict(), family.positions: positions_1TC.reshape(shape)}
    made.load_state_dict(state)
    loaded.embeddings = made.train(old.training)


def _check_kind(name: str, pretrained: str) -> None:
    """Another architecture's weights would leave a model that is random without a word."""
    from transformers import AutoConfig

    # left open, transformers asks on the terminal whether to run what comes with the weights
    kind = AutoConfig.from_pretrained(pretrained, trust_remote_code=False).model_type
    if kind not in (name, f"{name}_vision_model"):
        raise ValueError(f"it is a {kind}")


TOWERS: dict[str, Callable[..., Tower]] = {
    **{name: partial(TransformersTower, name) for name in FAMILIES},
    CONVNEXT: ConvNextTower,
}


def build_tower(config: VisionConfig, *, weights: bool = True) -> Tower:
    """The tower a config names.

    Args:
        config: The tower's settings.
        weights: Whether pretrained weights are read; without, the tower has their shapes and
            random numbers. A tower of one's own decides for itself.

    Raises:
        ModelError: Unknown name, weights that are not there, or another image size than asked for.
    """
    builder = load_builder(config.tower, TOWERS, what="vision.tower")
    if config.tower in TOWERS:
        return builder(config, weights=weights)
    tower: Tower = build_own(lambda: builder(config))
    if config.norm or config.skip:
        raise ModelError(
            f"vision.{'norm' if config.norm else 'skip'}: tower {config.tower} is one's own and "
            "gives its rows itself; leave it out"
        )
    if config.image_size not in (0, tower.image_size):
        raise ModelError(
            f"vision.image_size: {config.image_size}, but tower {config.tower} takes images of "
            f"{tower.image_size} px; leave it out, or have the tower follow it"
        )
    return tower
