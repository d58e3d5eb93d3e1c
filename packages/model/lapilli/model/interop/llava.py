"""LLaVA's own files: the projector, what LoRA left over, and whole checkpoints.

Everything is read with `weights_only=True`: a pickle that would run code is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lapilli.model.errors import ModelError
from lapilli.model.vlm import VisionLanguageModel

__all__ = ["load_llava", "projector_state", "read_tensors", "write_llava", "write_projector"]

PROJECTOR = "mm_projector.bin"
TOWER = "vision_tower.vision_tower."
# every trainer wraps the model once more: PEFT, LLaVA, and DeepSpeed's gathered saves
_WRAPPERS = ("base_model.model.", "module.", "model.")


def projector_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The projector's tensors of any of LLaVA's files, under our names.

    `model.mm_projector.0.weight` (LLaVA), `base_model.model.model.mm_projector.0.weight` (its LoRA
    runs) and `projector.0.weight` (Basic-VLM's `other_params.bin`) become `0.weight`. Empty where
    there is none.
    """
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        bare = _unwrap(name)
        for prefix in ("mm_projector.", "projector."):
            if bare.startswith(prefix):
                found[bare.removeprefix(prefix)] = value
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one `.bin`/`.pt` or `.safetensors` file, or of a folder of shards.

    Raises:
        ModelError: Not there, no weights in it, cut short, or a pickle with more than tensors.
    """
    tensors: dict[str, Tensor] = {}
    for file in _files(path):
        tensors.update(_read_file(file))
    return tensors


def load_llava(path: Path, model: VisionLanguageModel) -> list[str]:
    """Put LLaVA's weights into a model: a projector file, or a checkpoint's folder.

    Args:
        path: `mm_projector.bin`, `non_lora_trainables.bin`, `other_params.bin`, or a folder in the
            layout of `llava-v1.5-7b`.
        model: A model of the same parts. A folder without a tower leaves the tower as it is:
            LLaVA takes it from its own hub name.

    Returns:
        The parts that were loaded: `projector`, `language`, `vision`.

    Raises:
        ModelError: A tensor is missing, unknown, or of another shape.
    """
    tensors = read_tensors(path)
    parts = {"projector": projector_state(tensors)}
    parts["language"], parts["vision"] = {}, {}
    for name, value in tensors.items():
        if TOWER in name:
            bare = name.partition(TOWER)[2].removeprefix("vision_model.")
            parts["vision"][f"clip.{bare}"] = value
        elif "projector." not in name and (path.is_dir() or _is_language(name)):
            parts["language"][name] = value
    loaded = [part for part, found in parts.items() if found]
    if not loaded:
        raise ModelError(f"{path}: no projector in it; expected LLaVA's mm_projector tensors")
    for part in loaded:
        _load_part(path, part, getattr(model, part), parts[part])
    return loaded


def write_projector(model: VisionLanguageModel, output: Path) -> Path:
    """Write `mm_projector.bin` with LLaVA's names; `--pretrain_mm_mlp_adapter` takes it."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / PROJECTOR
    torch.save(_llava_projector(model), path)
    return path


def write_llava(
    model: VisionLanguageModel,
    output: Path,
    *,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "5GB",
    vision_tower: str = "",
    aspect: Literal["pad", "square"] = "pad",
) -> None:
    """Write a checkpoint in the layout of `llava-v1.5-7b`: safetensors and LLaVA's config.

    Args:
        model: The model.
        output: Folder to write.
        dtype: Of the written weights.
        shard_size: Most bytes in one file.
        aspect: LLaVA's `image_aspect_ratio`: how it makes images square.
        vision_tower: What LLaVA's `mm_vision_tower` shall name; empty for the model's own.

    Raises:
        ModelError: A part that LLaVA does not have.
    """
    from huggingface_hub import save_torch_state_dict

    ours: Any = model
    if not hasattr(ours.vision, "clip"):
        raise ModelError(f"vision.tower: {model.config.vision.tower}; LLaVA has CLIP towers only")
    state = dict(model.language.state_dict())
    if getattr(model.language.config, "tie_word_embeddings", False):
        state.pop("lm_head.weight", None)
    state |= _llava_projector(model)
    for name, value in ours.vision.clip.state_dict().items():
        state[f"model.{TOWER}vision_model.{name}"] = value
    output.mkdir(parents=True, exist_ok=True)
    cast = {n: v.detach().to(dtype).contiguous() for n, v in state.items()}
    save_torch_state_dict(cast, output, max_shard_size=shard_size)
    text = json.dumps(_llava_config(model, dtype, vision_tower, aspect), indent=2)
    (output / "config.json").write_text(text, encoding="utf-8")


def _llava_config(
    model: VisionLanguageModel, dtype: torch.dtype, vision_tower: str, aspect: str
) -> dict[str, Any]:
    config: dict[str, Any] = model.language.config.to_dict()
    kind = str(config["model_type"])
    return config | {
        "model_type": f"llava_{kind}",
        "architectures": [f"Llava{kind.capitalize()}ForCausalLM"],
        "mm_projector_type": model.config.projector,
        "mm_hidden_size": model.vision.hidden_size,
        "mm_vision_tower": vision_tower or model.config.vision.pretrained,
        "mm_vision_select_layer": model.config.vision.layer,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": aspect,
        "use_mm_proj": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _llava_projector(model: VisionLanguageModel) -> dict[str, Tensor]:
    state = model.projector.state_dict()
    return {f"model.mm_projector.{n}": v.detach().cpu().clone() for n, v in state.items()}


def _load_part(path: Path, part: str, module: Any, found: dict[str, Tensor]) -> None:
    expected: dict[str, Tensor] = module.state_dict()
    if part == "vision":  # ours has no layer behind the taken one, and no norm there
        found = {name: value for name, value in found.items() if name in expected}
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
    module.load_state_dict(found)


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


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    found = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    found = found or sorted(path.glob(PROJECTOR))
    if not found:
        raise ModelError(f"{path}: no weights; expected *.safetensors, *.bin or a file of weights")
    yield from found


def _read_file(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found: object = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read ({_first_line(error)})") from None
    except Exception as error:  # pickle.UnpicklingError and whatever a hostile pickle raises
        raise ModelError(
            f"{file}: holds more than tensors, and is not run ({_first_line(error)}); convert it "
            "to safetensors where it comes from"
        ) from None
    if not isinstance(found, dict):
        raise ModelError(f"{file}: a {type(found).__name__}; expected tensors by name")
    return {str(n): v for n, v in found.items() if isinstance(v, Tensor)}  # pyright: ignore


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
