"""A start from weights that were trained elsewhere: LLaVA's files or transformers' LLaVA folder."""

from __future__ import annotations

import json
from pathlib import Path

from lapilli.model.errors import ModelError
from lapilli.model.interop.hf import read_hf
from lapilli.model.interop.llava import is_llava, load_llava
from lapilli.model.pretrained import require_missing
from lapilli.model.trainable import base_name, is_adapter
from lapilli.model.vlm import VisionLanguageModel

__all__ = ["load_foreign"]


def load_foreign(path: Path, model: VisionLanguageModel) -> list[str]:
    """Put weights of other projects into a model, below its adapters.

    Args:
        path: What `load_llava` takes, or a folder of transformers' LlavaForConditionalGeneration.
        model: A model of the same parts.

    Returns:
        The parts that were loaded; none where the path is nothing of the kind.

    Raises:
        ModelError: A tensor is missing, unknown, or of another shape.
    """
    if is_llava(path):
        return load_llava(path, model)
    return _load_hf(path, model) if _is_hf(path) else []


def _is_hf(path: Path) -> bool:
    try:
        text = (path / "config.json").read_text(encoding="utf-8")
        return json.loads(text).get("model_type") == "llava"
    except OSError as error:
        require_missing(path / "config.json", error)
        return False
    except (ValueError, AttributeError):
        return False


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
    model.load_state_dict({names[name]: value for name, value in found.items()}, strict=False)
    return ["projector", "language", "vision"]
