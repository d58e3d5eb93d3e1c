"""A model without its weights: how large its parts are and what a micro-batch keeps for backward.

Nothing is allocated: torch's fake tensors have shapes and no memory, so 13B take seconds.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lapilli.data.collate import Batch
from lapilli.model.config import ModelConfig
from lapilli.model.pretrained import one_line
from lapilli.model.vlm import VisionLanguageModel, build_model

__all__ = ["ActivationBytes", "Sketch", "sketch_model"]


@dataclass(frozen=True)
class ActivationBytes:
    """What forward keeps for backward.

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
        return {
            name: (
                sum(p.numel() for p in part.parameters()),
                sum(p.numel() for p in part.parameters() if p.requires_grad),
            )
            for name, part in self.model.named_children()
        }

    def activations(self, batch: Batch) -> ActivationBytes:
        """Bytes that autograd keeps for a batch of these shapes, each storage once.

        Counted by running forward on fake tensors, as a CPU would run it: attention without the
        scores, the head's chunked loss with the gradients it keeps.
        """
        inputs = {
            "input_ids": batch.input_ids, "position_ids": batch.position_ids,
            "merge_index": batch.merge_index, "pixels": batch.pixels,
            "predict_positions": batch.predict_positions, "targets": batch.targets,
        }  # fmt: skip
        counter = _Counter(self.model, batch.input_ids.shape[1])
        with self.mode, counter.counting():
            fake = {
                name: torch.empty(value.shape, dtype=getattr(torch, str(value.dtype)))
                for name, value in inputs.items()
            }
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

    Raises:
        ModelError: A part that cannot be built.
    """
    mode = FakeTensorMode()
    without = replace(_without_weights(config), gradient_checkpointing=False)
    with mode:
        return Sketch(build_model(without), mode)


def _without_weights(config: ModelConfig) -> ModelConfig:
    """The same sizes from settings alone."""
    vision, language = config.vision, config.language
    if vision.pretrained:
        found = _read_config("vision.pretrained", vision.pretrained, False)
        found = getattr(found, "vision_config", found)
        vision = replace(vision, pretrained="", settings=_settings(found))
    if language.pretrained:
        found = _read_config("language.pretrained", language.pretrained, language.trust_remote_code)
        language = replace(
            language, pretrained="", model_type=found.model_type, settings=_settings(found)
        )
    return replace(config, vision=vision, language=language)


def _read_config(field: str, name: str, trusts: bool) -> Any:
    from transformers import AutoConfig

    with one_line(
        f"{field}: {name!r} has no config that can be read; expected a hub name or folder"
    ):
        return AutoConfig.from_pretrained(name, trust_remote_code=trusts)


def _settings(config: Any) -> dict[str, Any]:
    """What a recipe's `settings` may hold of transformers' config."""
    known = type(config)().to_dict().keys()
    own = {"model_type", "transformers_version", "dtype", "architectures", "_name_or_path"}
    return {k: v for k, v in config.to_dict().items() if k in known and k not in own}
