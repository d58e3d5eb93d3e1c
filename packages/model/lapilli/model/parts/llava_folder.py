"""A folder in LLaVA's layout as the base of a model: its decoder's settings and its projector.

Its decoder has the names of the plain architecture, so it is read as any other, shared among
processes where these share it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lapilli.model.errors import ModelError
from lapilli.model.parts.pretrained import local_folder, one_line
from lapilli.model.parts.weight_files import read_object_if_there, read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "CONFIG", "LANGUAGES", "decoder_kind", "decoder_settings", "is_llava_config",
    "llava_decoder", "llava_projector", "read_config",
]  # fmt: skip

CONFIG = "config.json"
LANGUAGES = {
    "llama": "LlavaLlamaForCausalLM",
    "mistral": "LlavaMistralForCausalLM",
    "phi3": "LlavaPhi3ForCausalLM",  # VisPer-LM's
}
OLD_NAMES = {"llava": "llama"}  # `model_type` before LLaVA 1.2
PROJECTOR = re.compile(r"(?:model\.)?mm_projector\.(\d.*|weight|bias)")


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's `config.json`; empty where it has none.

    Raises:
        ModelError: It cannot be read, or is no JSON object.
    """
    return read_object_if_there(folder / CONFIG)


def is_llava_config(config: Mapping[str, Any]) -> bool:
    """Whether a config is LLaVA's own: transformers' `llava` has its parts in `vision_config`."""
    return "mm_vision_tower" in config or "mm_projector_type" in config


def decoder_kind(folder: Path, config: Mapping[str, Any]) -> str:
    """The decoder in a LLaVA folder, as transformers calls it.

    Raises:
        ModelError: It is none that this package has.
    """
    kind = str(config.get("model_type")).removeprefix("llava_").removeprefix("ola_")  # VisPer-LM
    kind = OLD_NAMES.get(kind, kind)
    if kind not in LANGUAGES:
        raise ModelError(
            f"{folder / CONFIG}: model_type {config.get('model_type')}; expected "
            f"{' or '.join(f'llava_{name}' for name in LANGUAGES)}"
        )
    return kind


def decoder_settings(folder: Path, kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the decoder alone, as transformers has them now.

    Raises:
        ModelError: No decoder can be built of them.
    """
    from transformers import AutoConfig

    defaults: dict[str, Any] = AutoConfig.for_model(kind).to_dict()
    left_out = {"model_type", "architectures", "dtype", "transformers_version", "_name_or_path"}
    settings = {n: v for n, v in config.items() if n in defaults and n not in left_out}
    with one_line(f"{folder / CONFIG}: no {kind} has its rope_theta and rope_scaling"):
        scaling: dict[str, Any] = dict(config.get("rope_scaling") or {})
        if "rope_parameters" not in settings and ("rope_theta" in config or scaling):
            given = scaling.pop("type", None) or scaling.pop("rope_type", None) or "default"
            theta = float(config.get("rope_theta") or 10000.0)
            settings["rope_parameters"] = {"rope_theta": theta, "rope_type": given, **scaling}
    settings.pop("rope_scaling", None)
    with one_line(f"{folder / CONFIG}: no {kind} can be built of it"):
        AutoConfig.for_model(kind, **settings)
    return settings


def llava_decoder(name: str) -> PreTrainedConfig | None:
    """The config of the decoder in a LLaVA folder; None where the name is of no such.

    Args:
        name: A folder, or a hub's name whose folder is on this machine.

    Raises:
        ModelError: LLaVA's, with a decoder that this package does not have.
    """
    folder = _folder(name)
    if folder is None:
        return None
    from transformers import AutoConfig

    config = read_config(folder)
    kind = decoder_kind(folder, config)
    return AutoConfig.for_model(kind, **decoder_settings(folder, kind, config))


def llava_projector(name: str) -> dict[str, Tensor]:
    """The projector of a LLaVA folder, `0.weight` and so on; empty where the name is of no such.

    Raises:
        ModelError: Its weights cannot be read, or have no projector.
    """
    folder = _folder(name)
    if folder is None:
        return {}
    tensors = read_tensors(folder, lambda one: PROJECTOR.fullmatch(one) is not None)
    found = {m[1]: value for one, value in tensors.items() if (m := PROJECTOR.fullmatch(one))}
    if not found:
        raise ModelError(
            f"{folder}: no weights of the projector; expected a whole model of LLaVA's, with "
            "model.mm_projector.* in its weights"
        )
    return found


def _folder(name: str) -> Path | None:
    folder = local_folder(name) if name else None
    if folder is None:
        return None
    try:
        return folder if is_llava_config(read_config(folder)) else None
    except ModelError as error:
        raise ModelError(f"language.pretrained: {error}") from None
