"""Count a training step's floating-point operations from model sizes and batch lengths.

A multiplication and an addition count as two operations. Only matrix products and convolutions are
counted; norms, activations, softmax, rotary positions and the optimizer are not, as is usual.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from lapilli.model.auxiliary.perceiver import INNER
from lapilli.model.auxiliary.predictors import heads_name
from lapilli.model.deepspeed_internals import shape_of
from lapilli.model.parts.added_rows import added_rows
from lapilli.model.parts.recomputation import is_recomputed
from lapilli.model.parts.vision import ConvNextTower, TransformersTower

if TYPE_CHECKING:
    from lapilli.model.vlm import VisionLanguageModel

__all__ = [
    "AttentionNumbers", "BatchNumbers", "Flops", "Matmul", "ModelNumbers", "PartNumbers",
    "StepFlops", "model_numbers", "part_numbers", "recomputation_flops", "step_flops",
]  # fmt: skip


@dataclass(frozen=True)
class Matmul:
    """A linear layer, or a convolution as the product that it is.

    Attributes:
        inputs: Numbers that an output is made of, per position.
        outputs: Numbers that come out, per position.
        trained: Whether its weight learns.
        again: Whether backward runs it once more (recomputation).
        positions: Positions it works on for each token of its part; more than one in the early
            stages of a ConvNeXt.
    """

    inputs: int
    outputs: int
    trained: bool
    again: bool = False
    positions: int = 1

    @property
    def flops(self) -> int:
        """Of one pass, for each token of its part."""
        return 2 * self.positions * self.inputs * self.outputs


@dataclass(frozen=True)
class AttentionNumbers:
    """The two products of attention, in all layers; grouped keys and values cost as many."""

    layers: int
    heads: int
    head_dim: int


@dataclass(frozen=True)
class PartNumbers:
    """A part of the model.

    Attributes:
        matmuls: In the order data passes through.
        attention: Its attention, if it has any.
        recomputed: In how many layers backward runs its attention again.
    """

    matmuls: tuple[Matmul, ...]
    attention: AttentionNumbers | None = None
    recomputed: int = 0

    @property
    def learns(self) -> bool:
        """Whether any weight of it does."""
        return any(matmul.trained for matmul in self.matmuls)


@dataclass(frozen=True)
class PredictorNumbers:
    """The predictor of one task at one layer. Its similarities with other images are not counted.

    Attributes:
        of_states: Products that work on every token of a row.
        entering: Products that work on the queries before they attend.
        leaving: Products behind that.
        queries: Of an image: its target's rows.
        learned: Whether the queries are the same for all images of a micro-batch.
        inner: Size of all heads of its attention together.
    """

    of_states: tuple[Matmul, ...]
    entering: tuple[Matmul, ...]
    leaving: tuple[Matmul, ...]
    queries: int
    learned: bool
    inner: int


@dataclass(frozen=True)
class ModelNumbers:
    """The whole model.

    Attributes:
        tower: Its first product makes tokens of patches.
        projector: Between them.
        language: The decoder without its head.
        head: Works on trained positions only.
        added: The head's rows for added tokens that learn beside it (`AddedRows`), if there are.
        predictors: Of targets, which are run in training.
        tokens_learn: Whether task tokens do.
        patches: Of an image.
        tower_tokens: Tokens of an image inside the tower, class token included.
        image_tokens: Feature rows of an image.
    """

    tower: PartNumbers
    projector: PartNumbers
    language: PartNumbers
    head: Matmul
    patches: int
    tower_tokens: int
    image_tokens: int
    added: Matmul | None = None
    predictors: tuple[PredictorNumbers, ...] = ()
    tokens_learn: bool = False


@dataclass(frozen=True)
class BatchNumbers:
    """The contents of a micro-batch, and the sizes that it is padded to.

    Attributes:
        row_lengths: Tokens of each row.
        images: Images that are no padding.
        targets: Trained positions.
        padded_rows: B.
        padded_length: S.
        padded_images: N.
        padded_targets: P.
        pairs: Pairs of a query and a key that it sees, where rows hold several samples; None for
            rows of one.
    """

    row_lengths: Sequence[int]
    images: int
    targets: int
    padded_rows: int
    padded_length: int
    padded_images: int
    padded_targets: int
    pairs: int | None = None


@dataclass(frozen=True)
class Flops:
    """Operations by part; `attention` is the language model's, the tower's is in `tower`."""

    tower: int
    projector: int
    language: int
    attention: int
    head: int
    predictors: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        parts = self.tower + self.projector + self.language + self.attention + self.head
        return parts + self.predictors


@dataclass(frozen=True)
class StepFlops:
    """Two figures of one micro-batch.

    Attributes:
        model: What the mathematics needs: real tokens, attention to real earlier tokens only,
            nothing twice. Over the peak rate and the time it is the model FLOPs utilisation.
        hardware: What is executed: padding, attention as it is implemented, recomputation.
    """

    model: Flops
    hardware: Flops


def step_flops(
    numbers: ModelNumbers, batch: BatchNumbers, *, attention: Literal["eager", "flash"] = "flash",
    skips_future: bool = True,
) -> StepFlops:  # fmt: skip
    """Operations of forward and backward of a micro-batch.

    A product of T tokens with a weight [outputs, inputs] takes 2 T inputs outputs forward, as much
    for the gradient of its input and as much for the gradient of its weight (Kaplan et al.,
    arXiv 2001.08361, section 2.1). A frozen weight saves the last; the first layer of all that
    learns saves the gradient of its input. So a frozen tower is forward only and a frozen language
    model in front of a trained projector takes two thirds. A LoRA adapter is two more products.

    Attention takes 2 products of 2 heads head_dim operations for each pair of tokens forward and
    twice that backward (Chowdhery et al., arXiv 2204.02311, appendix B, which counts all pairs;
    here a causal row of L tokens has L (L + 1) / 2). Flash attention computes the scores again in
    backward: 5 products, not 4 (Dao, arXiv 2307.08691). Utilisation leaves recomputation out.

    Args:
        numbers: The model.
        batch: Lengths.
        attention: How the hardware's figure counts backward: `eager`, or `flash` (also torch's
            fused `sdpa`).
        skips_future: Whether the hardware's causal attention leaves later tokens out, as flash
            kernels do; a masked product of all pairs does not.

    Returns:
        The model's and the hardware's figures. A batch without images still runs a trained
        projector on one row and a trained tower on one image; only the hardware's figure has that.
    """
    lengths = batch.row_lengths
    pairs = sum(n * (n + 1) // 2 for n in lengths) if batch.pairs is None else batch.pairs
    real = _flops(
        numbers, images=batch.images, projected=batch.images * numbers.image_tokens,
        tokens=sum(lengths), pairs=pairs, targets=batch.targets,
        row_tokens=sum(lengths) // max(1, len(lengths)), backward=2, recompute=False,
    )  # fmt: skip
    images, projected = batch.padded_images, batch.padded_images * numbers.image_tokens
    if not images:
        images, projected = (1, numbers.image_tokens) if numbers.tower.learns else (0, 1)
    side = batch.padded_length
    executed = _flops(
        numbers, images=images, projected=projected, tokens=batch.padded_rows * side,
        pairs=batch.padded_rows * (side * (side + 1) // 2 if skips_future else side**2),
        targets=batch.padded_targets, row_tokens=side,
        backward=2.5 if attention == "flash" else 2, recompute=True,
    )  # fmt: skip
    return StepFlops(real, executed)


def _flops(
    numbers: ModelNumbers, *, images: int, projected: int, tokens: int, pairs: int, targets: int,
    row_tokens: int, backward: float, recompute: bool,
) -> Flops:  # fmt: skip
    tower, projector, language = numbers.tower, numbers.projector, numbers.language
    tower_tokens = images * numbers.tower_tokens
    seen = _attention(
        tower, images * numbers.tower_tokens**2, backward if tower.learns else 0, recompute
    )
    # class tokens are no patches
    first = _linear(
        tower.matmuls[:1], images * numbers.patches, upstream=False, recompute=recompute
    )
    rest = _linear(tower.matmuls[1:], tower_tokens, upstream=tower.learns, recompute=recompute)
    heads = [head for head in (numbers.head, numbers.added) if head]
    rows = projector.learns or tower.learns or numbers.tokens_learn
    text = language.learns or rows or any(h.trained for h in heads)
    return Flops(
        tower=first + rest + seen,
        projector=_linear(projector.matmuls, projected, upstream=tower.learns, recompute=recompute),
        language=_linear(language.matmuls, tokens, upstream=text, recompute=recompute),
        attention=_attention(language, pairs, backward if text else 0, recompute),
        head=sum(_matmul(head, targets, input_gradient=text) for head in heads),
        predictors=sum(
            _predictor(one, tokens, images, row_tokens, upstream=text) for one in numbers.predictors
        ),
    )


def _predictor(
    numbers: PredictorNumbers, tokens: int, images: int, row_tokens: int, *, upstream: bool
) -> int:
    """Forward and backward of a predictor, whose queries see their row's tokens and themselves."""
    queries = images * numbers.queries
    entering = numbers.queries if numbers.learned else queries
    return (
        sum(_matmul(one, tokens, input_gradient=upstream) for one in numbers.of_states)
        + sum(_matmul(one, entering, input_gradient=True) for one in numbers.entering)
        + sum(_matmul(one, queries, input_gradient=True) for one in numbers.leaving)
        + 3 * 4 * numbers.inner * queries * (row_tokens + numbers.queries)
    )


def _linear(matmuls: Sequence[Matmul], tokens: int, *, upstream: bool, recompute: bool) -> int:
    """Products one after another; `upstream`: something before the first learns."""
    total = 0
    for matmul in matmuls:
        total += _matmul(matmul, tokens, input_gradient=upstream)
        total += tokens * matmul.flops * (recompute and matmul.again)
        upstream = upstream or matmul.trained
    return total


def _matmul(matmul: Matmul, tokens: int, *, input_gradient: bool) -> int:
    passes = 1 + matmul.trained + input_gradient
    return tokens * matmul.flops * passes


def _attention(part: PartNumbers, pairs: int, backward: float, recompute: bool) -> int:
    if part.attention is None:
        return 0
    sizes = part.attention
    passes = sizes.layers * (1 + backward) + recompute * part.recomputed
    return int(4 * sizes.heads * sizes.head_dim * pairs * passes)


def model_numbers(model: VisionLanguageModel) -> ModelNumbers:
    """Sizes of a built model, and what of it learns: all that `step_flops` asks for.

    Read from layers' attributes, not from weights, which ZeRO-3 partitions and the meta device
    lacks. Only what is run is there: the tower has no layers behind the taken one.

    A tower of one's own is counted by its layers, with no attention and its tokens as patches.
    Of adapters in the first layer of all that learns, the gradient of an input that they share is
    counted where order alone tells: at most one layer's too much.
    """
    tower = model.vision
    sizes, patches, classes = None, tower.num_tokens, 0
    if isinstance(tower, TransformersTower):
        sizes, patches, classes = tower.encoder.config, tower.num_patches, tower.class_tokens
    elif isinstance(tower, ConvNextTower):
        patches = tower.num_patches
    head = _matmul_of(model.language.get_output_embeddings())
    assert head is not None
    rows, added = added_rows(model.language), None
    if rows is not None and rows.head_rows is not None:
        count = shape_of(rows.head_rows)[0]
        added = Matmul(inputs=head.inputs, outputs=count, trained=True)
        head = replace(head, outputs=head.outputs - count)
    decoder = model.language.get_decoder()
    return ModelNumbers(
        tower=part_numbers(tower, sizes),
        projector=part_numbers(model.projector),
        language=part_numbers(decoder, model.language.config),
        head=head,
        patches=patches,
        tower_tokens=patches + classes,
        image_tokens=tower.num_tokens,
        added=added,
        predictors=_predictor_numbers(model),
        tokens_learn=bool(model.config.aux.mode) and "task_tokens" in model.config.trainable,
    )


def _predictor_numbers(model: VisionLanguageModel) -> tuple[PredictorNumbers, ...]:
    aux, found = model.config.aux, list[PredictorNumbers]()
    for task, layer in aux.heads:
        number = aux.layers[task].index(layer)
        head: Any = model.predictors.get_submodule(f"{heads_name(task)}.{number}")
        block: Any = head.projector
        attention = block.layers[0][0]
        found_of = ((module, _matmul_of(module)) for module in head.modules())
        products = [(module, one) for module, one in found_of if one is not None]
        enter = {block.proj_in, attention.to_kv, attention.to_q}
        found.append(PredictorNumbers(
            of_states=tuple(
                one for module, one in products if module in enter - {attention.to_q}
            ),
            entering=tuple(one for module, one in products if module in enter),
            leaving=tuple(one for module, one in products if module not in enter),
            queries=aux.shape(task)[0],
            learned=aux.shape(task)[0] > 1,
            inner=INNER,
        ))  # fmt: skip
    return tuple(found)


def part_numbers(part: nn.Module, config: Any = None) -> PartNumbers:
    """Sizes of a built part, read from its layers: exact for every architecture and for LoRA.

    Args:
        part: A tower, a projector, or a decoder without its head.
        config: transformers' config of a part that has attention.
    """
    recomputed = [layer for layer in part.modules() if is_recomputed(layer)]
    again = {module for layer in recomputed for module in _computed_again(layer)}
    positions = part.positions() if isinstance(part, ConvNextTower) else {}
    matmuls = tuple(
        replace(found, again=module in again, positions=positions.get(module, 1))
        for module in part.modules()
        if (found := _matmul_of(module)) is not None
    )
    if config is None:
        return PartNumbers(matmuls)
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    layers = max((len(m) for m in part.modules() if isinstance(m, nn.ModuleList)), default=0)
    return PartNumbers(matmuls, AttentionNumbers(layers, heads, head_dim), len(recomputed))


def recomputation_flops(layer: nn.Module, config: Any, *, tokens: int, pairs: int) -> int:
    """Operations that a decoder's or tower's layer costs more where backward runs it again.

    Args:
        layer: The layer.
        config: transformers' config of its part; None for one without, whose attention is not told.
        tokens: Tokens that pass it.
        pairs: Pairs of tokens that its attention computes.
    """
    products = (_matmul_of(module) for module in _computed_again(layer))
    flops = sum(tokens * found.flops for found in products if found)
    sizes = part_numbers(layer, config).attention
    return flops + (4 * sizes.heads * sizes.head_dim * pairs if sizes else 0)


def _computed_again(layer: nn.Module) -> list[nn.Module]:
    """The products that a recomputed layer runs once more.

    Torch ends the second forward when it has the last tensor that backward asks for. That is the
    last product's input, so that product does not run, unless a norm or a scale that learns
    follows it.
    """
    products = [module for module in layer.modules() if _matmul_of(module) is not None]
    scale = getattr(getattr(layer, "layer_scale2", None), "lambda1", getattr(layer, "gamma", None))
    follows = hasattr(layer, "post_feedforward_layernorm") or (
        scale is not None and scale.requires_grad
    )
    return products if follows else products[:-1]


def _matmul_of(module: Any) -> Matmul | None:
    """Sizes by attribute: under ZeRO-3 a weight's shape is [0]."""
    if isinstance(module, nn.Linear):
        sizes = module.in_features, module.out_features
    elif isinstance(module, nn.Conv2d):
        height, width = module.kernel_size
        sizes = module.in_channels // module.groups * height * width, module.out_channels
    elif type(module).__name__ == "Conv1D":  # GPT-2's linear layer
        sizes = int(module.nx), int(module.nf)
    else:
        return None
    inputs, outputs = sizes
    return Matmul(inputs=inputs, outputs=outputs, trained=bool(module.weight.requires_grad))
