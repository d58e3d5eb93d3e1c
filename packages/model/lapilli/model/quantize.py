"""The language model's linear layers in 4 bits (NF4, twice quantised; QLoRA, arXiv 2305.14314).

They are quantised after an earlier run's weights were put into them and before adapters are put
around them, so that adapters of an earlier run are merged into whole numbers.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from lapilli.model.errors import ModelError

__all__ = ["check_quantization", "quantize", "quantized_layers", "round_trip"]


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
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    left_out: Any = HfQuantizer.get_modules_to_not_convert(
        language, None, language._keep_in_fp32_modules
    )
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
    from transformers.pytorch_utils import Conv1D

    bitsandbytes = _bitsandbytes()
    for name in quantized_layers(language):
        layer = language.get_submodule(name)
        weight = layer.weight.detach()
        weight = weight.T if isinstance(layer, Conv1D) else weight
        with torch.device("meta"):
            packed = bitsandbytes.nn.Linear4bit(
                weight.shape[1], weight.shape[0], layer.bias is not None, dtype,
                compress_statistics=True, quant_type="nf4",
            )  # fmt: skip
        packed.weight = _pack(weight.to(dtype), module=packed)
        packed.bias = layer.bias
        language.set_submodule(name, packed)
    language.is_loaded_in_4bit = True  # what peft looks for


def round_trip(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[out, in] as a layer in 4 bits computes with it, in `dtype` and on the weight's device."""
    packed = _pack(weight.to(dtype))
    functional = _bitsandbytes().functional
    return functional.dequantize_4bit(packed.data, packed.quant_state).to(weight.device)


def _pack(weight: Tensor, **values: Any) -> Any:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4", **values}
    parameter = _bitsandbytes().nn.Params4bit
    return parameter(weight.contiguous(), requires_grad=False, **kind).to(device)


def _bitsandbytes() -> Any:
    check_quantization()
    return importlib.import_module("bitsandbytes")
