"""Keep the language model's linear layers in 4 bits (NF4; QLoRA, arXiv 2305.14314).

They are quantised by bitsandbytes after an earlier run's weights were put into them and before
adapters are put around them, so that adapters of an earlier run are merged into whole numbers.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from lapilli.model.errors import ModelError
from lapilli.model.torch_internals import unset_fake_temporarily
from lapilli.model.transformers_internals import kept_in_fp32

__all__ = [
    "PACKED_BYTES", "check_quantization", "numbers_of", "pack_shapes", "packed_numbers", "quantize",
    "quantized_layers", "round_linear_layers", "round_trip", "whole_shape", "whole_weight",
]  # fmt: skip

BLOCK = 64  # numbers with a scale of their own; a block of 256 scales has one more, in fp32
PACKED_BYTES = 1 / 2 + 1 / BLOCK + 4 / (256 * BLOCK)
"""What a number takes: its half of a byte, and its share of the scales."""

KIND: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4"}


def check_quantization() -> None:
    """Refuse a machine that cannot quantise.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "language.quantize: bitsandbytes is not installed; pip install 'lapilli[qlora]', or "
            "set language.quantize none"
        )


def quantized_layers(language: Any) -> list[str]:
    """The linear layers that are kept in 4 bits, as transformers chooses them: not the head."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    left_out: Any = HfQuantizer.get_modules_to_not_convert(language, None, kept_in_fp32(language))
    return [
        name
        for name, module in language.named_modules()
        if (isinstance(module, Conv1D) or type(module) is nn.Linear)
        and should_convert_module(name, left_out)
    ]


def quantize(language: Any, dtype: torch.dtype) -> None:
    """Put layers in 4 bits, which compute in `dtype`, in the place of a model's linear layers.

    One layer at a time, on the GPU where there is one.
    """
    for name in quantized_layers(language):
        layer = language.get_submodule(name)
        weight = _rows_first(layer).detach()
        packed = _empty_layer(layer, dtype)
        packed.weight = _pack(weight.to(dtype), module=packed)
        packed.bias = layer.bias
        packed.is_transposed = _is_transposed(layer)
        language.set_submodule(name, packed)
    language.is_loaded_in_4bit = True  # what peft looks for


def pack_shapes(language: Any, dtype: torch.dtype) -> None:
    """As `quantize` for a model without weights: packed shapes and types, and no values.

    Such layers compute in forward and cannot be saved. Works on fake tensors too.
    """
    functional = _bitsandbytes().functional
    for name in quantized_layers(language):
        layer = language.get_submodule(name)
        rows, columns = _rows_first(layer).shape
        with unset_fake_temporarily():  # it makes its weight itself
            packed = _empty_layer(layer, dtype)
        weight: Any = nn.Parameter(
            torch.empty((rows * columns + 1) // 2, 1, dtype=torch.uint8), requires_grad=False
        )
        # A Params4bit cannot be a fake tensor; these attributes are what is read of one.
        weight.compress_statistics, weight.quant_type = True, "nf4"
        weight.quant_state = functional.QuantState(
            torch.empty(-(-rows * columns // BLOCK)), torch.Size((rows, columns)),
            blocksize=BLOCK, quant_type="nf4",
        )  # fmt: skip
        packed.weight, packed.bias = weight, layer.bias
        language.set_submodule(name, packed)
    language.is_loaded_in_4bit = True


def round_trip(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[out, in] as a layer in 4 bits computes with it, in `dtype` and on the weight's device."""
    packed = _pack(weight.to(dtype))
    functional = _bitsandbytes().functional
    return functional.dequantize_4bit(packed.data, packed.quant_state).to(weight.device)


@torch.no_grad()
def round_linear_layers(language: Any, dtype: torch.dtype) -> None:
    """Round, in place, what `quantize` would put in 4 bits to the numbers it would compute with."""
    for name in quantized_layers(language):
        layer = language.get_submodule(name)
        rounded = round_trip(_rows_first(layer).detach(), dtype)
        layer.weight.copy_(rounded.T if _is_transposed(layer) else rounded)


def numbers_of(parameter: nn.Parameter) -> int:
    """Numbers that a parameter represents: packed in 4 bits it has half as many elements."""
    state: Any = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def packed_numbers(part: nn.Module) -> int:
    """How many of a part's numbers are held in 4 bits."""
    return sum(numbers_of(p) for p in part.parameters() if hasattr(p, "quant_state"))


def whole_shape(layer: Any) -> tuple[int, ...]:
    """The shape that a quantised layer's weight had before."""
    shape = tuple(layer.weight.quant_state.shape)
    return shape[::-1] if layer.is_transposed else shape


def whole_weight(layer: Any) -> Tensor:
    """The numbers that a quantised layer computes with, laid out as before it was quantised."""
    weight = layer.weight
    found = _bitsandbytes().functional.dequantize_4bit(weight.data, weight.quant_state)
    return found.T if layer.is_transposed else found


def _rows_first(layer: Any) -> Tensor:
    """A layer's weight as [out, in]."""
    return layer.weight.T if _is_transposed(layer) else layer.weight


def _is_transposed(layer: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def _empty_layer(layer: Any, dtype: torch.dtype) -> Any:
    """A layer in 4 bits of the same shape, on the meta device."""
    rows, columns = _rows_first(layer).shape
    with torch.device("meta"):
        made = _bitsandbytes().nn.Linear4bit(columns, rows, layer.bias is not None, dtype, **KIND)
    # On processors with AVX512-BF16 it would repack its weight for a kernel of fewer bits when it
    # is first asked: other numbers than training's, and not for every shape.
    made.support_avx512bf16_for_cpu = False
    return made


def _pack(weight: Tensor, **values: Any) -> Any:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parameter = _bitsandbytes().nn.Params4bit
    return parameter(weight.contiguous(), requires_grad=False, **KIND, **values).to(device)


def _bitsandbytes() -> Any:
    check_quantization()
    return importlib.import_module("bitsandbytes")
