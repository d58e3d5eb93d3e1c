"""Read and write Basic-VLM's folders: adapters on a Qwen-1's own layers, and the projector.

`adapter_model.bin` and `adapter_config.json` are PEFT's, with the fused `attn.c_attn` (one A, and a
B for queries, keys and values one after another), `mlp.w1` and `mlp.w2`; `other_params.bin` holds
the projector. There is no `config.json`: the base model and the tower are its program's.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lapilli.model.config import LanguageConfig, ModelConfig, VisionConfig
from lapilli.model.errors import ModelError
from lapilli.model.interop.peft import PREFIX, SETTINGS, A, Adapter, B, adapter_of
from lapilli.model.interop.weights import adapted_layers, plain_weights
from lapilli.model.parts.added_rows import added_rows
from lapilli.model.parts.pretrained import local_folder
from lapilli.model.parts.qwen1 import qwen1_layer, qwen1_names
from lapilli.model.parts.weight_files import save_tensors
from lapilli.model.vlm import VisionLanguageModel

__all__ = [
    "OTHER_PARAMS", "TOWER_NAME", "as_qwen1", "basic_vlm_model", "check_basic_vlm", "from_qwen1",
    "is_for_qwen1", "write_basic_vlm",
]  # fmt: skip

OTHER_PARAMS = "other_params.bin"
TOWER_NAME = "google/siglip-so400m-patch14-384"  # of its training script; no file names it
WEIGHTS = "adapter_model.bin"


def is_for_qwen1(adapter: Adapter) -> bool:
    """Whether an adapter is on layers by the names of a Qwen-1."""
    return any(name.startswith("transformer.h.") for name in adapter.tensors)


def from_qwen1(adapter: Adapter) -> Adapter:
    """An adapter on a Qwen-1 by the names of transformers' Qwen2; q, k and v share one A.

    Raises:
        ModelError: A layer that a Qwen-1 does not have, or a B that cannot be cut in three.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in adapter.tensors.items():
        end = next((end for end in (A, B) if name.endswith(end)), "")
        ours = qwen1_layer(name.removesuffix(end)) if end else ()
        if not ours or (end == B and value.shape[0] % len(ours)):
            raise ModelError(
                f"adapter: {name} of shape {tuple(value.shape)}; expected LoRA on the layers of a "
                "Qwen-1 (attn.c_attn, mlp.w1, mlp.w2)"
            )
        parts = value.chunk(len(ours)) if end == B else [value] * len(ours)
        tensors.update({one + end: part for one, part in zip(ours, parts, strict=True)})
    return replace(adapter, tensors=tensors)


def as_qwen1(adapter: Adapter, names: dict[str, str]) -> Adapter:
    """An adapter on transformers' Qwen2 by a Qwen-1's names.

    Args:
        adapter: The adapter.
        names: What each layer is there, as `qwen1_names` has it.

    Raises:
        ModelError: Tensors beside the adapters, or q, k and v without a common A.
    """
    layers = [name.removesuffix(A) for name in adapter.tensors if name.endswith(A)]
    beside = sorted(n for n in adapter.tensors if not n.endswith((A, B)))
    if beside or not {*layers} <= names.keys():
        name = beside[0] if beside else next(one for one in layers if one not in names)
        raise ModelError(f"{name}: no layer of a Qwen-1 with an adapter; export with --to peft")
    tensors: dict[str, Tensor] = {}
    for theirs in dict.fromkeys(names[layer] for layer in layers):
        parts = [f"{one}" for one in qwen1_layer(theirs)]
        first = adapter.tensors.get(parts[0] + A)
        if first is None or any(
            one + A not in adapter.tensors or not torch.equal(adapter.tensors[one + A], first)
            for one in parts
        ):
            raise ModelError(
                "lora.target: q, k and v have adapters of their own and no common A; a Qwen-1's "
                "c_attn is one layer. Train with lora.target c_attn|w1|w2, or export with --to peft"
            )
        tensors[theirs + A] = first
        tensors[theirs + B] = torch.cat([adapter.tensors[one + B] for one in parts])
    kinds = sorted({name.rpartition(".")[2] for name in (names[layer] for layer in layers)})
    return replace(adapter, tensors=tensors, settings={**adapter.settings, "target_modules": kinds})


def check_basic_vlm(model: VisionLanguageModel) -> None:
    """Reject a model that Basic-VLM's files have no place for.

    Raises:
        ModelError: Names the part.
    """
    if not qwen1_names(model.language):
        raise ModelError(
            f"language: {model.language.config.model_type}; Basic-VLM's files are for a Qwen-1 "
            "(Qwen-7B), export with --to peft"
        )
    if model.config.lora is None or not adapted_layers(model.language):
        raise ModelError("lora: the language model has no adapters; export with --to hf")
    if model.config.lora.bias != "none" or added_rows(model.language) is not None:
        raise ModelError(
            "lora: biases or added tokens have learnt, which Basic-VLM's files have no place for; "
            "export with --to peft"
        )
    if "vision" in model.config.trainable:
        raise ModelError("trainable: the tower has learnt; export with --to peft")


def write_basic_vlm(model: VisionLanguageModel, output: Path, *, base: str = "") -> None:
    """Write `adapter_model.bin`, `adapter_config.json` and `other_params.bin`.

    Args:
        model: A model with adapters on a Qwen-1.
        output: The folder.
        base: Name of the language model that the adapters are for.

    Raises:
        ModelError: As `check_basic_vlm` and `as_qwen1`.
    """
    check_basic_vlm(model)
    assert model.config.lora is not None
    adapter = adapter_of(model.language, model.config.lora, base=base, task="CAUSAL_LM")
    theirs = as_qwen1(adapter, qwen1_names(model.language))
    output.mkdir(parents=True, exist_ok=True)
    save_tensors({PREFIX + name: value for name, value in theirs.tensors.items()}, output / WEIGHTS)
    text = json.dumps(dict(theirs.settings), indent=2)
    (output / SETTINGS).write_text(text, encoding="utf-8")
    projector = {n: w.make().cpu().clone() for n, w in plain_weights(model.projector).items()}
    save_tensors(projector, output / OTHER_PARAMS)


def basic_vlm_model(path: Path, tower: Path, base: Path) -> ModelConfig:
    """What a folder is made of, as its program builds it.

    Args:
        path: The folder, whose own `mm_vision_tower/` comes before the published tower.
        tower: The name below `path` of a tower of its own.
        base: Folder of the Qwen-1.

    Raises:
        ModelError: The tower is not on this machine.
    """
    own = path / tower
    found = own if own.is_dir() else local_folder(TOWER_NAME)
    if found is None:
        raise ModelError(
            f"{path}: the tower of Basic-VLM, {TOWER_NAME}, is not on this machine; download it, "
            f"or put its folder there as {tower}"
        )
    return ModelConfig(
        vision=VisionConfig(
            tower="siglip", pretrained=str(found), vision_feature_layer=-1, norm=True, skip=1,
            allow_pickle=True,
        ),
        language=LanguageConfig(pretrained=str(base), allow_pickle=True),
        projector="mlp2x_gelu",
        trainable=("vision", "projector", "language"),
    )  # fmt: skip
