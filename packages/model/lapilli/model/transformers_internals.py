"""What lapilli's models use of transformers without a public way.

`tests/contracts/test_private_internals.py` looks whether the installed version has each of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FunctionType
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "ATTENTION_FLAGS", "GROUPED_MM", "attention_of", "check_attention", "kept_in_fp32",
    "model_class_of", "rotary_function", "set_recomputation", "supported_attention",
    "with_rotary_function", "without_grouped_mm",
]  # fmt: skip

ATTENTION_FLAGS = {
    "sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn",
    "flex_attention": "_supports_flex_attn",
}  # fmt: skip
ROTARY = "apply_rotary_pos_emb"
GROUPED_MM = "transformers.integrations.moe._can_use_grouped_mm"


def attention_of(model: Any) -> str:
    """The attention implementation that a model runs.

    Used: `config._attn_implementation`; `set_attn_implementation` is public, reading it back is
    not. If it went, AttributeError is raised when a model is built.
    """
    return str(model.config._attn_implementation)


def supported_attention(model_class: Any) -> tuple[str, ...]:
    """The implementations that an architecture can be built with.

    Used: the class's flags `_supports_sdpa`, `_supports_flash_attn` and `_supports_flex_attn`;
    there is no list. A flag that went counts as unsupported: `auto` would choose eager attention.
    """
    found = (name for name, flag in ATTENTION_FLAGS.items() if getattr(model_class, flag, False))
    return ("eager", *found)


def check_attention(model_class: Any, settings: PreTrainedConfig, wanted: str) -> str:
    """Resolve an attention setting by transformers' own check.

    Used: `_check_and_adjust_attn_implementation`, on an instance without weights; it reads the
    class's flags and the config. The public way builds the model first, which takes minutes. If it
    went, every choice but `auto` is refused as unsupported.

    Raises:
        ValueError, ImportError: It is not supported, or not installed.
        AttributeError: There is no such check.
    """
    probe: Any = object.__new__(model_class)
    object.__setattr__(probe, "config", settings)
    return str(probe._check_and_adjust_attn_implementation(wanted, is_init_check=True))


def model_class_of(settings: PreTrainedConfig) -> Any:
    """The class of transformers that a config is built with; None where it is another's code.

    Used: `AutoModelForCausalLM._model_mapping`; the public classes build a model and tell its class
    afterwards. If it went, AttributeError is raised when attention is chosen.
    """
    from transformers import AutoModelForCausalLM

    known: Any = AutoModelForCausalLM
    mapping = known._model_mapping
    if type(settings) not in mapping or "AutoModelForCausalLM" in getattr(settings, "auto_map", {}):
        return None
    found = mapping[type(settings)]
    return found[0] if isinstance(found, (list, tuple)) else found


def kept_in_fp32(model: Any) -> Any:
    """The modules that an architecture keeps in fp32, which are not quantised either.

    Used: `_keep_in_fp32_modules`, which transformers' own quantisers are given; nothing public
    lists them. If it went, AttributeError is raised when layers are quantised.
    """
    return model._keep_in_fp32_modules


@contextmanager
def without_grouped_mm() -> Generator[None]:
    """Have mixtures of experts compute their product without torch's grouped one.

    Used: `transformers.integrations.moe._can_use_grouped_mm`. The grouped product has no fake form
    in fp32; transformers' way without it has one, and no setting chooses it on the model's fake
    twin alone. If it went, AttributeError is raised when a model's memory is estimated.
    """
    with patch(GROUPED_MM, lambda *_: False):
        yield


def rotary_function(module: Any) -> Callable[..., Any] | None:
    """What an attention module rotates queries and keys with; None for any other module.

    Used: the name `apply_rotary_pos_emb`, a function of each architecture's file that its attention
    looks up when it runs; no module or setting holds it. If it went, fewer modules than a decoder
    has layers would be changed, which `tests/model/test_liger.py` counts.
    """
    forward: Any = inspect.unwrap(type(module).forward)
    is_attention = type(module).__name__.endswith("Attention") and hasattr(forward, "__globals__")
    if not is_attention or ROTARY not in forward.__code__.co_names:
        return None
    return forward.__globals__[ROTARY]


def with_rotary_function(module: Any, rotate: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of an attention module, unbound, that rotates with another function.

    Used: as `rotary_function`. The architecture's own function stays for all other models.
    """
    forward: Any = inspect.unwrap(type(module).forward)
    made = FunctionType(
        forward.__code__, {**forward.__globals__, ROTARY: rotate}, forward.__name__,
        forward.__defaults__, forward.__closure__,
    )  # fmt: skip
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def set_recomputation(layer: Any, run: Callable[..., Any] | None) -> None:
    """What a decoder's or tower's layer runs its forward by in training; None for nothing.

    Used: `_gradient_checkpointing_func`, which the layer calls with its forward and its inputs
    where `gradient_checkpointing` is true. `activation_checkpointing_enable` sets whole models, and
    its offloading waits for the device. If it went, AttributeError is raised in the first forward.
    """
    layer.gradient_checkpointing = run is not None
    layer._gradient_checkpointing_func = run
