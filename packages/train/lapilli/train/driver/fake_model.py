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
from lapilli.model.auxiliary.target_loss import AuxInputs, TargetRows
from lapilli.model.config import ModelConfig
from lapilli.model.flops import recomputation_flops
from lapilli.model.parts.language import language_settings
from lapilli.model.parts.pretrained import one_line
from lapilli.model.parts.recomputation import recomputable_layers
from lapilli.model.parts.trainable import parameter_counts, set_modes
from lapilli.model.torch_internals import FakeTensorMode, set_tensor_data, without_stacks
from lapilli.model.transformers_internals import without_grouped_mm
from lapilli.model.vlm import VisionLanguageModel, build_model
from lapilli.train.checkpoint.at_hand import local_model
from lapilli.train.driver.activation_memory import ActivationBytes, LayerBytes

__all__ = ["Sketch", "sketch_model"]


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

    def activations(self, batch: Batch, records: int = 0) -> ActivationBytes:
        """Bytes that autograd keeps for a batch of these shapes.

        Counted by running forward on fake tensors, as a CPU would run it: attention without the
        scores, the head's chunked loss with the gradients it keeps.

        Args:
            batch: A batch.
            records: Of the global batch, an image each, whose targets the predictors are compared
                with; 0 runs no predictor.
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
            aux = self._aux(batch, records) if records and self.model.config.aux.heads else None
            with told, without_stacks(), without_grouped_mm():
                self.model(**fake, aux=aux)
        return counter.bytes()

    def _aux(self, batch: Batch, records: int) -> AuxInputs:
        """The targets of a global batch, in 8 bits."""
        aux = self.model.config.aux
        shapes = {task: aux.shape(task) for task in {task for task, _ in aux.heads}}
        targets = {
            task: TargetRows(
                torch.empty(records, rows, width, dtype=torch.int8),
                torch.empty(records, rows),
                torch.empty(records, dtype=torch.bool),
            )
            for task, (rows, width) in shapes.items()
        }
        return AuxInputs(
            targets=targets,
            own=torch.empty(len(batch.pixels), dtype=torch.int64),
            segments=torch.empty(batch.tree_ids.shape, dtype=torch.int32),
            records=records,
            weight=1.0,
            losses=torch.empty(len(aux.heads), 2),
        )


class _Counter:
    """Saved tensors by the layer that made them."""

    def __init__(self, model: VisionLanguageModel, length: int) -> None:
        self._model, self._length = model, length
        self._parts = recomputable_layers(model)
        weights = [parameter.untyped_storage() for parameter in model.parameters()]
        # kept, so that no other storage takes an id
        self._seen: dict[int, torch.UntypedStorage] = {id(kept): kept for kept in weights}
        self._inside: nn.Module | None = None
        self._outside = 0
        self._kept: dict[nn.Module, int] = {}
        self._inputs: dict[nn.Module, dict[int, torch.UntypedStorage]] = {}
        self._keeps_input: set[nn.Module] = set()
        self._shared: dict[int, torch.UntypedStorage] = {}  # made outside and given to layers
        self._tokens: dict[nn.Module, tuple[int, int]] = {}

    @contextmanager
    def counting(self) -> Generator[None]:
        """Count what is saved meanwhile."""
        handles = [
            handle
            for layers in self._parts.values()
            for layer in layers
            for handle in (
                layer.register_forward_pre_hook(self._enter, with_kwargs=True),
                layer.register_forward_hook(self._leave),
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
        layers = [
            LayerBytes(
                part=part,
                kept=self._kept[layer],
                input=sum(storage.nbytes() for storage in self._inputs[layer].values()),
                keeps_input=layer in self._keeps_input,
                flops=self._flops(part, layer),
            )
            for part, layers in self._parts.items()
            for layer in layers
            if layer in self._kept
        ]
        called = sum(s.nbytes() for key, s in self._shared.items() if key not in self._seen)
        return ActivationBytes(self._outside + called, tuple(layers))

    def _flops(self, part: str, layer: nn.Module) -> int:
        rows, tokens = self._tokens[layer]
        configs = (getattr(m, "config", None) for m in self._model.get_submodule(part).modules())
        config = next((found for found in configs if hasattr(found, "num_attention_heads")), None)
        pairs = tokens**2 if part == "vision" else tokens * (tokens + 1) // 2
        return recomputation_flops(layer, config, tokens=rows * tokens, pairs=rows * pairs)

    def _enter(self, layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._inside = layer
        self._kept[layer] = 0
        hidden = [*_tensors(given)] or [each for each in _tensors(named) if each.requires_grad]
        storages = [each.untyped_storage() for each in hidden]
        self._inputs[layer] = {id(s): s for s in storages if id(s) not in self._seen}
        self._tokens[layer] = (hidden[0].shape[0], hidden[0].shape[1])
        held = [t for t in _tensors(named) if t.is_floating_point() and not self._is_mask(t)]
        self._shared |= {id(s): s for s in (each.untyped_storage() for each in held)}

    def _is_mask(self, tensor: Tensor) -> bool:
        """Fake tensors cannot be asked whether a mask is needed, so one is made; a run has none."""
        return tensor.dim() == 4 and tensor.shape[1:] == (1, self._length, self._length)

    def _leave(self, *_: Any) -> None:
        self._inside = None

    def _pack(self, saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        key, layer = id(storage), self._inside
        if self._is_mask(saved) or key in self._seen:
            return saved
        self._seen[key] = storage
        if layer is not None and key in self._inputs[layer]:
            self._keeps_input.add(layer)
        elif layer is not None and key not in self._shared:
            self._kept[layer] += storage.nbytes()
        else:
            self._outside += storage.nbytes()
        return saved


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in nested arguments."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(tuple(values.values()))  # pyright: ignore
    elif isinstance(values, tuple | list):
        for value in values:  # pyright: ignore
            yield from _tensors(value)


def sketch_model(config: ModelConfig) -> Sketch:
    """Build a config's model of fake tensors; of pretrained parts only the config is read.

    It is the model that a run builds, in the modes that a run sets, but for what only a GPU can
    run: the merge and the loss are torch's, and fused attention is torch's too where the
    architecture has it, else eager.

    Raises:
        ModelError: A part that cannot be built.
    """
    config = local_model(config)
    mode = FakeTensorMode()
    settings = language_settings(config.language)
    attention = choose_attention(config.language.attention, settings).name
    if attention not in ("eager", "sdpa"):
        attention = AUTO
    on_cpu = replace(
        config,
        language=replace(config.language, attention=attention),
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
