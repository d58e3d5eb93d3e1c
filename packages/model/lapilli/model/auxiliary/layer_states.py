"""Keep the hidden states of some decoder layers of one forward pass."""

from __future__ import annotations

from collections.abc import Collection, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from lapilli.model.errors import ModelError

__all__ = ["decoder_layers", "kept_states"]


def decoder_layers(decoder: Any) -> nn.ModuleList:
    """The layers of a decoder of transformers: its list of the configured length.

    Raises:
        ModelError: There is none.
    """
    count = int(decoder.config.num_hidden_layers)
    for module in decoder.children():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ModelError(
        f"aux.layers: {decoder.config.model_type} has no list of {count} layers; use another "
        "language model, or leave aux.layers out"
    )


@contextmanager
def kept_states(decoder: Any, layers: Collection[int]) -> Generator[dict[int, Tensor]]:
    """Keep the outputs of layers, counted from 1, of the forward inside; no other is kept.

    The hooks are gone before backward, where recomputed layers run once more. The last layer is not
    among them: its state is the decoder's own output, after its norm.
    """
    kept: dict[int, Tensor] = {}
    modules = decoder_layers(decoder) if layers else []
    handles = [
        modules[layer - 1].register_forward_hook(partial(_keep, kept, layer))
        for layer in layers
        if layer < len(modules)
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def _keep(kept: dict[int, Tensor], layer: int, module: nn.Module, given: Any, output: Any) -> None:
    del module, given
    kept[layer] = output if isinstance(output, Tensor) else output[0]
