"""Read and write LLaVA's files: projector, non-LoRA weights, whole checkpoints."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lapilli.model.errors import ModelError
from lapilli.model.interop.basic_vlm import OTHER_PARAMS, from_qwen1, is_for_qwen1
from lapilli.model.interop.llava_config import (
    CONFIG,
    TOWER_FOLDER,
    LlavaSettings,
    check_llava,
    is_llava_config,
    llava_config,
    read_config,
)
from lapilli.model.interop.llava_tower import TowerImages, write_tower
from lapilli.model.interop.peft import PREFIX, SETTINGS, merge_adapter, read_adapter
from lapilli.model.interop.visper import aux_parts, visper_weights
from lapilli.model.interop.weights import Progress, plain_weights, write_weights
from lapilli.model.parts.added_rows import added_rows, source_rows, table_names
from lapilli.model.parts.trainable import base_name, is_adapter
from lapilli.model.parts.vision import ConvNextTower
from lapilli.model.parts.weight_files import PROJECTOR, read_tensors, save_tensors
from lapilli.model.vlm import AUX_PARTS, VisionLanguageModel

__all__ = [
    "BESIDE_ADAPTER", "LEFT_OVER", "TOWER", "VISION_FOLDER", "LlavaForm", "is_llava", "load_llava",
    "projector_state", "write_llava", "write_llava_config", "write_projector",
]  # fmt: skip

LEFT_OVER = "non_lora_trainables.bin"
VISION_FOLDER = "vision_tower"  # a tower's adapter, which LLaVA's layout has no place for
BESIDE_ADAPTER = (LEFT_OVER, OTHER_PARAMS)
TOWER = "vision_tower.vision_tower."
EMBEDDING = "model.embed_tokens.weight"
# every trainer wraps the model once more: PEFT, LLaVA, and DeepSpeed's gathered saves
_WRAPPERS = ("base_model.model.", "module.", "model.")


def projector_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The projector's tensors of any of LLaVA's files, under our names.

    `model.mm_projector.0.weight` (LLaVA) and `base_model.model.model.mm_projector.0.weight` (its
    LoRA runs) become `0.weight`, which is what Basic-VLM's `other_params.bin` has. Empty where
    there is none.
    """
    if tensors and all(re.fullmatch(r"\d+\.(weight|bias)", name) for name in tensors):
        return dict(tensors)
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        bare = _unwrap(name)
        for prefix in ("mm_projector.", "projector."):
            if bare.startswith(prefix):
                found[bare.removeprefix(prefix)] = value
    return found


def is_llava(path: Path) -> bool:
    """Whether a folder or file is LLaVA's: a checkpoint, a LoRA run's output, a projector."""
    if path.is_file():
        return path.suffix in (".bin", ".safetensors")
    if any((path / name).is_file() for name in (PROJECTOR, *BESIDE_ADAPTER, SETTINGS)):
        return True
    return is_llava_config(read_config(path))


def load_llava(path: Path, model: VisionLanguageModel) -> list[str]:
    """Load LLaVA's weights into a model: a projector file, a checkpoint's or a LoRA run's folder.

    Weights go into the layers below a model's own adapters, which stay as they are.

    Args:
        path: `mm_projector.bin`, `non_lora_trainables.bin`, `other_params.bin`, a folder in the
            layout of `llava-v1.5-7b`, or one with an adapter, which is merged into the language
            model there is.
        model: A model of the same parts. A folder without a tower leaves the tower as it is:
            LLaVA takes it from what its config names.

    Returns:
        The parts that were loaded: `projector`, `language`, `vision`, and VisPer-LM's
        `task_tokens` and `predictors`.

    Raises:
        ModelError: A tensor is missing, unknown, or of another shape.
    """
    if (path / SETTINGS).is_file():
        adapter = read_adapter(path)
        beside = next((path / n for n in BESIDE_ADAPTER if (path / n).is_file()), None)
        loaded = load_llava(beside, model) if beside and _holds_any(beside) else []
        merge_adapter(from_qwen1(adapter) if is_for_qwen1(adapter) else adapter, model.language)
        return _in_order([*loaded, "language", *_load_towers(path, model)])
    tensors = read_tensors(path)
    parts = aux_parts(path, tensors, model)
    parts["projector"] = projector_state(tensors)
    parts["language"], parts["vision"] = {}, {}
    tower = model.config.vision.tower
    for name, value in tensors.items():
        plain = name.removeprefix("module.").removeprefix(PREFIX)
        if TOWER in name:
            bare = name.partition(TOWER)[2].removeprefix("vision_model.")
            parts["vision"][f"{tower}.{bare}"] = value
        elif "projector." not in name and (path.is_dir() or _is_language(plain)):
            parts["language"][plain] = value
    if path.is_file() and {*parts["language"]} == {EMBEDDING}:
        _take_added_rows(path, model, parts["language"].pop(EMBEDDING))
    loaded = [part for part, found in parts.items() if found]
    if not loaded:
        raise ModelError(f"{path}: no projector in it; expected LLaVA's mm_projector tensors")
    for part in loaded:
        _load_part(path, part, getattr(model, part), parts[part])
    return _in_order([*loaded, *_load_towers(path, model)])


def _in_order(parts: Collection[str]) -> list[str]:
    return [part for part in ("projector", "language", "vision", *AUX_PARTS) if part in parts]


def _holds_any(file: Path) -> bool:
    """Whether there are tensors in what was left over: nothing is, where adapters alone learnt."""
    return bool(read_tensors(file))


def _load_towers(path: Path, model: VisionLanguageModel) -> list[str]:
    """The tower beside an export's weights: whole, or an adapter for transformers' tower."""
    whole, adapter = path / TOWER_FOLDER, path / VISION_FOLDER
    vision: Any = model.vision
    if whole.is_dir():
        tower = model.config.vision.tower
        found = read_tensors(whole).items()
        named = {f"{tower}.{name.removeprefix('vision_model.')}": value for name, value in found}
        _load_part(whole, "vision", vision, named)
    elif (adapter / SETTINGS).is_file():
        merge_adapter(read_adapter(adapter), vision.encoder)
    else:
        return []
    return ["vision"]


def write_projector(model: VisionLanguageModel, output: Path) -> Path:
    """Write `mm_projector.bin` with LLaVA's names; `--pretrain_mm_mlp_adapter` takes it."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / PROJECTOR
    save_tensors(_llava_projector(model), path)
    return path


@dataclass(frozen=True)
class LlavaForm:
    """How a checkpoint in LLaVA's layout is written.

    Attributes:
        images: How images become the tower's input.
        place: Where the folder will lie: LLaVA finds a trained tower by its whole path alone.
        dtype: Of the weights.
        shard_size: Most bytes in one file.
        files: `safetensors`, or `bin` as `llava-v1.5-7b` itself has them.
        tower: What LLaVA shall load as the tower; empty to write the model's (`published_tower`).
    """

    images: TowerImages
    place: Path
    dtype: torch.dtype = torch.float32
    shard_size: str = "5GB"
    files: Literal["safetensors", "bin"] = "safetensors"
    tower: str = ""


def write_llava(
    model: VisionLanguageModel,
    output: Path,
    form: LlavaForm,
    on_progress: Progress = lambda done, total: None,
) -> None:
    """Write a checkpoint in the layout of `llava-v1.5-7b`, adapters merged, with LLaVA's config.

    Task tokens and predictors are written as VisPer-LM has them.

    Args:
        model: The model.
        output: Folder to write.
        form: How.
        on_progress: Called after each file of weights.

    Raises:
        ModelError: A part that LLaVA does not have.
    """
    check_llava(model)
    state = plain_weights(model.language)
    if getattr(model.language.config, "tie_word_embeddings", False):
        state.pop("lm_head.weight", None)
    for name, value in plain_weights(model.projector).items():
        state[f"model.mm_projector.{name}"] = value
    state |= visper_weights(model)
    if isinstance(model.vision, ConvNextTower):  # whose weights VisPer-LM takes from here
        for name, value in plain_weights(model.vision.clip_convnext).items():
            state[f"model.{TOWER}{name}"] = value
    output.mkdir(parents=True, exist_ok=True)
    write_weights(
        state, output, form.dtype, shard_size=form.shard_size, form=form.files,
        on_progress=on_progress,
    )  # fmt: skip
    write_llava_config(model, output, form)


def write_llava_config(model: VisionLanguageModel, output: Path, form: LlavaForm) -> None:
    """Write the `config.json` that LLaVA builds its model of, and the tower where it is a new one.

    Raises:
        ModelError: A part that LLaVA does not have.
    """
    layer, tower = model.config.vision.vision_feature_layer, form.tower
    if not tower:
        write_tower(model, output, form.images, form.dtype)
        layer, tower = -1, str((form.place / TOWER_FOLDER).absolute())
    settings = LlavaSettings(
        tower, layer, "pad" if form.images.aspect == "pad" else "square",
        str(form.dtype).removeprefix("torch."),
    )  # fmt: skip
    text = json.dumps(llava_config(model, settings), indent=2)
    (output / CONFIG).write_text(text, encoding="utf-8")


def _llava_projector(model: VisionLanguageModel) -> dict[str, Tensor]:
    """With the embedding where added rows learnt: `initialize_vision_tokenizer` takes its last."""
    state = plain_weights(model.projector)
    found = {f"model.mm_projector.{n}": v.make().cpu().clone() for n, v in state.items()}
    if added_rows(model.language) is not None:
        names = table_names(model.language).items()
        table = next(name for name, kind in names if kind == "embedding")
        found[EMBEDDING] = plain_weights(model.language)[table].make().cpu().clone()
    return found


def _take_added_rows(path: Path, model: VisionLanguageModel, table: Tensor) -> None:
    """Put the last rows of a file's embedding, or its rows where it holds no others, into ours."""
    first, rows = source_rows(model.language), model.vocab_size
    held: Tensor = model.language.get_input_embeddings().weight
    if rows == first or len(table) not in (rows, rows - first) or table.shape[1:] != held.shape[1:]:
        raise ModelError(
            f"{path}: {EMBEDDING} of shape {tuple(table.shape)}, the model's has {rows} rows, "
            f"{rows - first} of them added; set language.vocab_size to the length of the tokenizer "
            "that it was trained with"
        )
    with torch.no_grad():
        held[first:] = table[first - rows :].to(held.dtype)


def _load_part(path: Path, part: str, module: Any, found: dict[str, Tensor]) -> None:
    held: dict[str, Tensor] = module.state_dict()
    names = {base_name(name): name for name in held if not is_adapter(name)}
    expected = {plain: held[name] for plain, name in names.items()}
    if part == "vision":  # ours has no layer behind the taken one, and no norm there
        found = {name: value for name, value in found.items() if name in expected}
    # transformers before 4.32 wrote what it computes of the config
    found = {name: v for name, v in found.items() if not name.endswith("rotary_emb.inv_freq")}
    tied = getattr(getattr(module, "config", None), "tie_word_embeddings", False)
    if part == "language" and tied and "lm_head.weight" not in found:
        found = {**found, "lm_head.weight": found.get("model.embed_tokens.weight", Tensor())}
    different = sorted(expected.keys() ^ found.keys()) or [
        name for name, value in expected.items() if value.shape != found[name].shape
    ]
    if different:
        name = different[0]
        raise ModelError(
            f"{path}: {part} {name} {_shape(found, name)}, the model's {_shape(expected, name)}; "
            "expected the same model config"
        )
    module.load_state_dict({names[plain]: value for plain, value in found.items()}, strict=False)


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    return f"has shape {tuple(tensors[name].shape)}" if name in tensors else "is missing"


def _is_language(name: str) -> bool:
    return name.startswith(("model.layers.", "model.embed_tokens.", "lm_head."))


def _unwrap(name: str) -> str:
    while True:
        shorter = name
        for wrapper in _WRAPPERS:
            shorter = shorter.removeprefix(wrapper)
        if shorter == name:
            return name
        name = shorter
