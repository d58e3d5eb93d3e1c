"""Qwen-1 in transformers' Qwen2 classes, beside a forward of its own in plain torch."""

from __future__ import annotations

import json
import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from lapilli.model.config import LanguageConfig
from lapilli.model.errors import ModelError
from lapilli.model.flops import model_numbers
from lapilli.model.interop.foreign import read_foreign
from lapilli.model.parts.language import build_language, language_settings, vocabulary_size
from lapilli.model.parts.positions import positions_of
from lapilli.model.parts.qwen1 import qwen1_layer
from lapilli.model.vlm import build_model, read_outline
from tests.model.test_vlm import CONFIG

HIDDEN, HEADS, INNER, LAYERS, VOCABULARY = 32, 4, 48, 2, 97
# The fields of Qwen-7B's config.json that say what is computed; `intermediate_size` counts both
# halves of the gated MLP.
SETTINGS: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},
    "model_type": "qwen", "hidden_size": HIDDEN, "intermediate_size": 2 * INNER,
    "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "kv_channels": HIDDEN // HEADS,
    "vocab_size": VOCABULARY, "seq_length": 64, "max_position_embeddings": 256,
    "layer_norm_epsilon": 1e-6, "rotary_emb_base": 10000, "rotary_pct": 1.0, "no_bias": True,
    "use_dynamic_ntk": True, "use_logn_attn": True, "tie_word_embeddings": False,
}  # fmt: skip


def tensors(seed: int = 0, vocabulary: int = VOCABULARY) -> dict[str, Tensor]:
    """Random weights by the names that Qwen-7B's files have."""
    made = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made) * 0.2

    found = {
        "transformer.wte.weight": drawn(vocabulary, HIDDEN),
        "transformer.ln_f.weight": 1 + drawn(HIDDEN),
        "lm_head.weight": drawn(vocabulary, HIDDEN),
    }
    for layer in range(LAYERS):
        sizes = {
            "ln_1": (HIDDEN,), "ln_2": (HIDDEN,), "attn.c_attn": (3 * HIDDEN, HIDDEN),
            "attn.c_proj": (HIDDEN, HIDDEN), "mlp.w1": (INNER, HIDDEN), "mlp.w2": (INNER, HIDDEN),
            "mlp.c_proj": (HIDDEN, INNER),
        }  # fmt: skip
        for name, size in sizes.items():
            found[f"transformer.h.{layer}.{name}.weight"] = drawn(*size) + (len(size) == 1)
        found[f"transformer.h.{layer}.attn.c_attn.bias"] = drawn(3 * HIDDEN)
    return found


def write_qwen1(
    folder: Path, *, pickled: bool = False, rows: int = VOCABULARY, **settings: Any
) -> Path:
    """A tiny Qwen-1 as it is published, with `rows` of vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SETTINGS | {"vocab_size": rows} | settings))
    found = tensors(vocabulary=rows)
    if pickled:
        torch.save(found, folder / "pytorch_model.bin")
    else:
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def rotated(x: Tensor) -> Tensor:
    """[S, heads, size], the halves of a head rotated by the angles of each position."""
    length, size = x.shape[0], x.shape[-1]
    frequencies = 1.0 / 10000 ** (torch.arange(0, size, 2).float() / size)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    cos, sin = (f(torch.cat([angles, angles], -1))[:, None] for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def plain_logits(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """[S, V]: Qwen-1's forward of one sequence, by its equations."""
    x, length = weights["transformer.wte.weight"][ids], len(ids)
    for layer in range(LAYERS):
        own = {
            name.removeprefix(f"transformer.h.{layer}."): value for name, value in weights.items()
        }
        normed = rms(x, own["ln_1.weight"])
        mixed = normed @ own["attn.c_attn.weight"].T + own["attn.c_attn.bias"]
        query, key, value = (one.view(length, HEADS, -1) for one in mixed.split(HIDDEN, -1))
        scores = torch.einsum("qhc,khc->hqk", rotated(query), rotated(key))
        scores = scores / math.sqrt(HIDDEN // HEADS)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        weight = scores.masked_fill(later, -math.inf).softmax(-1)
        seen = torch.einsum("hqk,khc->qhc", weight, value).reshape(length, HIDDEN)
        x = x + seen @ own["attn.c_proj.weight"].T
        normed = rms(x, own["ln_2.weight"])
        first, gate = normed @ own["mlp.w1.weight"].T, normed @ own["mlp.w2.weight"].T
        x = x + (first * functional.silu(gate)) @ own["mlp.c_proj.weight"].T
    return rms(x, weights["transformer.ln_f.weight"]) @ weights["lm_head.weight"].T


@pytest.mark.parametrize("attention", ["lapilli", "sdpa", "eager"])
@pytest.mark.parametrize("pickled", [False, True])
def test_logits_are_those_of_its_equations(tmp_path: Path, attention: str, pickled: bool) -> None:
    folder = write_qwen1(tmp_path, pickled=pickled)
    config = LanguageConfig(pretrained=str(folder), attention=attention, allow_pickle=pickled)
    ids = torch.randint(VOCABULARY, (64,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = build_language(config).eval()(input_ids=ids[None], use_cache=False).logits[0]
    expected = plain_logits(tensors(), ids)
    assert expected.std() > 0.1  # not a model that ignores its weights
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_every_number_is_read_and_no_other(tmp_path: Path) -> None:
    language = build_language(LanguageConfig(pretrained=str(write_qwen1(tmp_path))))
    theirs = sum(value.numel() for value in tensors().values())
    assert sum(value.numel() for value in language.parameters()) == theirs
    assert qwen1_layer("transformer.h.1.attn.c_attn") == tuple(
        f"model.layers.1.self_attn.{one}_proj" for one in "qkv"
    )


def test_shapes_are_known_without_weights(tmp_path: Path) -> None:
    (folder := tmp_path / "config alone").mkdir()
    (folder / "config.json").write_text(json.dumps(SETTINGS))
    language = LanguageConfig(pretrained=str(folder))
    assert vocabulary_size(language) == VOCABULARY
    config = replace(CONFIG, language=language)
    outline = read_outline(config)
    assert outline is not None
    assert outline.vocab_size == VOCABULARY
    assert model_numbers(build_model(config, weights=False))
    with pytest.raises(ModelError, match="no weights; expected"):
        build_model(replace(config, language=replace(language, allow_pickle=True)))


def test_positions_end_at_its_trained_length(tmp_path: Path) -> None:
    """Beyond it log-n attention and dynamic NTK would begin, which are not implemented."""
    found = positions_of(build_language(LanguageConfig(pretrained=str(write_qwen1(tmp_path)))))
    assert found is not None
    assert (found.limit, found.is_fixed) == (64, True)


def test_weights_are_read_where_processes_share_them(tmp_path: Path) -> None:
    inside: list[bool] = []

    @contextmanager
    def loading() -> Generator[None]:
        inside.append(True)
        yield

    language = LanguageConfig(pretrained=str(write_qwen1(tmp_path)))
    build_model(replace(CONFIG, language=language), loading)
    assert inside == [True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rotary_pct": 0.25}, r"rotary_pct 0\.25 of a Qwen-1; expected 1\.0"),
        ({"no_bias": False}, "no_bias False of a Qwen-1; expected True"),
        ({"kv_channels": 16}, "kv_channels 16 times num_attention_heads 4 is not hidden_size 32"),
        ({"seq_length": None}, r"no Qwen-1 can be built of its config\.json \(TypeError"),
        ({"num_attention_heads": 0, "kv_channels": None}, r"no Qwen-1 can be built of its config"),
        ({"num_hidden_layers": 3}, r"model\.layers\.2\..* is missing; expected a whole Qwen-1"),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\..* is unknown; expected a whole Qwen-1"),
        ({"vocab_size": 98}, "cannot be loaded"),
        ({"model_type": "minicpm"}, "a minicpm; MiniCPM is not supported"),
    ],
)
def test_another_model_is_one_line(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    folder = write_qwen1(tmp_path, **settings)
    with pytest.raises(ModelError, match=message) as said:
        build_language(LanguageConfig(pretrained=str(folder), trust_remote_code=True))
    assert "\n" not in str(said.value)
    assert str(folder) in str(said.value)


def test_pickles_need_to_be_allowed_and_quantised_weights_are_named(tmp_path: Path) -> None:
    language = LanguageConfig(pretrained=str(write_qwen1(tmp_path / "bin", pickled=True)))
    with pytest.raises(ModelError, match=r"no \*\.safetensors in it; set allow_pickle"):
        build_language(language)
    folder = write_qwen1(tmp_path / "int4")
    packed = tensors()
    packed["transformer.h.0.mlp.w1.qweight"] = packed.pop("transformer.h.0.mlp.w1.weight")
    save_file(packed, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"w1\.qweight of shape .* that is not quantised"):
        build_language(LanguageConfig(pretrained=str(folder)))


def test_minicpm_is_named_wherever_a_model_is_taken(tmp_path: Path) -> None:
    folder = write_qwen1(tmp_path, model_type="minicpm")
    with pytest.raises(ModelError, match="MiniCPM is not supported"):
        language_settings(LanguageConfig(pretrained=str(folder)))
    with pytest.raises(ModelError, match="MiniCPM is not supported"):
        read_foreign(folder)
