"""Measure a model's size and activation memory without its weights.

Nothing is allocated: torch's fake tensors have shapes and no memory, so 13B take seconds.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lapilli.data.batches.collate import Batch
from lapilli.model.attention.choice import AUTO, choose_attention
from lapilli.model.config import ModelConfig
from lapilli.model.parts.language import language_settings
from lapilli.model.parts.pretrained import one_line
from lapilli.model.parts.trainable import parameter_counts, set_modes
from lapilli.model.torch_internals import FakeTensorMode, set_tensor_data, without_stacks
from lapilli.model.transformers_internals import without_grouped_mm
from lapilli.model.vlm import VisionLanguageModel, build_model

__all__ = ["ActivationBytes", "Sketch", "sketch_model"]


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes that the forward pass keeps for the backward pass.

    Attributes:
        kept: With everything kept.
        checkpointed: With gradient checkpointing: each layer's input, and one whole layer while it
            runs again.
    """

    kept: int
    checkpointed: int


@dataclass(frozen=True)
class Sketch:
    """A model of fake tensors.

    Attributes:
        model: Its parameters have shapes, dtypes and `requires_grad`.
        mode: In which its forward runs.
    """

    model: VisionLanguageModel
    mode: FakeTensorMode

    def parameters(self) -> dict[str, tuple[int, int]]:
        """Parameters by part: all, and those that learn."""
        return parameter_counts(self.model)

    def activations(self, batch: Batch) -> ActivationBytes:
        """Bytes that autograd keeps for a batch of these shapes, each storage once.

        Counted by running forward on fake tensors, as a CPU would run it: attention without the
        scores, the head's chunked loss with the gradients it keeps.
        """
        inputs = {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "merge_index": batch.merge_index,
            "pixels": batch.pixels,
            "predict_positions": batch.predict_positions,
            "targets": batch.targets,
        }
        counter = _Counter(self.model, batch.input_ids.shape[1])
        with self.mode, counter.counting():
            fake = {
                name: torch.empty(value.shape, dtype=getattr(torch, str(value.dtype)))
                for name, value in inputs.items()
            }
            told = one_line("model: a batch cannot be computed with these settings")
            with told, without_stacks(), without_grouped_mm():
                self.model(**fake)
        return counter.bytes()


class _Counter:
    """Saved tensors by the layer that saved them."""

    def __init__(self, model: VisionLanguageModel, length: int) -> None:
        self._length = length
        self._layers = [layer for part in _recomputable(model) for layer in part]
        weights = [parameter.untyped_storage() for parameter in model.parameters()]
        # kept, so that no other storage takes an id
        self._seen: dict[int, torch.UntypedStorage] = {id(kept): kept for kept in weights}
        self._inside: int | None = None
        self._by_layer: dict[int | None, int] = {None: 0}
        self._inputs = 0

    @contextmanager
    def counting(self) -> Generator[None]:
        """Count what is saved meanwhile."""
        handles = [
            handle
            for number, layer in enumerate(self._layers)
            for handle in (
                layer.register_forward_pre_hook(self._entering(number)),
                layer.register_forward_hook(self._leaving),
            )
        ]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def bytes(self) -> ActivationBytes:
        """The sums."""
        outside = self._by_layer[None]
        layers = [size for layer, size in self._by_layer.items() if layer is not None]
        return ActivationBytes(
            outside + sum(layers), outside + self._inputs + max(layers, default=0)
        )

    def _entering(self, number: int) -> Any:
        def enter(layer: nn.Module, given: tuple[Any, ...]) -> None:
            del layer
            self._inside = number
            if given and isinstance(given[0], Tensor) and given[0].requires_grad:
                self._inputs += given[0].nbytes

        return enter

    def _leaving(self, *_: Any) -> None:
        self._inside = None

    def _pack(self, saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        # Fake tensors cannot be asked whether a mask is needed, so one is made; a run has none.
        is_mask = saved.dim() == 4 and saved.shape[1:] == (1, self._length, self._length)
        if id(storage) not in self._seen and not is_mask:
            self._seen[id(storage)] = storage
            size = self._by_layer.get(self._inside, 0) + storage.nbytes()
            self._by_layer[self._inside] = size
        return saved


def _recomputable(model: VisionLanguageModel) -> Iterator[list[nn.Module]]:
    """The layers that gradient checkpointing would run again (`checkpoint_activations`)."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for part in ("vision", "language"):
        if part == "language" or part in model.config.trainable:
            modules = model.get_submodule(part).modules()
            yield [module for module in modules if isinstance(module, GradientCheckpointingLayer)]


def sketch_model(config: ModelConfig) -> Sketch:
    """Build a config's model of fake tensors; of pretrained parts only the config is read.

    It is the model that a run builds, in the modes that a run sets, but for what only a GPU can
    run: the merge and the loss are torch's, and fused attention is torch's too where the
    architecture has it, else eager.

    Raises:
        ModelError: A part that cannot be built.
    """
    mode = FakeTensorMode()
    settings = language_settings(config.language)
    attention = choose_attention(config.language.attention, settings).name
    if attention not in ("eager", "sdpa"):
        attention = AUTO
    on_cpu = replace(
        config,
        language=replace(config.language, attention=attention),
        gradient_checkpointing=False,
        merge="torch",
        kernels="torch",
        compile="none",
    )
    with mode, _no_values():
        model = build_model(on_cpu, weights=False)
    set_modes(model)
    _fix_frequencies(model)
    return Sketch(model, mode)


def _fix_frequencies(model: VisionLanguageModel) -> None:
    """Rotary embeddings that follow the length (longrope, dynamic) look at the positions' values.

    A fake tensor has none. The frequencies' shapes are those of every other kind.
    """
    modules: list[Any] = [*model.modules()]
    for module in modules:
        kind: Any = getattr(module, "rope_type", None)
        if isinstance(kind, str):
            module.rope_type = "default"
        elif isinstance(kind, dict):  # by the layers' type, as Gemma 3 has it
            module.rope_type = dict.fromkeys(kind, "default")


@contextmanager
def _no_values() -> Generator[None]:
    """What a model of fake tensors is built in: weights that are never drawn, `to` that works.

    Some of transformers' initialisations look at the numbers they draw.
    """
    from transformers.initialization import no_init_weights

    with no_init_weights(), set_tensor_data():
        yield
