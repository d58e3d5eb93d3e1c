"""Exports beside what SGLang's LLaVA loads, and SigLIP's names in vLLM's, frozen from source.

Facts read from `python/sglang/srt/models/llava.py`: LLaVA's classes at sgl-project/sglang 00adcbe5
(Apache-2.0), `LlavaForConditionalGeneration` in a copy of a later state, 1fanwang/sglang 63402cfe.
Those of SigLIP from `models/siglip.py` at vllm-project/vllm 0531c222. Neither program was run.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lapilli.model.interop.llava_config import FEATURES
from tests.pipelines.test_export_runs import Runs
from tests.pipelines.test_vllm_names import mapped, names_in, packed

# `projector_weights` of LlavaBaseForCausalLM.load_weights.
PROJECTOR = {"model.mm_projector.0": "linear_1", "model.mm_projector.2": "linear_2"}
# A checkpoint's names of SGLang's LlamaForCausalLM; q, k and v, gate and up are joined there.
LLAMA = re.compile(
    r"model\.(embed_tokens|norm)\.weight|lm_head\.weight|model\.layers\.\d+\."
    r"((input|post_attention)_layernorm|self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight"
)
ENTRY = ("LlavaLlamaForCausalLM", "LlavaQwenForCausalLM", "LlavaMistralForCausalLM",
         "LlavaForConditionalGeneration")  # fmt: skip
TAKEN = ("patch", "full", "cls_patch")  # `load_weights` raises for another; an image for cls_patch
SIGLIP_LAYER = ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", "self_attn.out_proj",
                "self_attn.qkv_proj")  # fmt: skip
PAIR = (".weight", ".bias")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("sglang"))


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_a_llava_export_is_what_sglang_loads(runs: Runs) -> None:
    export = runs.export(runs.train("whole"), "llava", "--files=safetensors")
    config = config_of(export)
    assert config["architectures"][0] in ENTRY
    assert config["mm_vision_select_feature"] == "patch"
    assert {"mm_vision_tower", "mm_vision_select_layer", "mm_hidden_size"} <= config.keys()
    projector: set[str] = set()
    for name in names_in(export):
        if "projector" in name or "vision_tower" in name or "image_newline" in name:
            start, _, end = name.rpartition(".")
            projector.add(f"{PROJECTOR[start]}.{end}")
        else:
            assert LLAMA.fullmatch(name), name
    assert projector == {f"linear_{n}{end}" for n in (1, 2) for end in PAIR}


def test_which_features_it_takes(runs: Runs) -> None:
    """transformers' word for patches is `default`, which its later class refuses."""
    assert FEATURES == {"default": "patch", "full": "cls_patch"}
    run = runs.folder / "whole"
    export = runs.export(run if run.exists() else runs.train("whole"), "hf")
    config = config_of(export)
    assert config["architectures"][0] in ENTRY
    assert config["vision_feature_select_strategy"] not in TAKEN


def test_siglips_names_are_vllms(runs: Runs) -> None:
    export = runs.export(runs.train("siglip", tower="siglip"), "hf")
    config = config_of(export)
    tower, layer = config["vision_config"], config["vision_feature_layer"]
    root = "vision_tower.vision_model."
    depth = tower["num_hidden_layers"] + layer + 1 if layer < 0 else layer
    known = {f"{root}embeddings.position_embedding.weight"}
    known |= {f"{root}embeddings.patch_embedding{end}" for end in PAIR}
    known |= {
        f"{root}encoder.layers.{n}.{m}{e}" for n in range(depth) for m in SIGLIP_LAYER for e in PAIR
    }
    if depth == tower["num_hidden_layers"]:  # else it leaves the norm out, and skips the weight
        known |= {f"{root}post_layernorm{end}" for end in PAIR}
    found = {packed(mapped(name)) for name in names_in(export)}
    ours = {name for name in found if name.startswith("vision_tower.")}
    assert ours >= known
    heads = {name for name in ours - known if name.startswith(f"{root}head.")}
    assert bool(heads) == tower.get("vision_use_head", True)  # its pooling head, by the same key
    rest = ours - known - heads
    assert all(name.startswith(f"{root}post_layernorm") for name in rest), rest
