"""Write and read transformers' `LlavaForConditionalGeneration` folders.

Weights keep their bits in both directions. The tower is written as it is held here, without the
layers behind the taken one, so its `vision_feature_layer` is -1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from lapilli.model.config import LanguageConfig, ModelConfig, VisionConfig
from lapilli.model.errors import ModelError
from lapilli.model.interop.hf_files import base_end_ids, config_text, generation_text
from lapilli.model.interop.weights import Progress, Weight, plain_weights, write_weights
from lapilli.model.parts.language import logit_scale, logit_softcap
from lapilli.model.parts.pretrained import check_readable, one_line, without_report
from lapilli.model.parts.vision import FAMILIES, skipped_rows
from lapilli.model.parts.weight_files import read_object_if_there
from lapilli.model.vlm import VisionLanguageModel, build_model

__all__ = ["FACTS", "Preprocessing", "read_facts", "read_hf", "write_hf", "write_processor"]

FACTS = "lapilli.json"
"""Beside transformers' files: what they have no place for."""

IMAGE_TOKEN = "<image>"
LAYER = re.compile(r"\.layers?\.\d+\.")
# In rope_parameters since transformers 5; files of 4 have them beside it.
OLDER = {"rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor"}


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of images, as plain values from `lapilli.data`.

    Attributes:
        size: Side of the square images, in pixels.
        aspect: `pad`, `crop` or `stretch`.
        fill: RGB colour of the padding, 0 to 255.
    """

    size: int
    aspect: str
    fill: tuple[int, int, int]


def _normalisation(model: VisionLanguageModel) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the pixels, as the tower takes them off."""
    vision = model.config.vision
    if vision.mean is None or vision.std is None:
        raise ModelError(
            f"vision: tower {vision.tower} has no mean and std of its own; set vision.mean and "
            "vision.std"
        )
    return vision.mean, vision.std


def write_processor(model: VisionLanguageModel, how: Preprocessing, output: Path) -> list[str]:
    """Write the image processor's and the processor's settings, in the files of transformers 4.

    transformers 5 reads them too.

    Returns:
        Differences between transformers and training, one sentence each.

    Raises:
        ModelError: A part that transformers' LLaVA does not have.
    """
    _check_parts(model)
    mean, std = _normalisation(model)
    square = {"height": how.size, "width": how.size}
    images = {
        "image_processor_type": "LlavaImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_pad": how.aspect == "pad",
        "do_resize": True,
        "size": square if how.aspect == "stretch" else {"shortest_edge": how.size},
        "resample": 3,  # bicubic
        "do_center_crop": how.aspect != "stretch",
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
    encoder: Any = model.vision
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "patch_size": int(encoder.encoder.config.patch_size),
        "vision_feature_select_strategy": _strategy(model.config.vision),
        # class tokens, which "default" takes off again
        "num_additional_image_tokens": FAMILIES[model.config.vision.tower].class_tokens,
    }
    named = {"preprocessor_config.json": images, "processor_config.json": processor}
    for name, values in named.items():
        (output / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    padding = tuple(int(255 * value) for value in mean)
    if how.aspect == "pad" and tuple(how.fill) != padding:
        return [
            f"the run's images were padded with {tuple(how.fill)}; transformers' LLaVA pads with "
            f"the tower's mean {padding} alone, so an image that is not square is seen otherwise"
        ]
    return []


def write_hf(
    model: VisionLanguageModel,
    output: Path,
    *,
    image_token_id: int,
    end_ids: Sequence[int] = (),
    pad_id: int | None = None,
    bos_id: int | None = None,
    dtype: torch.dtype = torch.float32,
    facts: Mapping[str, Any] | None = None,
    shard_size: str = "5GB",
    on_progress: Progress = lambda done, total: None,
) -> None:
    """Write config and weights (safetensors, several files above `shard_size`), adapters merged.

    The image token needs a row of the embedding. Where the vocabulary has none left it grows by
    rows that are the mean of the others: their logit is the mean logit, which never is the
    largest.

    Args:
        model: The model.
        output: Folder to write; made if it is not there.
        image_token_id: Marks a feature's place in `input_ids`.
        end_ids: Each ends an answer, and so do those of a pretrained language model.
        pad_id: Fills a batch.
        bos_id: Begins a text.
        dtype: Of the written weights.
        facts: JSON values kept beside, for `read_facts`.
        shard_size: Most bytes in one file, as transformers spells it.
        on_progress: Called after each file of weights.

    Raises:
        ModelError: A part that transformers' LLaVA does not have.
    """
    from transformers import LlavaForConditionalGeneration

    rows = max(model.vocab_size, image_token_id + 1)
    weights = _to_hf(model, rows)
    config = _config(model, rows, image_token_id)
    config.architectures = [LlavaForConditionalGeneration.__name__]
    config.dtype = dtype
    with torch.device("meta"):
        twin: Any = LlavaForConditionalGeneration(config)
    expected = {name: tuple(value.shape) for name, value in twin.state_dict().items()}
    _complete(weights, expected)
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight")
    output.mkdir(parents=True, exist_ok=True)
    ends = [*dict.fromkeys([*end_ids, *base_end_ids(model)])]
    texts = {
        "config.json": config_text(config, str(dtype).removeprefix("torch.")),
        "generation_config.json": generation_text(ends, pad_id, bos_id),
    }
    for name, text in texts.items():
        (output / name).write_text(text, encoding="utf-8")
    named = {_on_disk(name, model.config.vision.tower): value for name, value in weights.items()}
    write_weights(named, output, dtype, shard_size=shard_size, on_progress=on_progress)
    kept = {**(facts or {}), "vocab_size": model.vocab_size}
    (output / FACTS).write_text(json.dumps(kept, indent=1), encoding="utf-8")


def _complete(weights: dict[str, Weight], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Add what does not reach the output and is not held here; refuse what has no place there.

    That is the norm behind the taken layer, and DINOv2's token for masked patches.
    """
    for name in expected.keys() - weights.keys():
        if name.endswith(("layernorm.weight", "layernorm.bias", "embeddings.mask_token")):
            fill = torch.ones if name.endswith("weight") else torch.zeros
            weights[name] = Weight.of(fill(expected[name]))
    bias = weights.get("lm_head.bias")
    if bias and "lm_head.bias" not in expected and not bias.make().any():
        del weights["lm_head.bias"]  # one of zeros adds nothing
    different = sorted(expected.keys() ^ weights.keys()) or [
        name for name, shape in expected.items() if weights[name].shape != shape
    ]
    if different:
        raise ModelError(
            f"language: {different[0]} has no counterpart in transformers' LLaVA; generate from "
            "the run itself"
        )


def _on_disk(name: str, tower: str) -> str:
    """A tensor's name in the layout of the published llava-hf folders."""
    below = "vision_tower." if tower == "dinov2" else "vision_tower.vision_model."
    for ours, theirs in (
        ("model.vision_tower.", below),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(name)


def read_facts(folder: Path) -> dict[str, Any]:
    """What `write_hf` kept beside transformers' files; empty for a folder of others."""
    return read_object_if_there(folder / FACTS)


def read_hf(folder: Path | str) -> VisionLanguageModel:
    """The model of a `LlavaForConditionalGeneration` folder, in fp32; every part learns.

    Raises:
        ModelError: No such folder, or a part that this package does not have.
    """
    from transformers import LlavaForConditionalGeneration

    check_readable(folder)
    with (
        without_report(),
        one_line(
            f"{str(folder)!r} cannot be loaded; expected a folder that transformers' "
            "LlavaForConditionalGeneration wrote"
        ),
    ):
        loaded: Any = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    twin, info = loaded
    _check_loaded(folder, info)
    config = twin.config
    tower = config.vision_config.model_type.removesuffix("_vision_model")
    if tower not in FAMILIES:
        raise ModelError(
            f"{folder}: tower {config.vision_config.model_type}; expected {', '.join(FAMILIES)}"
        )
    if isinstance(config.vision_feature_layer, list):
        raise ModelError(
            f"{folder}: takes layers {config.vision_feature_layer}; expected a single one"
        )
    if config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
        raise ModelError(
            f"{folder}: projector {config.projector_hidden_act}; expected gelu, biased"
        )
    rows = _rows(Path(folder), int(config.text_config.vocab_size))
    model = build_model(_our_config(config, tower, rows, _read_normalisation(Path(folder))))
    # a config may hold keys of other programs; they are kept, and a later export has them again
    for ours, theirs in (
        (model.language.config, config.text_config),
        (cast("Any", model.vision).encoder.config, config.vision_config),
    ):
        for name, value in _unknown(theirs).items():
            setattr(ours, name, value)
    _load(model, twin, rows)
    return model.eval()


def _check_loaded(folder: Path | str, info: Mapping[str, Any]) -> None:
    """Refuse weights of another model than the config's: transformers fills in random ones."""
    wrong = [
        f"{name} is {[*found]} and should be {[*expected]}"
        for name, found, expected in sorted(info["mismatched_keys"])
    ]
    wrong += [f"{name} is missing" for name in sorted(info["missing_keys"])]
    layers = [name for name in sorted(info["unexpected_keys"]) if LAYER.search(name)]
    wrong += [f"{name} has no place" for name in layers]
    if wrong:
        raise ModelError(
            f"{folder}: the weights are not of the model that config.json describes: {wrong[0]} "
            f"({len(wrong)} such tensors); take both from the same model"
        )


def _rows(folder: Path, most: int) -> int:
    """Rows of the vocabulary that are a text's; the image token's and padding come behind."""
    found = read_facts(folder).get("vocab_size", most)
    if type(found) is not int or not 1 <= found <= most:
        raise ModelError(
            f"{folder / FACTS}: vocab_size {found!r:.40}; expected 1 to the model's {most}"
        )
    return found


def _our_config(config: Any, tower: str, rows: int, normalisation: dict[str, Any]) -> ModelConfig:
    text: dict[str, Any] = config.text_config.to_dict()
    kind = str(text.pop("model_type"))
    is_default = config.vision_feature_select_strategy == "default"
    classes = FAMILIES[tower].class_tokens
    whole = not is_default and classes
    return ModelConfig(
        vision=VisionConfig(
            tower=tower,
            settings=_settings(config.vision_config),
            vision_feature_layer=int(config.vision_feature_layer),
            vision_feature_select_strategy="full" if whole else "default",
            skip=1 if is_default and not classes else 0,  # it drops a patch then
            **normalisation,
        ),
        language=replace(
            LanguageConfig(model_type=kind),
            settings={**_settings(config.text_config), "vocab_size": rows},
        ),
        projector="mlp2x_gelu",
        trainable=("vision", "projector", "language"),
    )


def _read_normalisation(folder: Path) -> dict[str, Any]:
    """Mean and deviation of the folder's image processor; nothing where it has none."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        given: dict[str, Any] = ImageProcessingMixin.get_image_processor_dict(folder)[0]
    except OSError:
        return {}
    names = {"mean": "image_mean", "std": "image_std"}
    return {ours: tuple(given[name]) for ours, name in names.items() if given.get(name)}


def _settings(config: Any) -> dict[str, Any]:
    """What differs from the architecture's defaults, as a recipe would write it."""
    other = {"model_type", "transformers_version", "dtype", "architectures", "_name_or_path"}
    other |= {"vision_use_head", "stage_names", "out_features", "out_indices"}
    other |= _unknown(config).keys()
    other |= OLDER - type(config)().to_dict().keys()  # phi3 keeps one beside its rope_parameters
    return {key: value for key, value in config.to_diff_dict().items() if key not in other}


def _unknown(config: Any) -> dict[str, Any]:
    """The keys of a config that its class does not have, except those of transformers 4."""
    other = {*type(config)().to_dict(), *OLDER, "torch_dtype", "dtype"}
    return {key: value for key, value in config.to_dict().items() if key not in other}


def _load(model: VisionLanguageModel, twin: Any, rows: int) -> None:
    ours: Any = model
    kept = set(ours.vision.encoder.state_dict())
    tower = twin.model.vision_tower.state_dict()
    ours.vision.encoder.load_state_dict({n: value for n, value in tower.items() if n in kept})
    ours.projector[0].load_state_dict(twin.model.multi_modal_projector.linear_1.state_dict())
    ours.projector[2].load_state_dict(twin.model.multi_modal_projector.linear_2.state_dict())
    body, vocabulary = _language_names(model)
    language = {body + n: v for n, v in twin.model.language_model.state_dict().items()}
    language |= {f"lm_head.{n}": v for n, v in twin.lm_head.state_dict().items()}
    head = model.language.get_output_embeddings()
    if head.bias is not None and "lm_head.bias" not in language:
        language["lm_head.bias"] = torch.zeros(rows)
    ours.language.load_state_dict(
        {n: v[:rows] if n in vocabulary else v for n, v in language.items()}
    )


def _language_names(model: VisionLanguageModel) -> tuple[str, set[str]]:
    """What the decoder's tensors' names begin with, and those that have a row for each token."""
    both = (model.language.get_input_embeddings(), model.language.get_output_embeddings())
    paths = {name for name, module in model.language.named_modules() if module in both}
    rows = {f"{path}.{leaf}" for path in paths for leaf in ("weight", "bias")}
    return f"{model.language.base_model_prefix}.", rows


def _config(model: VisionLanguageModel, rows: int, image_token_id: int) -> Any:
    from transformers import LlavaConfig

    ours: Any = model
    encoder = ours.vision.encoder
    vision = encoder.config.to_dict()
    vision["num_hidden_layers"] = len(
        encoder.get_submodule(FAMILIES[model.config.vision.tower].layers)
    )
    for name in ("stage_names", "out_features", "out_indices"):  # they count all the layers
        vision.pop(name, None)
    text = {**model.language.config.to_dict(), "vocab_size": rows}
    text["architectures"] = [type(model.language).__name__]  # servers find the decoder by it
    # transformers' LLaVA ties a head to this name alone; of other decoders the head is written
    is_named = hasattr(ours.language.base_model, "embed_tokens")
    tied = is_named and bool(text.get("tie_word_embeddings"))
    text["tie_word_embeddings"] = tied
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token_id,
        image_seq_length=model.vision.num_tokens,
        vision_feature_layer=-1,
        vision_feature_select_strategy=_strategy(model.config.vision),
        tie_word_embeddings=tied,
    )


def _strategy(vision: VisionConfig) -> Literal["default", "full"]:
    """Transformers' word for the rows taken: `default` leaves out the first, whatever it is."""
    return "default" if skipped_rows(vision) else "full"


def _to_hf(model: VisionLanguageModel, rows: int) -> dict[str, Weight]:
    """Our tensors under transformers' names."""
    _check_parts(model)
    ours: Any = model
    norm = FAMILIES[model.config.vision.tower].norm
    state = {
        f"model.vision_tower.{name}": value
        for name, value in plain_weights(ours.vision.encoder).items()
        if not name.startswith(norm)
    }
    layers = {"0": "linear_1", "2": "linear_2"}
    for key, value in plain_weights(ours.projector).items():
        place, _, leaf = key.partition(".")
        state[f"model.multi_modal_projector.{layers[place]}.{leaf}"] = value
    body, vocabulary = _language_names(model)
    for name, value in plain_weights(model.language).items():
        if name in vocabulary and value.shape[0] < rows:
            value = value.then(partial(_grow, rows=rows), rows, *value.shape[1:])
        below = name.removeprefix(body)
        state[name if below == name else f"model.language_model.{below}"] = value
    return state


def _check_parts(model: VisionLanguageModel) -> None:
    if model.config.aux.mode:
        raise ModelError(
            f"aux.mode: {model.config.aux.mode} has no counterpart in transformers' LLaVA, which "
            "has no tokens behind an image's rows; use the run itself"
        )
    tower, projector = model.config.vision.tower, model.config.projector
    if tower not in FAMILIES:
        raise ModelError(
            f"vision.tower: {tower} has no counterpart in transformers' LLaVA; expected one of "
            f"{', '.join(FAMILIES)}"
        )
    vision = model.config.vision
    if vision.norm or skipped_rows(vision) > 1:
        what = "norm: true" if vision.norm else f"skip: {vision.skip}"
        raise ModelError(
            f"vision.{what} has no counterpart in transformers' LLaVA, which takes rows before the "
            "norm and leaves out one at most; generate from the run itself, or export to peft"
        )
    if projector != "mlp2x_gelu":
        raise ModelError(
            f"projector: {projector} has no counterpart in transformers' LLaVA, which has two "
            "layers with GELU between; expected mlp2x_gelu"
        )
    if logit_softcap(model.language) is not None or logit_scale(model.language) != 1.0:
        kind = model.language.config.model_type
        does = "scales" if logit_softcap(model.language) is None else "bounds"
        raise ModelError(
            f"language: {kind} {does} its logits, which transformers' LLaVA does not; generate "
            "from the run itself"
        )


def _grow(value: Tensor, rows: int) -> Tensor:
    mean = value.float().mean(0, keepdim=True).to(value.dtype)
    return torch.cat([value, mean.expand(rows - value.shape[0], *value.shape[1:])])
