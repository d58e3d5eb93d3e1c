"""Read Qwen-1 (`QWenLMHeadModel`, as Qwen-7B) into transformers' Qwen2, without its code.

Up to `seq_length` positions both compute the same: queries, keys and values come from one fused
layer, and the gated MLP is `w1(x) * silu(w2(x))`. Beyond it Qwen-1 scales queries by log-n and its
rotary base by the length, which is not implemented; longer sequences are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lapilli.model.errors import ModelError
from lapilli.model.parts.weight_files import read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "SOURCE", "first_of_fused", "is_qwen1", "qwen1_config", "qwen1_layer", "qwen1_names",
    "qwen1_weights", "refuse_minicpm",
]  # fmt: skip

SOURCE = "source_model_type"
"""What a config's model was read from, where that is another architecture: `qwen`."""
THEIRS, OURS = "transformer.h.", "model.layers."
# Below a layer.
LAYERS = {
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.up_proj",
    "mlp.w2": "mlp.gate_proj",
    "mlp.c_proj": "mlp.down_proj",
}
OUTSIDE = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm"}
SPLIT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # of the fused `c_attn`
COMPUTED = ("rotary_emb.inv_freq", "attn.masked_bias", "logn_tensor")  # of the config
REQUIRED: Mapping[str, Any] = {"no_bias": True, "rotary_pct": 1.0, "scale_attn_weights": True}
FILES = ["*.safetensors", "*.bin", "*.json"]


def is_qwen1(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is Qwen-1's; its successors have types of their own."""
    return config.get("model_type") == "qwen"


def refuse_minicpm(name: object, config: Mapping[str, Any]) -> None:
    """Reject MiniCPM, whose own code scales embeddings, layers and logits.

    A decoder run without that code would be another model, with or without `trust_remote_code`.

    Raises:
        ModelError: Names the folder and what is supported.
    """
    kind = config.get("model_type")
    if kind in ("minicpm", "minicpmv", "minicpmo"):
        raise ModelError(
            f"{name}: a {kind}; MiniCPM is not supported, expected a decoder that transformers "
            "has without remote code, or Qwen-7B (model_type qwen)"
        )


def qwen1_config(name: str, config: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of transformers' Qwen2 with the sizes of a Qwen-1.

    Args:
        name: Folder or hub name, for messages.
        config: Its `config.json`.

    Raises:
        ModelError: A variant that Qwen2 does not compute, or sizes that do not fit.
    """
    from transformers import Qwen2Config

    for key, value in REQUIRED.items():
        if config.get(key, value) != value:
            raise ModelError(f"{name}: {key} {config[key]!r} of a Qwen-1; expected {value}")
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        inner, length = int(config["intermediate_size"]), int(config["seq_length"])
        channels = int(config.get("kv_channels", hidden // heads))
        rows, layers = int(config["vocab_size"]), int(config["num_hidden_layers"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(
            f"{name}: no Qwen-1 can be built of its config.json ({type(error).__name__}: {error})"
        ) from None
    if channels * heads != hidden:
        raise ModelError(
            f"{name}: kv_channels {channels} times num_attention_heads {heads} is not hidden_size "
            f"{hidden}; expected a Qwen-1 whose product is"
        )
    theta = float(config.get("rotary_emb_base", 10000.0))
    made = Qwen2Config(
        vocab_size=rows,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=inner // 2,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=length,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        rms_norm_eps=float(config.get("layer_norm_epsilon", 1e-6)),
        attention_dropout=float(config.get("attn_dropout_prob", 0.0)),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        use_sliding_window=False,
    )
    setattr(made, SOURCE, "qwen")
    return made


def qwen1_weights(
    name: str, settings: PreTrainedConfig, *, allow_pickle: bool
) -> dict[str, Tensor]:
    """A Qwen-1's weights by the names of transformers' Qwen2, without copies of them.

    Args:
        name: Folder, or hub name.
        settings: What `qwen1_config` made of its config.
        allow_pickle: Take `.bin` files too.

    Raises:
        ModelError: Weights that are not there, or are not those of such a model.
    """
    folder = _folder(name)
    if not allow_pickle and not any(folder.glob("*.safetensors")):
        raise ModelError(f"{name}: no *.safetensors in it; set allow_pickle to read .bin files")
    found: dict[str, Tensor] = {}
    for key, value in read_tensors(folder).items():
        if not key.endswith(COMPUTED):
            found.update(_renamed(name, key, value))
    expected = _names(settings)
    if different := sorted(expected ^ found.keys()):
        key = different[0]
        what = "is missing" if key in expected else "is unknown"
        raise ModelError(
            f"{name}: {key} {what}; expected a whole Qwen-1 that is not quantised, copy it again"
        )
    return found


def qwen1_layer(name: str) -> tuple[str, ...]:
    """The layers of Qwen2 that a layer of Qwen-1 is: three for `c_attn`; empty for no known one."""
    if name.startswith(THEIRS):
        number, _, rest = name.removeprefix(THEIRS).partition(".")
        if number.isdigit():
            inside = SPLIT if rest == "attn.c_attn" else (LAYERS.get(rest),)
            return tuple(f"{OURS}{number}.{one}" for one in inside if one)
    outside = name if name == "lm_head" else OUTSIDE.get(name)
    return (outside,) if outside else ()


def first_of_fused(layer: str) -> str:
    """The layer whose name stands for the queries, keys and values of one fused layer."""
    ending = next((one for one in SPLIT if layer.endswith(one)), "")
    return layer.removesuffix(ending) + SPLIT[0] if ending else layer


def qwen1_names(language: Any) -> dict[str, str]:
    """What the linear layers of a decoder were in the Qwen-1 that it was read from.

    Returns:
        By the layer's path; empty for a model that was none. Three layers are one `c_attn`.
    """
    if getattr(language.config, SOURCE, "") != "qwen":
        return {}
    return {
        ours: f"{THEIRS}{number}.{theirs}"
        for number in range(language.config.num_hidden_layers)
        for theirs in ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
        for ours in qwen1_layer(f"{THEIRS}{number}.{theirs}")
    }


def _renamed(name: str, key: str, value: Tensor) -> dict[str, Tensor]:
    layer, _, leaf = key.rpartition(".")
    ours = qwen1_layer(layer)
    if not ours or leaf not in ("weight", "bias") or value.shape[0] % len(ours):
        shape = tuple(value.shape)
        raise ModelError(
            f"{name}: {key} of shape {shape} in a Qwen-1; expected a whole model that is not "
            "quantised"
        )
    parts = value.chunk(len(ours)) if len(ours) > 1 else (value,)
    return {f"{one}.{leaf}": part for one, part in zip(ours, parts, strict=True)}


def _names(settings: Any) -> set[str]:
    layers = [*SPLIT, *LAYERS.values()]
    names = {
        f"{OURS}{number}.{layer}.weight"
        for number in range(settings.num_hidden_layers)
        for layer in layers
    }
    names |= {re.sub("weight$", "bias", name) for name in names if name[:-7].endswith(SPLIT)}
    head = set[str]() if settings.tie_word_embeddings else {"lm_head.weight"}
    return names | head | {f"{one}.weight" for one in OUTSIDE.values()}


def _folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=FILES))
