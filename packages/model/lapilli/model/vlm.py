"""The vision-language model: tower, projector, merge, language model, loss.

Shape suffix legend: B rows, S tokens, N images, H height, W width, T tokens an image,
F = N x T feature rows, C tower's hidden size, D language model's hidden size, V vocabulary,
P trained positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lapilli.model.attention.choice import choose_attention
from lapilli.model.attention.trees import Trees, check_trees
from lapilli.model.auxiliary.layer_states import decoder_layers, kept_states
from lapilli.model.auxiliary.predictors import Predictors, image_places
from lapilli.model.auxiliary.target_loss import AuxInputs
from lapilli.model.auxiliary.task_tokens import TaskTokens
from lapilli.model.config import ModelConfig, Part
from lapilli.model.errors import ModelError
from lapilli.model.kernels.adapters import fuse_adapters
from lapilli.model.kernels.choice import wants_liger
from lapilli.model.kernels.compiled import compile_blocks
from lapilli.model.kernels.liger import apply_liger
from lapilli.model.loss import trained_loss
from lapilli.model.merging import merge
from lapilli.model.parts.added_rows import add_rows, added_rows
from lapilli.model.parts.language import (
    build_language,
    language_settings,
    logit_scale,
    logit_softcap,
    text_scale,
    vocabulary_size,
)
from lapilli.model.parts.llava_folder import llava_projector
from lapilli.model.parts.normalisation import with_normalisation
from lapilli.model.parts.pretrained import Loading, whole
from lapilli.model.parts.projector import build_projector, set_scale
from lapilli.model.parts.quantized import Quantization, pack_shapes, quantize
from lapilli.model.parts.trainable import add_adapters, freeze, trainable_parameters
from lapilli.model.parts.vision import TowerShape, build_tower, tower_shape
from lapilli.model.transformers_internals import attention_of

__all__ = ["AUX_PARTS", "Outline", "VisionLanguageModel", "build_model", "read_outline"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
AUX_PARTS: tuple[Part, Part] = ("task_tokens", "predictors")


class VisionLanguageModel(nn.Module):
    """A LLaVA-style model. `forward` gives the summed loss of a batch."""

    def __init__(
        self, config: ModelConfig, loading: Loading = whole, *, weights: bool = True
    ) -> None:
        super().__init__()
        self.vision = build_tower(config.vision, weights=weights)
        self.language: Any = build_language(
            config.language, DTYPES[config.dtype], loading, weights=weights
        )
        chosen = attention_of(self.language)
        self.config = replace(config, language=replace(config.language, attention=chosen))
        size = int(self.language.get_input_embeddings().embedding_dim)
        self.projector = build_projector(config.projector, self.vision.hidden_size, size)
        if config.projector_std is not None:
            set_scale(self.projector, config.projector_std)
        added = self._add_aux(size)
        for part in (self.vision, self.projector, *added):
            for parameter in part.parameters():
                # not `to`: that would round buffers too, and rotary frequencies must stay fp32
                parameter.data = parameter.data.to(DTYPES[config.dtype])
        family = str(self.language.config.model_type)
        if wants_liger(config, family):
            apply_liger(self.language, "auto" if config.kernels == "auto" else "liger")
        self._softcap = logit_softcap(self.language)
        self._logit_scale = logit_scale(self.language)

    def _add_aux(self, size: int) -> list[nn.Module]:
        """Add the parts that `config.aux` asks for, and give them; a model without has none."""
        aux = self.config.aux
        if aux.mode:
            self.task_tokens = TaskTokens(aux, size)
        if aux.heads:
            count = len(decoder_layers(self.language.get_decoder()))
            if max(layer for _, layer in aux.heads) > count:
                raise ModelError(
                    f"aux.layers: {aux.layers}; the language model has {count} layers, counted "
                    "from 1"
                )
            self.predictors = Predictors(aux, size)
        return [part for name, part in self.named_children() if name in AUX_PARTS]

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: ids the model knows."""
        return int(self.language.config.vocab_size)

    @property
    def image_tokens(self) -> int:
        """Tokens an image takes in the sequence: the tower's rows, and its task tokens."""
        return self.vision.num_tokens + self.config.aux.tokens

    def image_features(self, pixels_NHW3: Tensor) -> Tensor:
        """Feature rows of all images, each followed by its task tokens: [F, D]."""
        with torch.set_grad_enabled("vision" in self.config.trainable and torch.is_grad_enabled()):
            features_NTC = self.vision(pixels_NHW3)
        rows_NTD = self.projector(features_NTC)
        if self.config.aux.mode:
            tokens_KD = self.task_tokens()[0].to(rows_NTD.dtype)
            rows_NTD = torch.cat([rows_NTD, tokens_KD.expand(len(rows_NTD), -1, -1)], 1)
        return rows_NTD.flatten(0, 1)

    def _without_images(self, like: Tensor) -> Tensor:
        """[some, D]: what a text-only batch runs, to be weighted with zero.

        Every trainable module runs in every micro-step on every rank. DeepSpeed's stage 3
        otherwise applies the gradient of the step before, and ranks wait for each other for ever.
        """
        if "vision" in self.config.trainable:
            side = self.vision.image_size
            blank_NHW3 = torch.zeros(1, side, side, 3, dtype=torch.uint8, device=like.device)
            return self.image_features(blank_NHW3)
        rows = self.projector(like.new_zeros(1, self.vision.hidden_size))
        return torch.cat([rows, self.task_tokens()[0]]) if self.config.aux.mode else rows

    def embed(self, input_ids_BS: Tensor, merge_index_BS: Tensor, pixels_NHW3: Tensor) -> Tensor:
        """Text embeddings with the images' features in their slots: [B, S, D]."""
        embedding_VD = self.language.get_input_embeddings().weight
        if pixels_NHW3.shape[0]:
            features_FD = self.image_features(pixels_NHW3)
            return self._merge(input_ids_BS, merge_index_BS, embedding_VD, features_FD)
        none_FD = embedding_VD.new_empty(0, embedding_VD.shape[1])
        merged_BSD = self._merge(input_ids_BS, merge_index_BS, embedding_VD, none_FD)
        return merged_BSD + 0.0 * self._without_images(embedding_VD).sum()

    def _merge(
        self, input_ids: Tensor, merge_index: Tensor, embedding: Tensor, features: Tensor
    ) -> Tensor:
        features = features.to(embedding.dtype)
        merged = merge(
            input_ids, merge_index, embedding, features, implementation=self.config.merge
        )
        if (rows := added_rows(self.language)) is not None:
            merged = rows.embed(input_ids.masked_fill(merge_index >= 0, 0), merged)
        scale = text_scale(self.language)
        if isinstance(scale, float) and scale == 1.0:
            return merged
        return merged * torch.where(merge_index < 0, scale, 1.0).to(merged.dtype).unsqueeze(-1)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        merge_index: Tensor,
        pixels: Tensor,
        predict_positions: Tensor,
        targets: Tensor,
        tree_ids: Tensor | None = None,
        branch_ids: Tensor | None = None,
        target_samples: Tensor | None = None,
        sample_losses: Tensor | None = None,
        aux: AuxInputs | None = None,
    ) -> Tensor:
        """Summed cross-entropy of the trained positions of a batch (`lapilli.data.Batch`).

        Padding stands on the right and attention is causal, so rows of one sample need no mask.
        `tree_ids` and `branch_ids`, int32 [B, S], say which tokens of rows that hold several see
        each other. `sample_losses`, fp32 [samples], is filled with each sample's share of the sum,
        on the device and detached; `target_samples`, int64 [P], says whose each target is. With
        `aux`, the losses of the predictors are added.

        Returns:
            fp32 scalar.

        Raises:
            ModelError: Ids of trees, and attention that cannot honour them.
        """
        trees = None
        if tree_ids is not None and branch_ids is not None:
            check_trees(attention_of(self.language))
            trees = Trees(tree_ids, branch_ids, position_ids)
        embedded_BSD = self.embed(input_ids, merge_index, pixels)
        hidden_BSD, states = self._decoded(embedded_BSD, position_ids, trees, aux is not None)
        head = self.language.get_output_embeddings()
        rows = added_rows(self.language)
        each_P = None if sample_losses is None else sample_losses.new_zeros(len(targets))
        loss = trained_loss(
            hidden_BSD,
            predict_positions,
            targets,
            head.weight,
            getattr(head, "bias", None),
            chunk=self.config.head_chunk,
            softcap=self._softcap,
            scale=self._logit_scale,
            implementation=self.config.kernels,
            each=each_P,
            added=None if rows is None else rows.head_rows,
        )
        if sample_losses is not None and each_P is not None:
            # without ids a sample a row
            rows_P = predict_positions // input_ids.shape[1]
            _fill_samples(
                sample_losses, each_P, rows_P if target_samples is None else target_samples
            )
        if aux is None:
            return loss
        return loss + self._aux_loss(merge_index, states, aux)

    @torch.no_grad()
    def predict_targets(
        self, input_ids: Tensor, position_ids: Tensor, merge_index: Tensor, pixels: Tensor,
        segments: Tensor,
    ) -> dict[tuple[str, int], Tensor]:  # fmt: skip
        """What each predictor says of each image of a batch, [N, R, C], by task and layer.

        Arguments as for `forward`; `segments`, int32 [B, S], is 0 for padding (`AuxInputs`).
        """
        embedded_BSD = self.embed(input_ids, merge_index, pixels)
        _, states = self._decoded(embedded_BSD, position_ids, None, True)
        places = image_places(
            merge_index, segments, len(pixels), self.vision.num_tokens, self.config.aux
        )
        return self.predictors.predict(states, self.task_tokens()[1], places)

    def _decoded(
        self, embedded_BSD: Tensor, position_ids: Tensor, trees: Trees | None, predicts: bool
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The decoder's states after its last norm, and by layer those that something predicts."""
        decoder = self.language.get_decoder()
        inputs: dict[str, Any] = {"inputs_embeds": embedded_BSD, "position_ids": position_ids}
        if trees is not None:
            inputs |= {"trees": trees, "position_ids": trees.on_positions()}
        layers = {layer for _, layer in self.config.aux.heads} if predicts else set[int]()
        with kept_states(decoder, layers) as states:
            hidden_BSD = decoder(use_cache=False, **inputs).last_hidden_state
        if layers:
            states[len(decoder_layers(decoder))] = hidden_BSD
        return hidden_BSD, states

    def _aux_loss(self, merge_index: Tensor, states: dict[int, Tensor], aux: AuxInputs) -> Tensor:
        """The losses of the predictors; a batch without images runs them for a blank one."""
        if not len(aux.own):
            aux = replace(aux, own=aux.own.new_full((1,), -1))
        places = image_places(
            merge_index, aux.segments, len(aux.own), self.vision.num_tokens, self.config.aux
        )
        return self.predictors(states, self.task_tokens()[1], places, aux)


def _fill_samples(sample_losses: Tensor, each_P: Tensor, target_samples_P: Tensor) -> None:
    """Sum the positions' losses by sample."""
    # masked sums and no index_add: on a GPU that one's order, and so its result, varies
    samples_N1 = torch.arange(len(sample_losses), device=each_P.device).unsqueeze(1)
    is_here_NP = samples_N1 == target_samples_P
    sample_losses.copy_(torch.where(is_here_NP, each_P, 0.0).sum(1))


@dataclass(frozen=True)
class Outline:
    """What a dataset must fit, by the names that a `VisionLanguageModel` has for it.

    Attributes:
        vision: Image size and feature rows an image.
        vocab_size: Ids the model knows.
        image_tokens: Tokens an image takes in the sequence.
    """

    vision: TowerShape
    vocab_size: int
    image_tokens: int


def read_outline(config: ModelConfig) -> Outline | None:
    """What a model's images and ids will be, from configs alone: no weight is read.

    Returns:
        None for a tower of one's own, which has to be built to be asked.

    Raises:
        ModelError: A config that cannot be read, or wrong settings.
    """
    vocabulary = vocabulary_size(config.language)
    choose_attention(config.language.attention, language_settings(config.language))
    shape = tower_shape(config.vision)
    return shape and Outline(shape, vocabulary, shape.num_tokens + config.aux.tokens)


def build_model(
    config: ModelConfig,
    loading: Loading = whole,
    prepare: Callable[[VisionLanguageModel], None] = lambda model: None,
    *,
    weights: bool = True,
) -> VisionLanguageModel:
    """Build a model, with random weights from `config.seed` where none are pretrained, and freeze.

    Args:
        config: The model's settings.
        loading: Stands around the reading of the language model's weights.
        prepare: Called with the model before anything is put around its layers or kept in 4 bits:
            what it puts into the weights lies below the adapters.
        weights: Whether pretrained weights are read; without, a model has their shapes alone,
            which is what a model of fake tensors is made with.

    Raises:
        ModelError: A part that cannot be built.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = VisionLanguageModel(
            replace(config, vision=with_normalisation(config.vision)), loading, weights=weights
        )
        if weights:
            _read_projector(model, config.language.pretrained)
        prepare(model)
        if config.language.quantize != "none":
            how = Quantization.of(config.language)
            (quantize if weights else pack_shapes)(model.language, DTYPES[config.dtype], how)
        freeze(model, config.trainable)
        if config.language.train_added_rows:
            _train_added_rows(model)
        if config.lora:
            add_adapters(model, config.lora)
            fuse_adapters(model)
    if config.compile == "blocks":
        compile_blocks(model)
    if not trainable_parameters(model):
        raise ModelError(
            f"trainable: {', '.join(config.trainable)} with projector {config.projector} has no "
            "parameter; expected a part that learns"
        )
    return model


def _train_added_rows(model: VisionLanguageModel) -> None:
    """Let the embedding's added rows learn beside a frozen language model.

    Raises:
        ModelError: No row was added.
    """
    if add_rows(model.language, with_head=False) is None:
        raise ModelError(
            f"language.vocab_size: {model.config.language.vocab_size} adds no row to the "
            f"{model.vocab_size} there are, and train_added_rows has nothing to train; set it to "
            "the length of a tokenizer with added tokens"
        )


def _read_projector(model: VisionLanguageModel, name: str) -> None:
    """Take the projector of a LLaVA folder that the language model is read from.

    Raises:
        ModelError: It is another projector.
    """
    found = llava_projector(name)
    held = model.projector.state_dict()
    if found and {n: v.shape for n, v in found.items()} != {n: v.shape for n, v in held.items()}:
        shapes = ", ".join(f"{n} {tuple(v.shape)}" for n, v in sorted(found.items()))
        raise ModelError(
            f"projector: {model.config.projector}, and {name} has one of {shapes}; set that of its "
            "config.json (mm_projector_type), and its tower"
        )
    if found:
        model.projector.load_state_dict(found)
