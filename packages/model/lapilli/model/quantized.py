"""Linear layers in 4 bits (QLoRA, arXiv 2305.14314), by bitsandbytes."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lapilli.model.errors import ModelError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

__all__ = ["PACKED_BYTES", "numbers_of", "pack_shapes", "packed_numbers", "quantization"]

BLOCK = 64  # numbers with a scale of their own; a block of 256 scales has one more, in fp32
PACKED_BYTES = 1 / 2 + 1 / BLOCK + 4 / (256 * BLOCK)
"""What a number takes: its half of a byte, and its share of the scales."""


def quantization(dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4, the scales quantised too; computes in `dtype`.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "language.quantize: bitsandbytes is not installed; pip install 'lapilli[qlora]', or "
            "set language.quantize none"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip


def pack_shapes(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give a model without weights the layers that `from_pretrained` would quantise.

    The same layers are replaced, by transformers itself; what they hold has the shapes and types
    of packed weights and no values. They compute in forward and cannot be saved.
    """
    from bitsandbytes.functional import QuantState
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    layers: Any = importlib.import_module("bitsandbytes.nn")
    replacing: Any = Bnb4BitHfQuantizer(quantization(dtype), pre_quantized=False)
    with unset_fake_temporarily():  # it makes its layers on the meta device
        replacing.preprocess_model(model, device_map=None)
    modules: list[Any] = [*model.modules()]
    for module in modules:
        if isinstance(module, layers.Linear4bit):
            rows, columns = module.weight.shape
            packed: Any = nn.Parameter(
                torch.empty((rows * columns + 1) // 2, 1, dtype=torch.uint8), requires_grad=False
            )
            # A Params4bit cannot be a fake tensor; these attributes are what is read of one.
            packed.compress_statistics, packed.quant_type = True, "nf4"
            packed.quant_state = QuantState(
                torch.empty(-(-rows * columns // BLOCK)), torch.Size((rows, columns)),
                blocksize=BLOCK, quant_type="nf4",
            )  # fmt: skip
            module.weight = packed
            if module.bias is not None:
                module.bias = nn.Parameter(torch.empty(rows, dtype=dtype), requires_grad=False)


def numbers_of(parameter: nn.Parameter) -> int:
    """Numbers a parameter stands for: packed in 4 bits it has half as many elements."""
    state: Any = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def packed_numbers(part: nn.Module) -> int:
    """How many of a part's numbers are held in 4 bits."""
    return sum(numbers_of(p) for p in part.parameters() if hasattr(p, "quant_state"))
