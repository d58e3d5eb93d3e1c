"""Read models trained elsewhere: LLaVA's files, transformers' LLaVA, adapters for both."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lapilli.model.config import LanguageConfig, ModelConfig, VisionConfig
from lapilli.model.errors import ModelError
from lapilli.model.interop.basic_vlm import basic_vlm_model, is_for_qwen1
from lapilli.model.interop.hf import read_facts, read_hf
from lapilli.model.interop.llava import (
    BESIDE_ADAPTER,
    is_llava,
    load_llava,
    projector_state,
)
from lapilli.model.interop.llava_config import (
    CONFIG,
    TOWER_FOLDER,
    is_llava_config,
    llava_model,
    read_config,
)
from lapilli.model.interop.peft import SETTINGS, Adapter, merge_adapter, read_adapter
from lapilli.model.parts.language import grow_vocabulary
from lapilli.model.parts.pretrained import local_folder, one_line
from lapilli.model.parts.quantized import Quantization, check_quantization, round_linear_layers
from lapilli.model.parts.qwen1 import refuse_minicpm
from lapilli.model.parts.trainable import base_name, is_adapter
from lapilli.model.parts.vision import FAMILIES
from lapilli.model.parts.weight_files import PROJECTOR, check_weights, read_tensors
from lapilli.model.vlm import AUX_PARTS, DTYPES, VisionLanguageModel, build_model

__all__ = [
    "BASE_FOLDER", "MODEL", "QUANTIZED", "Kind", "base_folder", "has_language", "kind_of",
    "load_foreign", "read_foreign",
]  # fmt: skip

BASE_FOLDER = "base"
"""In an export of adapters: the model below them, where it lies nowhere else."""

Kind = Literal["hf", "llava", "adapter", "file"]
HF_TYPE = "llava"
MODEL, QUANTIZED = "model", "quantized"
"""Keys of an export's own facts: what it is made of, and what its base was rounded to, as type,
kind and whether twice; the type alone for nf4 that is."""

# Where transformers' LLaVA has its parts, from 4.52 on and before; the longer names first.
_HF_PLACES = (
    ("model.multi_modal_projector.linear_1", "projector.0"),
    ("model.multi_modal_projector.linear_2", "projector.2"),
    ("multi_modal_projector.linear_1", "projector.0"),
    ("multi_modal_projector.linear_2", "projector.2"),
    ("model.vision_tower.vision_model.", "vision."),
    ("model.vision_tower.", "vision."),
    ("vision_tower.vision_model.", "vision."),
    ("vision_tower.", "vision."),
    ("language_model.lm_head", "language.lm_head"),
    ("language_model.model.", "language."),
    ("model.language_model.", "language."),
    ("lm_head", "language.lm_head"),
)


def kind_of(path: Path) -> Kind | None:
    """What a path is: a folder of transformers' LLaVA or of LLaVA's, one with an adapter, a file.

    None for anything else.

    Raises:
        ModelError: Its `config.json` cannot be read.
    """
    if path.is_file():
        return "file" if is_llava(path) else None
    if (path / SETTINGS).is_file():
        return "adapter"
    if is_llava(path):
        return "llava"
    return "hf" if read_config(path).get("model_type") == HF_TYPE else None


def load_foreign(path: Path, model: VisionLanguageModel) -> list[str]:
    """Load weights of other projects into a model, below its adapters.

    Args:
        path: What `load_llava` takes, a folder of transformers' LlavaForConditionalGeneration, or
            one with an adapter for such a model, which is put on its base first.
        model: A model of the same parts.

    Returns:
        The parts that were loaded; empty if the path is not such a file or folder.

    Raises:
        ModelError: A tensor is missing, unknown, or of another shape; a base model is not here.
    """
    kind = kind_of(path)
    if kind == "hf":
        return _load_hf(path, model)
    if kind == "adapter" and not _is_llavas(path):
        adapter = read_adapter(path)
        if _is_for_hf(adapter):
            base = base_folder(path, adapter.base)
            loaded = _load_hf(base, model)
            merge_adapter(_for_ours(_without_image_row(adapter, base), model), model)
            return loaded
    return load_llava(path, model) if kind else []


def has_language(path: Path) -> bool:
    """Whether `load_foreign` changes the language model, and not the projector alone."""
    if kind_of(path) != "file" and not (path / PROJECTOR).is_file():
        return True
    tensors = read_tensors(path)
    return len(projector_state(tensors)) < len(tensors)


def read_foreign(path: Path) -> VisionLanguageModel:
    """The model of a folder, in fp32, adapters merged; every part learns.

    Raises:
        ModelError: No such folder, a part that this package does not have, or a base model or a
            tower that is not on this machine.
    """
    from transformers.initialization import no_init_weights

    kind = kind_of(path)
    if kind == "adapter":
        return _read_adapted(path).eval()
    if kind == "hf":
        return read_hf(path)
    if kind == "llava" and is_llava_config(read_config(path)):
        check_weights(path)  # before a tower is read
        config = llava_model(path, read_config(path))
        try:
            with no_init_weights():  # all of them are read
                model = build_model(config)
        except ModelError as error:  # names settings, which here are the folder's
            raise ModelError(f"{path / CONFIG}: {error}") from None
        _check_whole(path, model, load_llava(path, model))
        return model.eval()
    raise _no_model(path)


def _check_whole(path: Path, model: VisionLanguageModel, loaded: Collection[str]) -> None:
    """Refuse a folder of which a part would stay random: a tower is never among them."""
    aux = [part for part in AUX_PARTS if part in dict(model.named_children())]
    for part in ("projector", "language", *aux):
        if part not in loaded and any(True for _ in model.get_submodule(part).parameters()):
            raise ModelError(
                f"{path}: no weights of the {part}; expected a whole model, of one's parts start a "
                "run with init_from"
            )


def _no_model(path: Path) -> ModelError:
    config = read_config(path) if path.is_dir() else {}
    refuse_minicpm(path, config)
    found = config.get("model_type")
    what = f"a {found}" if found else "no model"
    return ModelError(
        f"{path}: {what}; expected a run, an export, LLaVA's or transformers' LLaVA (model_type "
        "llava_llama, llava_mistral, llava_phi3 or llava), or an adapter for one of them"
    )


def base_folder(path: Path, name: str) -> Path:
    """Where the model lies that an adapter is for.

    Raises:
        ModelError: Not on this machine; names it.
    """
    own = path / BASE_FOLDER
    found = own if own.is_dir() else local_folder(name) if name else None
    if found is None:
        raise ModelError(
            f"{path}: adapter for {name or 'a base model that it does not name'}, which is not on "
            f"this machine; download it and name its folder in base_model_name_or_path of "
            f"{SETTINGS}"
        )
    return found


def _is_llavas(path: Path) -> bool:
    """Whether an adapter's folder has LLaVA's files beside it."""
    beside = any((path / name).is_file() for name in BESIDE_ADAPTER)
    return beside or is_llava_config(read_config(path))


def _read_adapted(path: Path) -> VisionLanguageModel:
    adapter, config, facts = read_adapter(path), read_config(path), read_facts(path)
    if MODEL in facts:
        _check_beside(path)
        model = build_model(_own_model(path, facts[MODEL], adapter))
        if rounded := facts.get(QUANTIZED):
            check_quantization()
            old = [str(rounded), "nf4", True]
            dtype, kind, is_double = old if isinstance(rounded, str) else rounded
            how = Quantization(str(kind), bool(is_double))
            round_linear_layers(model.language, DTYPES[str(dtype)], how)
    elif is_for_qwen1(adapter):
        _check_beside(path)
        base = base_folder(path, adapter.base)
        model = build_model(basic_vlm_model(path, Path(TOWER_FOLDER), base))
    elif _is_llavas(path):
        if not is_llava_config(config):
            raise ModelError(f"{path}: no {CONFIG} of LLaVA's beside the adapter; copy it too")
        base = base_folder(path, adapter.base)
        if is_llava_config(read_config(base)):
            model = read_foreign(base)
            load_llava(path, model)
            return model
        _check_beside(path)
        model = build_model(llava_model(path, config, str(base)))
    elif _is_for_hf(adapter):
        base = base_folder(path, adapter.base)
        model, adapter = read_hf(base), _without_image_row(adapter, base)
        _grow(model, adapter)
        merge_adapter(_for_ours(adapter, model), model)
        return model
    else:
        raise ModelError(
            f"{path}: an adapter of a language model alone; expected one of a LLaVA model, with "
            f"LLaVA's {CONFIG} and non_lora_trainables.bin or transformers' LLaVA as its base"
        )
    _check_whole(path, model, load_llava(path, model))
    return model


def _check_beside(path: Path) -> None:
    """Before any base is read."""
    if not any((path / name).is_file() for name in BESIDE_ADAPTER):
        raise ModelError(
            f"{path}: no weights of the projector; expected {BESIDE_ADAPTER[0]} beside the "
            "adapter, copy it too"
        )


def _own_model(path: Path, given: Mapping[str, Any], adapter: Adapter) -> ModelConfig:
    """What one of our own exports of adapters is made of: parts of this package alone."""
    with one_line(f"{path}: its facts name no model; export the run again"):
        vision, language, projector = given["vision"], given["language"], str(given["projector"])
        known = {field.name for field in fields(VisionConfig)} - {"allow_pickle", "pretrained"}
        own = path / TOWER_FOLDER
        name = str(own) if own.is_dir() else str(vision["pretrained"])
        values: dict[str, Any] = {
            n: tuple(v) if n in ("mean", "std") and v else v for n, v in vision.items()
        }
        tower = VisionConfig(
            **{n: v for n, v in values.items() if n in known}, pretrained=name, allow_pickle=True
        )
        if tower.tower not in FAMILIES or ":" in projector:
            raise ValueError("a part of one's own")
        base = str(base_folder(path, adapter.base))
        decoder = LanguageConfig(
            pretrained=base, allow_pickle=True, vocab_size=int(language["vocab_size"])
        )
        return ModelConfig(
            vision=tower,
            language=decoder,
            projector=projector,
            trainable=("vision", "projector", "language"),
        )


def _is_for_hf(adapter: Adapter) -> bool:
    marks = ("language_model.", "multi_modal_projector.", "vision_tower.")
    return any(mark in name for name in adapter.tensors for mark in marks)


def _tables(adapter: Adapter) -> dict[str, Tensor]:
    """An adapter's own tensors with a row for each token."""
    ends = ("embed_tokens.weight", "lm_head.weight")
    return {name: value for name, value in adapter.tensors.items() if name.endswith(ends)}


def _without_image_row(adapter: Adapter, base: Path) -> Adapter:
    """An adapter on one of our exports, whose image token may have a row that no model has here."""
    rows, there = read_facts(base).get("vocab_size"), read_config(base).get("text_config", {})
    if not isinstance(rows, int):
        return adapter
    cut = {n: v[:rows] for n, v in _tables(adapter).items() if len(v) == there.get("vocab_size")}
    return replace(adapter, tensors={**adapter.tensors, **cut})


def _grow(model: VisionLanguageModel, adapter: Adapter) -> None:
    """Give the language model the rows that an adapter's own tables have more."""
    rows = max((len(value) for value in _tables(adapter).values()), default=0)
    if rows > model.vocab_size:
        grow_vocabulary(model.language, rows)


def _for_ours(adapter: Adapter, model: VisionLanguageModel) -> Adapter:
    """An adapter of transformers' LLaVA by the names of a model here.

    What adapts tower layers behind the taken one is left out: it does not reach the output.
    """
    body, tower = f"language.{model.language.base_model_prefix}.", model.config.vision.tower
    held = {base_name(name) for name in model.state_dict()}

    def rename(name: str) -> str | None:
        for theirs, ours in _HF_PLACES:
            if not name.startswith(theirs):
                continue
            rest = name.removeprefix(theirs)
            if ours == "vision.":
                new = f"vision.{tower}.{rest}"
                return new if new in held or f"{new}.weight" in held else None
            return body + rest if ours == "language." else ours + rest
        return name

    return adapter.renamed(rename)


def _load_hf(path: Path, model: VisionLanguageModel) -> list[str]:
    found = read_hf(path).state_dict()
    held = model.state_dict()
    names = {base_name(name): name for name in held if not is_adapter(name)}
    different = sorted(names.keys() ^ found.keys()) or [
        name for name, value in found.items() if held[names[name]].shape != value.shape
    ]
    if different:
        name = different[0]
        there = tuple(found[name].shape) if name in found else "none"
        here = tuple(held[names[name]].shape) if name in names else "none"
        raise ModelError(
            f"{path}: {name} of shape {there}, the model's {here}; expected the same model config"
        )
    with torch.no_grad():
        model.load_state_dict({names[name]: value for name, value in found.items()}, strict=False)
    return ["projector", "language", "vision"]
