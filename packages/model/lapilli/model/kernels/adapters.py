"""LoRA layers whose update is added by the matrix product itself.

PEFT scales the update and adds it to the layer's output in operations of their own, which move the
output through memory five times more in forward and twice more in backward. Here the second
product accumulates into the output: `y += scaling * (x A^T) B^T`, one `addmm_`.

Shape suffix legend: N rows, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn

__all__ = ["fuse_adapters"]


def fuse_adapters(model: nn.Module) -> int:
    """Let a model's plain LoRA layers accumulate their update; others stay as PEFT made them.

    A layer keeps its parameters, their names and PEFT's methods.

    Returns:
        Layers that were changed.
    """
    from peft.tuners.lora import Linear

    layers = [module for module in model.modules() if type(module) is Linear]
    for layer in layers:
        layer.__class__ = _fused_class()
    return len(layers)


@cache
def _fused_class() -> type[Any]:
    from peft.tuners.lora import Linear

    class FusedLinear(Linear):
        """PEFT's layer; a class and no bound method, so that copies of a model are its own."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """The layer's output, [..., O] for [..., I]; anything unusual is PEFT's."""
            names = self.active_adapters
            is_plain = (
                not (args or kwargs or self.disable_adapters or self.merged or self.lora_variant)
                and len(names) == 1
                and x.dim() >= 2
                and names[0] in self.lora_A
                and self.lora_A[names[0]].weight.dtype == x.dtype
                and getattr(self.lora_B[names[0]], "bias", None) is None
            )
            return (
                _accumulated(self, names[0], x) if is_plain else super().forward(x, *args, **kwargs)
            )

    return FusedLinear


def _accumulated(layer: Any, name: str, x: Tensor) -> Tensor:
    x_NI = x.flatten(0, -2)
    output_NO: Tensor = layer.base_layer(x_NI)
    low_NR: Tensor = layer.lora_A[name](layer.lora_dropout[name](x_NI))
    output_NO.addmm_(low_NR, layer.lora_B[name].weight.t(), alpha=layer.scaling[name])
    return output_NO.unflatten(0, x.shape[:-1])
