"""A tiny decoder of each architecture, with shared heads of keys and windows where it has any."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.model import twins

LENGTH, WINDOW, HIDDEN = 11, 4, 24
WINDOWED = (
    "cohere2", "gemma2", "gemma3_text", "ministral", "mistral", "mixtral", "olmo3", "phi3", "qwen2",
    "qwen3", "smollm3", "starcoder2",
)  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "gemma2": {"attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "mixtral": {"num_local_experts": 2},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 1},
    "smollm3": {"use_sliding_window": True, "no_rope_layers": [0, 1, 0, 1]},
}
GPT2: dict[str, Any] = {
    "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "vocab_size": twins.VOCABULARY,
}  # fmt: skip


def settings(family: str, window: int | None = WINDOW, layers: int = 2) -> dict[str, Any]:
    """Settings of a few thousand parameters."""
    if family == "gpt2":
        return {**GPT2, "n_layer": layers}
    known = AutoConfig.for_model(family).to_dict()
    values: dict[str, Any] = {**twins.DECODER, "num_attention_heads": 4, "num_key_value_heads": 2}
    values["num_hidden_layers"] = layers
    values = {**values, **twins.MORE.get(family, {}), **OWN.get(family, {})}
    for name in ("attention_dropout", "hidden_dropout", "resid_pdrop", "dropout", "embd_pdrop"):
        if name in known:
            values[name] = 0.0
    if "head_dim" in known:
        values["head_dim"] = 8
    if family in WINDOWED:
        values["sliding_window"] = window
    if family == "smollm3":
        values["no_rope_layers"] = values["no_rope_layers"][:layers]
    if family == "opt":
        values.update(word_embed_proj_dim=HIDDEN, ffn_dim=32)
    if family in ("phi", "gpt_neox", "stablelm"):
        values["num_attention_heads"] = values["num_key_value_heads"] = 3
    return {name: value for name, value in values.items() if name in known}


def language(family: str, attention: str, **given: Any) -> Any:
    """A decoder in training mode; the same weights whatever its attention."""
    config = AutoConfig.for_model(family, **settings(family, **given))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def inputs(
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, int] = (2, LENGTH),
) -> dict[str, Any]:
    """Rows of embeddings, the same for every architecture."""
    generator = torch.Generator().manual_seed(1)
    embedded = torch.randn(*shape, HIDDEN, generator=generator).to(device, dtype)
    return {
        "inputs_embeds": embedded.requires_grad_(),
        "position_ids": torch.arange(shape[1], device=device).expand(shape),
        "use_cache": False,
    }


def run(model: Any, given: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states, and the gradients of a loss that weighs them unevenly, by name."""
    hidden = model.get_decoder()(**given).last_hidden_state
    weights = torch.linspace(-1, 1, hidden[0].numel(), device=hidden.device).view(hidden[0].shape)
    (hidden * weights).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return hidden.detach(), {**found, "inputs_embeds": given["inputs_embeds"].grad}
