"""Keep the language model's linear layers in 4 bits (QLoRA, arXiv 2305.14314) or 8 (LLM.int8).

They are quantised by bitsandbytes after an earlier run's weights were put into them and before
adapters are put around them, so that adapters of an earlier run are merged into whole numbers.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lapilli.model.config import LanguageConfig
from lapilli.model.errors import ModelError
from lapilli.model.torch_internals import unset_fake_temporarily
from lapilli.model.transformers_internals import kept_in_fp32

__all__ = [
    "SCALES", "Quantization", "check_quantization", "is_packed", "numbers_of", "pack_shapes",
    "packed_numbers", "quantize", "quantized_layers", "round_linear_layers", "round_trip",
    "whole_shape", "whole_weight",
]  # fmt: skip

BLOCK = 64  # numbers with a scale of their own; a block of 256 scales has one more, in fp32
THRESHOLD = 6.0  # inputs above are multiplied in whole numbers, as transformers has it
SCALES = ("SCB", "weight_format")
"""What a state dict has beside a weight in 8 bits."""


@dataclass(frozen=True)
class Quantization:
    """How linear layers are kept.

    Attributes:
        kind: `nf4`, `fp4` or `int8`.
        is_double: Whether the scales of 4 bits are quantised too.
    """

    kind: str = "nf4"
    is_double: bool = True

    @staticmethod
    def of(language: LanguageConfig) -> Quantization:
        """What a recipe asks for."""
        return Quantization(language.quantize, language.double_quant)

    @property
    def number_bytes(self) -> float:
        """What a number takes, its share of the scales included."""
        if self.kind == "int8":
            return 1 + 4 / 1024  # a scale a row
        scales = 1 / BLOCK + 4 / (256 * BLOCK) if self.is_double else 4 / BLOCK
        return 1 / 2 + scales

    @property
    def settings(self) -> dict[str, Any]:
        """The words of bitsandbytes for 4 bits."""
        return {"compress_statistics": self.is_double, "quant_type": self.kind}


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
    """The linear layers that are kept in few bits, as transformers chooses them: not the head."""
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


def quantize(language: Any, dtype: torch.dtype, how: Quantization) -> None:
    """Put layers in few bits, which compute in `dtype`, in the place of a model's linear layers.

    One layer at a time, on the GPU where there is one.
    """
    for name in quantized_layers(language):
        layer = language.get_submodule(name)
        weight = _rows_first(layer).detach()
        packed = _empty_layer(layer, dtype, how)
        packed.weight = _pack(weight.to(dtype), how, packed)
        packed.bias = layer.bias
        packed.is_transposed = _is_transposed(layer)
        language.set_submodule(name, packed)
    _tell_peft(language, how)


def _tell_peft(language: Any, how: Quantization) -> None:
    """Set what peft looks for."""
    setattr(language, "is_loaded_in_8bit" if how.kind == "int8" else "is_loaded_in_4bit", True)


def pack_shapes(language: Any, dtype: torch.dtype, how: Quantization) -> None:
    """As `quantize` for a model without weights: packed shapes and types, and no values.

    Such layers compute in forward and cannot be saved. Works on fake tensors too.
    """
    functional = _bitsandbytes().functional
    for name in quantized_layers(language):
        layer = language.get_submodule(name)
        rows, columns = _rows_first(layer).shape
        with unset_fake_temporarily():  # it makes its weight itself
            packed = _empty_layer(layer, dtype, how)
        packed.bias = layer.bias
        language.set_submodule(name, packed)
        if how.kind == "int8":
            _pack_int8_shape(packed, rows, columns)
            continue
        weight: Any = nn.Parameter(
            torch.empty((rows * columns + 1) // 2, 1, dtype=torch.uint8), requires_grad=False
        )
        # A Params4bit cannot be a fake tensor; these attributes are what is read of one.
        weight.compress_statistics, weight.quant_type = how.is_double, how.kind
        weight.quant_state = functional.QuantState(
            torch.empty(-(-rows * columns // BLOCK)), torch.Size((rows, columns)),
            blocksize=BLOCK, quant_type=how.kind,
        )  # fmt: skip
        packed.weight = weight
    _tell_peft(language, how)


def _pack_int8_shape(layer: Any, rows: int, columns: int) -> None:
    """Give a layer in 8 bits a weight without values; outliers depend on values, so it has none."""
    values = torch.empty(rows, columns, dtype=torch.int8)
    weight: Any = nn.Parameter(values, requires_grad=False)
    weight.CB = weight.SCB = None
    layer.weight, layer.state.threshold = weight, 0.0
    layer.state.CB, layer.state.SCB = values, torch.empty(rows)


def round_trip(weight: Tensor, dtype: torch.dtype, how: Quantization) -> Tensor:
    """[out, in] as a layer in few bits computes with it, in `dtype` and on the weight's device."""
    packed = _pack(weight.to(dtype), how)
    functional = _bitsandbytes().functional
    if how.kind == "int8":
        whole = functional.int8_vectorwise_dequant(packed.data, packed.SCB).to(dtype)
    else:
        whole = functional.dequantize_4bit(packed.data, packed.quant_state)
    return whole.to(weight.device)


@torch.no_grad()
def round_linear_layers(language: Any, dtype: torch.dtype, how: Quantization) -> None:
    """Round, in place, what `quantize` would pack to the numbers it would compute with."""
    for name in quantized_layers(language):
        layer = language.get_submodule(name)
        rounded = round_trip(_rows_first(layer).detach(), dtype, how)
        layer.weight.copy_(rounded.T if _is_transposed(layer) else rounded)


def numbers_of(parameter: nn.Parameter) -> int:
    """Numbers that a parameter represents: packed in 4 bits it has half as many elements."""
    state: Any = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def packed_numbers(part: nn.Module) -> int:
    """How many of a part's numbers are held in 4 or 8 bits."""
    return sum(numbers_of(p) for p in part.parameters() if is_packed(p))


def is_packed(weight: Any) -> bool:
    """Whether a parameter is a weight in 4 or 8 bits."""
    return hasattr(weight, "quant_state") or getattr(weight, "dtype", None) is torch.int8


def whole_shape(layer: Any) -> tuple[int, ...]:
    """The shape that a quantised layer's weight had before."""
    state: Any = getattr(layer.weight, "quant_state", layer.weight)
    shape = tuple(state.shape)
    return shape[::-1] if layer.is_transposed else shape


def whole_weight(layer: Any) -> Tensor:
    """The numbers that a quantised layer computes with, laid out as before it was quantised."""
    weight, functional = layer.weight, _bitsandbytes().functional
    if weight.dtype is torch.int8:
        scales = layer.state.SCB if weight.SCB is None else weight.SCB  # moved in the first forward
        found = functional.int8_vectorwise_dequant(weight.data, scales)
    else:
        found = functional.dequantize_4bit(weight.data, weight.quant_state)
    return found.T if layer.is_transposed else found


def _rows_first(layer: Any) -> Tensor:
    """A layer's weight as [out, in]."""
    return layer.weight.T if _is_transposed(layer) else layer.weight


def _is_transposed(layer: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def _empty_layer(layer: Any, dtype: torch.dtype, how: Quantization) -> Any:
    """A layer in few bits of the same shape, on the meta device."""
    rows, columns = _rows_first(layer).shape
    modules, has_bias = _bitsandbytes().nn, layer.bias is not None
    with torch.device("meta"):
        if how.kind == "int8":
            return modules.Linear8bitLt(
                columns, rows, has_bias, has_fp16_weights=False, threshold=THRESHOLD
            )
        made = modules.Linear4bit(columns, rows, has_bias, dtype, **how.settings)
    # On processors with AVX512-BF16 it would repack its weight for a kernel of fewer bits when it
    # is first asked: other numbers than training's, and not for every shape.
    made.support_avx512bf16_for_cpu = False
    return made


def _pack(weight: Tensor, how: Quantization, module: Any = None) -> Any:
    device, modules = (
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        _bitsandbytes().nn,
    )
    whole = weight.contiguous()
    if how.kind == "int8":
        made = modules.Int8Params(whole, requires_grad=False, has_fp16_weights=False)
    else:
        made = modules.Params4bit(whole, requires_grad=False, module=module, **how.settings)
    return made.to(device)


def _bitsandbytes() -> Any:
    check_quantization()
    return importlib.import_module("bitsandbytes")
