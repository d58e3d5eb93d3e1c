"""Names and config of exports beside those that vLLM's LLaVA loads, frozen from its source.

Facts read from vllm-project/vllm (Apache-2.0): `models/llava.py` at 35d3c24b, `models/clip.py` at
030ea52e, `lora/lora_model.py` at 0306474e. vLLM is not installed here, it wants a GPU; its loader
refuses a weight that no module has, and a module without its weight is an error too, so both
directions are compared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.pipelines.test_export_runs import LORA, Runs

# `hf_to_vllm_mapper` of LlavaForConditionalGeneration, for the names since transformers 4.52.
PREFIXES = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}
# Modules of vLLM that hold several of a checkpoint's.
PACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
PAIR = (".weight", ".bias")
CLIP_LAYER = ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", "self_attn.out_proj",
              "self_attn.qkv_proj")  # fmt: skip
LLAMA_LAYER = ("input_layernorm", "post_attention_layernorm", "mlp.down_proj", "mlp.gate_up_proj",
               "self_attn.o_proj", "self_attn.qkv_proj")  # fmt: skip
# What `init_vllm_registered_model` finds a decoder by, and what the LLaVA class reads.
READ = (
    "image_token_index", "vision_feature_layer", "vision_feature_select_strategy",
    "projector_hidden_act", "multimodal_projector_bias", "text_config", "vision_config",
)  # fmt: skip


def parameters(config: dict[str, Any]) -> set[str]:
    """The parameters of vLLM's LLaVA with a CLIP tower and a Llama decoder."""
    tower, text = config["vision_config"], config["text_config"]
    clip = "vision_tower.vision_model."
    found = {f"{clip}embeddings.class_embedding"}
    found |= {f"{clip}embeddings.{name}_embedding.weight" for name in ("patch", "position")}
    found |= {f"{clip}pre_layrnorm{end}" for end in PAIR}
    layer = config["vision_feature_layer"]  # the tower ends there, and has no norm behind it
    depth = tower["num_hidden_layers"] + layer + 1 if layer < 0 else layer
    for number in range(depth):
        found |= {f"{clip}encoder.layers.{number}.{m}{e}" for m in CLIP_LAYER for e in PAIR}
    found |= {f"multi_modal_projector.linear_{n}{end}" for n in (1, 2) for end in PAIR}
    found |= {"language_model.model.embed_tokens.weight", "language_model.model.norm.weight"}
    found.add("language_model.lm_head.weight")
    for number in range(text["num_hidden_layers"]):
        found |= {f"language_model.model.layers.{number}.{m}.weight" for m in LLAMA_LAYER}
    return found


def mapped(name: str) -> str:
    for old, new in PREFIXES.items():
        if name.startswith(old):
            name = name.replace(old, new, 1)
    return name


def packed(name: str) -> str:
    for whole, parts in PACKED.items():
        for part in parts:
            name = name.replace(f".{part}.", f".{whole}.")
    return name


def names_in(folder: Path, pattern: str = "model*.safetensors") -> set[str]:
    found: set[str] = set()
    for path in folder.glob(pattern):
        with safe_open(path, "pt") as file:  # pyright: ignore[reportUnknownVariableType]
            found |= set(file.keys())
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("vllm"))


@pytest.mark.parametrize("lora", ["", LORA], ids=["whole", "merged"])
def test_every_weight_of_an_export_is_one_of_vllms_and_none_is_missing(
    runs: Runs, lora: str
) -> None:
    export = runs.export(runs.train("merged" if lora else "whole", lora=lora), "hf")
    config: dict[str, Any] = json.loads((export / "config.json").read_text())
    names = names_in(export)
    known = parameters(config)
    skipped = {name for name in names if ".post_layernorm." in name}  # CLIP's, which LLaVA's lacks
    assert {packed(mapped(name)) for name in names - skipped} == known
    for whole, parts in PACKED.items():  # each packed parameter gets all its parts
        for name in (name for name in known if f".{whole}." in name):
            of = {name.replace(f".{whole}.", f".{part}.") for part in parts}
            assert of <= {mapped(one) for one in names}


def test_the_config_says_what_vllm_reads(runs: Runs) -> None:
    export = runs.folder / "whole-hf"
    if not export.exists():
        runs.export(runs.train("whole"), "hf")
    config: dict[str, Any] = json.loads((export / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config.keys() >= {*READ}
    assert config["text_config"]["architectures"] == ["LlamaForCausalLM"]
    assert config["vision_config"]["model_type"] == "clip_vision_model"
    assert config["vision_feature_select_strategy"] in ("default", "full")


def test_adapters_fit_the_language_model_alone(runs: Runs) -> None:
    """vLLM's LLaVA takes no adapters at that commit; its Llama does, by these names."""
    run = runs.folder / "merged"
    export = runs.export(run if run.exists() else runs.train("merged", lora=LORA), "peft")
    modules = {
        f"model.layers.{number}.{block}"
        for number in range(2)
        for block in ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "self_attn.k_proj",
                      "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj")
    }  # fmt: skip
    expected = {f"base_model.model.{m}.lora_{side}.weight" for m in modules for side in "AB"}
    assert names_in(export, "adapter_model.safetensors") == expected
    settings = json.loads((export / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert settings["bias"] == "none"  # vLLM's PEFTHelper refuses another
    assert {"r", "lora_alpha", "target_modules"} <= settings.keys()
