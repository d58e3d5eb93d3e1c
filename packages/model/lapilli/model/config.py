"""Settings of a model: tower, projector, language model, read from a recipe's YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from lapilli.model.errors import ModelError

__all__ = [
    "GROUPS",
    "IMAGE_MEANS",
    "KEEP_ALL",
    "ActivationPolicy",
    "AuxConfig",
    "Decoding",
    "LanguageConfig",
    "LoraConfig",
    "ModelConfig",
    "Part",
    "VisionConfig",
]

Part = Literal["vision", "projector", "language", "task_tokens", "predictors"]
# Of parameters that learn.
GROUPS = ("projector", "language", "vision", "adapters", "task_tokens", "predictors")
# Per channel of 0 to 1, what the weights of a family of towers were trained with.
IMAGE_MEANS: Mapping[str, tuple[float, float, float]] = {
    "clip": (0.48145466, 0.4578275, 0.40821073),
    "clip_convnext": (0.48145466, 0.4578275, 0.40821073),
    "siglip": (0.5, 0.5, 0.5),
    "dinov2": (0.485, 0.456, 0.406),
}


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower.

    Attributes:
        tower: Name in `lapilli.model.parts.vision.TOWERS`, or `package.module:name`.
        pretrained: Hub name, folder or address of weights; empty for random ones of `settings`.
        settings: Settings of the tower's transformers config, when there are no weights. Of a
            `clip_convnext` `depths`, `hidden_sizes`, `layer_norm_eps` and `image_size`, with
            weights too where open_clip's config names a model that is not known here.
        vision_feature_layer: Which hidden state is taken, as LLaVA counts (-2: before the last
            layer). Layers after it are not run.
        vision_feature_select_strategy: `default`, the patches alone, or `full`, with the class
            token before them. Both settings are named as in transformers.
        norm: Take the state after the tower's last norm (SigLIP, DINOv2: `last_hidden_state` of
            transformers' model) and not before it; with `vision_feature_layer: -1` alone.
        skip: Feature rows left out at the beginning, behind those that the strategy leaves out.
        image_size: Side of the images in pixels, a multiple of the patch; 0 for the tower's own.
            The positions of pretrained weights are interpolated to it (bicubic), as transformers'
            `interpolate_pos_encoding` does.
        mean: Per channel, subtracted from pixels in 0 to 1; None takes what comes with the
            weights, else what the family was trained with.
        std: Per channel, what is then divided by; None likewise.
        allow_pickle: Take weights that are not in safetensors too.
    """

    tower: str = "clip"
    pretrained: str = ""
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    norm: bool = False
    skip: int = 0
    image_size: int = 0
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        if self.image_size < 0:
            raise ModelError(
                f"vision.image_size: {self.image_size}; expected a side in pixels, or 0 for the "
                "tower's own"
            )
        if self.skip < 0:
            raise ModelError(f"vision.skip: {self.skip}; expected 0 or more rows")


@dataclass(frozen=True)
class LanguageConfig:
    """The language model: any decoder of transformers that takes `inputs_embeds`.

    Attributes:
        model_type: transformers' name of the architecture, when there are no weights.
        pretrained: Hub name, folder or address of weights; empty for random ones of `settings`.
        settings: Settings of the transformers config, when there are no weights.
        attention: `lapilli`, which never reads the device, or one of transformers' implementations:
            `eager`, `sdpa`, `flash_attention_2` ... `auto` takes `lapilli` where the architecture
            was tested with it, else `sdpa` where it is supported, else `eager`.
        allow_pickle: Take weights that are not in safetensors too.
        trust_remote_code: Run the code that comes with the weights.
        vocab_size: Rows of embedding and head to grow to, for tokens added to the tokenizer; new
            rows are the mean of the others. 0 leaves them; fewer than there are change nothing.
        train_added_rows: Whether the rows that `vocab_size` adds to the embedding learn beside a
            frozen language model, as in LLaVA's first stage with image start and end tokens. An
            untied head's rows stay.
        quantize: `nf4` and `fp4` keep the linear layers but the head in 4 bits and compute in the
            model's dtype (QLoRA, arXiv 2305.14314); `int8` keeps them in 8 bits and computes in
            them but for outliers, which reads the device (LLM.int8, arXiv 2208.07339). They learn
            by `lora` alone.
        double_quant: Whether the scales of 4 bits are quantised too: 0.4 bits a number less.
    """

    model_type: str = "llama"
    pretrained: str = ""
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    attention: str = "auto"
    allow_pickle: bool = False
    trust_remote_code: bool = False
    vocab_size: int = 0
    train_added_rows: bool = False
    quantize: Literal["none", "nf4", "fp4", "int8"] = "none"
    double_quant: bool = True

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        if self.train_added_rows and not self.vocab_size:
            raise ModelError(
                "language.train_added_rows: true without language.vocab_size, which adds the rows; "
                "set it to the tokenizer's length"
            )
        if self.quantize != "none" and not self.pretrained:
            raise ModelError(
                f"language.quantize: {self.quantize} without language.pretrained; random weights "
                "cannot be trained in so few bits, name a folder or set quantize none"
            )
        if not self.double_quant and self.quantize not in ("nf4", "fp4"):
            raise ModelError(
                f"language.double_quant: false with quantize {self.quantize}, which has no scales "
                "to quantise; expected nf4 or fp4, or leave it out"
            )


@dataclass(frozen=True)
class LoraConfig:
    r"""Low-rank adapters (arXiv 2106.09685), by peft.

    Attributes:
        target: `all-linear` (of the parts that learn, the head left out), or a regular expression
            for the end of a layer's path: `q_proj|v_proj`, `language\..*`. A Qwen-1's layers have
            their own names too (`c_attn|w1|w2`); q, k and v found as `c_attn` share one A.
        rank: Rank of an adapter.
        alpha: What it adds is multiplied by `alpha / rank`.
        dropout: On its input, in training.
        bias: Which biases learn: `none`, `all`, or `lora_only`, those of adapted layers.
        projector: Adapters on the projector's linear layers too, whatever `target` is; its own
            weights freeze then.
    """

    target: str = "all-linear"
    rank: int = 64
    alpha: int = 16
    dropout: float = 0.05
    bias: Literal["none", "all", "lora_only"] = "none"
    projector: bool = False

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        if self.rank < 1:
            raise ModelError(f"lora.rank: {self.rank}; expected at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ModelError(f"lora.dropout: {self.dropout}; expected 0 to below 1")
        try:
            re.compile(self.target)
        except re.error as error:
            raise ModelError(
                f"lora.target: {self.target!r} is no regular expression ({error})"
            ) from None


# Rows and width of the targets that VisPer-LM predicts, by task.
TARGET_SHAPES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"depth": (576, 1024), "seg": (576, 1536), "gen": (1, 1024)}
)


@dataclass(frozen=True)
class AuxConfig:
    """Task tokens behind each image, and losses on the hidden states that they shape (VisPer-LM).

    Attributes:
        mode: The tasks, joined by `-`; their tokens follow an image's rows in this order. Empty for
            none.
        num_task_tokens: Tokens a task.
        layers: By task, the decoder layers whose states predict its targets, counted from 1; the
            state of the last one is after the decoder's norm. Empty predicts nothing: the tokens
            stand in the sequence alone.
        weights: By task, what its loss is multiplied by; 0.5 where it is left out.
        contrastive_weight: What InfoNCE is multiplied by beside smooth L1.
        mean_over: What the losses of a global batch are divided by: its `images` with a target, or
            its `records`, of which those without an image count as zero.
        shapes: By task, rows and width of its targets, where they are not VisPer-LM's (depth
            ``[576, 1024]``, seg ``[576, 1536]``, gen ``[1, 1024]``).
    """

    mode: str = ""
    num_task_tokens: int = 8
    layers: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    weights: dict[str, float] = field(default_factory=dict[str, float])
    contrastive_weight: float = 0.3
    mean_over: Literal["images", "records"] = "images"
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        for name in ("layers", "weights", "shapes"):
            for task in getattr(self, name):
                if task not in self.tasks:
                    raise ModelError(
                        f"aux.{name}: {task!r} is no task of mode {self.mode!r}; expected of "
                        f"{', '.join(self.tasks) or 'none'}"
                    )
        if self.num_task_tokens < 1:
            raise ModelError(f"aux.num_task_tokens: {self.num_task_tokens}; expected at least 1")
        if self.contrastive_weight < 0 or any(weight < 0 for weight in self.weights.values()):
            raise ModelError(
                f"aux: contrastive_weight {self.contrastive_weight}, weights {self.weights}; "
                "expected 0 or more"
            )
        for task in self.tasks:
            self._check_task(task)

    def _check_task(self, task: str) -> None:
        if not task.isidentifier() or self.tasks.count(task) > 1:
            raise ModelError(
                f"aux.mode: {self.mode!r}; expected tasks joined by '-', each a name and once, "
                "e.g. gen-depth-seg"
            )
        if task not in self.shapes and task not in TARGET_SHAPES:
            raise ModelError(
                f"aux.shapes: none for task {task!r}; expected its targets' [rows, width], as "
                f"there are for {', '.join(TARGET_SHAPES)}"
            )
        rows, width = self.shape(task)
        if rows < 1 or width < 1 or (rows > 1 and rows % self.num_task_tokens):
            raise ModelError(
                f"aux.shapes.{task}: {[rows, width]}; expected a width of 1 or more, and 1 row or "
                f"a multiple of num_task_tokens ({self.num_task_tokens})"
            )
        layers = self.layers.get(task, ())
        if any(layer < 1 for layer in layers) or len({*layers}) < len(layers):
            raise ModelError(
                f"aux.layers.{task}: {[*layers]}; expected layers from 1 on, each once"
            )

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks in the order of their tokens."""
        return tuple(self.mode.split("-")) if self.mode else ()

    @property
    def tokens(self) -> int:
        """Task tokens behind an image, of all tasks."""
        return len(self.tasks) * self.num_task_tokens

    def shape(self, task: str) -> tuple[int, int]:
        """Rows and width of a task's targets."""
        return self.shapes.get(task) or TARGET_SHAPES[task]

    def weight(self, task: str) -> float:
        """What a task's loss is multiplied by."""
        return self.weights.get(task, 0.5)

    @property
    def heads(self) -> tuple[tuple[str, int], ...]:
        """Task and layer of each predictor, in the order of the tasks."""
        return tuple((task, layer) for task in self.tasks for layer in self.layers.get(task, ()))


@dataclass(frozen=True)
class ModelConfig:
    """The whole model.

    Attributes:
        vision: The tower.
        language: The language model.
        projector: `linear`, `mlpNx_gelu`, `identity`, or `package.module:name`.
        projector_std: Standard deviation of the projector's first weights, normal, its biases
            zero; None leaves torch's own (uniform, +-1 / sqrt(inputs)), as LLaVA does.
        trainable: Parts that are trained; the others are frozen.
        lora: Adapters; parts that have any are trained through them alone. None for none.
        merge: How image features are put among the text's embeddings (`lapilli.model.merging`);
            `auto` takes Triton on CUDA and torch elsewhere.
        kernels: Fused kernels of the decoder's norms, rotary embeddings and gated MLPs: `auto`
            takes Liger's on CUDA where they are installed and know the decoder, else torch's;
            `liger` also its cross-entropy, which reads the device once a step.
        compile: `blocks` compiles each layer of decoder and tower with `torch.compile`.
        dtype: What weights are loaded in. bf16 takes half the host's memory; a bf16 run rounds
            them anyway, and its fp32 copies in the optimizer begin there.
        head_chunk: Trained positions the head works on at once.
        seed: Seed of random weights.
        aux: Task tokens behind each image and losses on hidden states.
    """

    vision: VisionConfig
    language: LanguageConfig
    projector: str = "mlp2x_gelu"
    projector_std: float | None = None
    trainable: tuple[Part, ...] = ("projector", "language")
    lora: LoraConfig | None = None
    merge: Literal["auto", "torch", "triton"] = "auto"
    kernels: Literal["auto", "torch", "liger"] = "auto"
    compile: Literal["none", "blocks"] = "none"
    dtype: Literal["fp32", "bf16"] = "fp32"
    head_chunk: int = 1024
    seed: int = 0
    aux: AuxConfig = field(default_factory=AuxConfig)

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        if not self.trainable:
            raise ModelError("trainable: empty; expected some of vision, projector, language")
        _check_aux(self)
        if self.projector_std is not None and self.projector_std <= 0:
            raise ModelError(f"projector_std: {self.projector_std}; expected more than 0")
        if self.lora is not None and not {"vision", "language"} & {*self.trainable}:
            raise ModelError(
                "lora: neither language nor vision is in trainable; expected the parts whose "
                "adapters are to learn, or no lora"
            )
        if self.lora is not None and self.lora.projector and "projector" not in self.trainable:
            raise ModelError(
                "lora.projector: true, but projector is not in trainable; put it there, or leave "
                "lora.projector out"
            )
        if self.language.train_added_rows and "language" in self.trainable:
            raise ModelError(
                "language.train_added_rows: true, but language is in trainable, where added rows "
                "learn anyway; leave one of them out"
            )
        learns_whole = "language" in self.trainable and self.lora is None
        if self.language.quantize != "none" and learns_whole:
            raise ModelError(
                f"language.quantize: {self.language.quantize}, but the language model is to learn "
                "whole; set lora, or take language out of trainable"
            )
        if self.head_chunk < 1:
            raise ModelError(f"head_chunk: {self.head_chunk}; expected at least 1")


def _check_aux(config: ModelConfig) -> None:
    """The parts that `aux` adds are there, and what they are made with."""
    for part, there in (("task_tokens", config.aux.mode), ("predictors", config.aux.heads)):
        if part in config.trainable and not there:
            setting = "aux.mode" if part == "task_tokens" else "aux.layers"
            raise ModelError(f"trainable: {part} without {setting}; set it, or leave {part} out")
    if config.aux.heads and config.compile != "none":
        raise ModelError(
            f"compile: {config.compile} with aux.layers; hidden states cannot be taken out of "
            "compiled layers, set compile: none"
        )


@dataclass(frozen=True)
class ActivationPolicy:
    """What of the forward pass is kept for the backward pass, and where. No value changes by it.

    Attributes:
        recompute: By part (`vision`, `language`), how many layers, from the first on, keep their
            input alone and run again in backward. The first ones: when backward comes to them, what
            all others have kept is free.
        offload: Whether those inputs lie in the host's memory meanwhile.
    """

    recompute: Mapping[str, int] = field(default_factory=dict[str, int])
    offload: bool = False


KEEP_ALL = ActivationPolicy()


@dataclass(frozen=True)
class Decoding:
    """How an answer is decoded.

    Attributes:
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 takes the likeliest token; above, tokens are drawn, and the higher the
            flatter.
        top_p: Drawn from the likeliest tokens that hold this share of the probability.
        seed: Seed of sampling. The same prompt, images and seed give the same answer, in any batch
            and at any position.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        if self.max_new_tokens < 1:
            raise ModelError(f"max_new_tokens: {self.max_new_tokens}; expected at least 1")
        if self.temperature < 0:
            raise ModelError(f"temperature: {self.temperature}; expected 0 or more")
        if not 0.0 < self.top_p <= 1.0:
            raise ModelError(f"top_p: {self.top_p}; expected above 0, at most 1")
