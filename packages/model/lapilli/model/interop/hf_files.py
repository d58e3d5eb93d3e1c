"""Write the settings beside an export's weights for several versions of transformers.

transformers 4 and 5 name a few things otherwise: the rope's base, the dtype, the image processor's
file. Each is written under both names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lapilli.model.errors import ModelError
from lapilli.model.parts.weight_files import read_object
from lapilli.model.vlm import VisionLanguageModel

__all__ = ["base_end_ids", "config_text", "generation_text", "oldest_reader"]

# Decoders that came after transformers 4.49, by the version that is tested with them.
_SINCE = {
    "4.57": (
        "apertus arcee bitnet blt deepseek_v2 deepseek_v3 doge dots1 ernie4_5 ernie4_5_moe exaone4 "
        "falcon_h1 flex_olmo gemma3 gemma3_text gemma3n gemma3n_text glm4 glm4_moe gpt_oss "
        "granitemoehybrid hunyuan_v1_dense hunyuan_v1_moe lfm2 llama4 llama4_text longcat_flash "
        "minimax ministral olmo3 phi4_multimodal qwen3 qwen3_moe qwen3_next seed_oss smollm3 "
        "vaultgemma xlstm"
    ),
    "5.0": (
        "afmoe cwm glm4_moe_lite jais2 lfm2_moe minimax_m2 ministral3 nanochat solar_open"
    ),
}  # fmt: skip
# What transformers 4.49 has of the decoders that this project was tried with; of any other the
# installed version is named.
_ALWAYS = (
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "phi", "phi3", "gemma", "gpt2", "gpt_neo",
    "gpt_neox", "gptj", "opt", "bloom", "falcon", "mpt", "stablelm", "starcoder2", "olmo", "olmo2",
    "codegen", "persimmon", "granite", "cohere", "gemma2",
)  # fmt: skip


def oldest_reader(model: VisionLanguageModel) -> str:
    """The oldest transformers that has this language model, of those that exports are tested with.

    The tower and LLaVA itself are in all of them.
    """
    kind = str(model.language.config.model_type)
    if kind in _ALWAYS:
        return "4.49"
    for version, names in _SINCE.items():
        if kind in names.split():
            return version
    import transformers

    return transformers.__version__


def config_text(config: Any, dtype: str) -> str:
    """`config.json` of a `LlavaConfig`, whole: what one version leaves out another one defaults."""
    values: dict[str, Any] = config.to_dict()
    values |= {"dtype": dtype, "torch_dtype": dtype, "image_token_id": values["image_token_index"]}
    for part in ("text_config", "vision_config"):
        values[part] |= {"dtype": dtype, "torch_dtype": dtype}
        values[part] = {**_rope_of_4(values[part].get("rope_parameters")), **values[part]}
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _rope_of_4(rope: object) -> dict[str, Any]:
    """Transformers 5's `rope_parameters` under the names of transformers 4.

    Gemma 3 has them by the layer's kind.
    """
    if not isinstance(rope, Mapping):
        return {}
    given: dict[str, Any] = {str(key): value for key, value in rope.items()}  # pyright: ignore
    if "full_attention" in given:
        local = {"rope_local_base_freq": (given.get("sliding_attention") or {}).get("rope_theta")}
        return {**_rope_of_4(given["full_attention"]), **local}
    named = {key: given[key] for key in ("rope_theta", "partial_rotary_factor") if key in given}
    rest = {key: value for key, value in given.items() if key not in named}
    return named | ({"rope_scaling": rest} if rest.get("rope_type", "default") != "default" else {})


def generation_text(ends: Sequence[int], pad: int | None, bos: int | None) -> str:
    """`generation_config.json`: which ids end an answer; the weights decide all else."""
    given = {"bos_token_id": bos, "eos_token_id": list(ends) or None, "pad_token_id": pad}
    values = {name: value for name, value in given.items() if value is not None}
    return json.dumps({"do_sample": False, **values}, indent=2) + "\n"


def base_end_ids(model: VisionLanguageModel) -> list[int]:
    """The ids that end a text of the pretrained language model; none of a random one."""
    name = model.config.language.pretrained
    if not name:
        return []
    language: Any = model.language
    found: list[Any] = [
        language.config.eos_token_id, getattr(language.generation_config, "eos_token_id", None),
        _beside(Path(name)),
    ]  # fmt: skip
    ids = [i for one in found for i in (one if isinstance(one, list) else [one])]  # pyright: ignore
    return [i for i in dict.fromkeys(ids) if isinstance(i, int) and 0 <= i < model.vocab_size]


def _beside(folder: Path) -> Any:
    """What a folder's `generation_config.json` says; nothing of one that is gone or on the hub."""
    try:
        return read_object(folder / "generation_config.json").get("eos_token_id")
    except ModelError:
        return None
