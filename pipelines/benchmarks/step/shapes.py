"""Shapes of the models that are measured: those of published ones, and small ones of random weights.

Each is the settings of a tower or a decoder, as `VisionConfig` and `LanguageConfig` take them.
"""

from __future__ import annotations

from typing import Any

__all__ = ["CLIP_L", "LLAMA_3", "PHI_15", "QWEN_7B", "SIGLIP", "SIZES", "decoder", "tower"]


def tower(
    hidden: int, layers: int, heads: int, image: int, patch: int, inner: int = 0
) -> dict[str, Any]:
    """A vision transformer's settings; `inner` of its MLP is four times `hidden` unless given."""
    return {
        "hidden_size": hidden, "intermediate_size": inner or 4 * hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "image_size": image,
        "patch_size": patch,
    }  # fmt: skip


def decoder(
    hidden: int, layers: int, heads: int, vocabulary: int, positions: int
) -> dict[str, Any]:
    """A Llama's settings, with an MLP of four times `hidden` and as many key heads as heads."""
    return {
        "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": vocabulary,
        "max_position_embeddings": positions,
    }  # fmt: skip


CLIP_L = tower(1024, layers=24, heads=16, image=336, patch=14)
SIGLIP = tower(1152, layers=27, heads=16, image=384, patch=14, inner=4304)
LLAMA_3: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
QWEN_7B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
    "num_attention_heads": 32, "kv_channels": 128, "seq_length": 8192, "vocab_size": 151936,
}  # fmt: skip
PHI_15: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 51200,
}  # fmt: skip
# A tower and a decoder by name: LLaVA-1.5's two, TinyLlama's, and two for a CPU.
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "7b": (
        CLIP_L,
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
         "max_position_embeddings": 4096},
    ),
    "13b": (
        CLIP_L,
        {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
         "num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": 32000,
         "max_position_embeddings": 4096},
    ),
    "1b": (
        CLIP_L,
        {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
         "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000,
         "max_position_embeddings": 4096},
    ),
    "small": (
        {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3,
         "num_attention_heads": 4, "image_size": 112, "patch_size": 14},
        {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 4,
         "num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 4096},
    ),
    "tiny": (
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
         "num_attention_heads": 2, "image_size": 56, "patch_size": 14},
        {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 512},
    ),
}  # fmt: skip
