"""Every training recipe, its models and images replaced by tiny ones of the same families."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from lapilli.data.config import MixtureConfig, TargetConfig
from lapilli.data.images.view import ImageSpec
from lapilli.model.parts.convnext import ConvNextSettings, ConvNextTrunk
from lapilli.train.config import RunConfig
from pipelines.cli.command import parse
from tests.factories import CLIP_MEAN, build_dataset, make_mixture, make_tokenizer
from tests.model.test_qwen1 import write_qwen1

RECIPES = Path(__file__).parents[2] / "pipelines" / "recipes"
SIDE, TINY_SIDE = 28, 64  # of the pretrained towers; the recipe `tiny` has settings of its own
# The published models that recipes name, and their families.
TOWERS = {
    "openai/clip-vit-large-patch14-336": "clip",
    "openai/clip-vit-large-patch14": "clip",
    "google/siglip-so400m-patch14-384": "siglip",
    "facebook/dinov2-small": "dinov2",
    "laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup": "clip_convnext",
}
LANGUAGES = {
    "lmsys/vicuna-7b-v1.5": "llama",
    "liuhaotian/llava-v1.5-7b": "llama",
    "meta-llama/Meta-Llama-3-8B-Instruct": "llama",
    "mistralai/Mistral-7B-v0.1": "mistral",
    "microsoft/phi-1_5": "phi",
    "microsoft/Phi-3-mini-4k-instruct": "phi3",
    "Qwen/Qwen-7B-Chat": "qwen",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "llama",
}
SHAPES = {"depth": (16, 8), "seg": (16, 6), "gen": (1, 8)}  # of targets
# Layers for another language model or tower, on the stages that a test tries them with.
WITH_LAYERS = (
    "visper_lm/pretrain+phi3", "visper_lm/pretrain+convnext", "visper_lm/finetune+phi3+convnext",
)  # fmt: skip
CONVNEXT: dict[str, Any] = {"depths": [1, 1, 1, 1], "hidden_sizes": [4, 4, 8, 16]}
VIEWS = ("clip336_pad", "clip336_crop", "clip224_crop", "siglip384")
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 14,
}
DECODER: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 512, "pad_token_id": 0,
}  # fmt: skip
# Parts of one process on a CPU; what is left of a recipe is what decides how a run is made.
SCALE = (
    "--launcher=process", "--device=cpu", "--num_workers=1", "--global_batch_size=4",
    "--micro_batch_size=2", "--epochs=1", "--max_steps=1", "--model.head_chunk=32",
)  # fmt: skip


@dataclass(frozen=True)
class Material:
    """Where everything lies.

    Attributes:
        dataset: A dataset with every view that a recipe names, small.
        models: A folder of weights for each family.
    """

    dataset: Path
    models: Path

    def arguments(self, recipe: str, output: Path, *flags: str) -> list[str]:
        """What `pipelines.train` is given for a recipe; later flags win."""
        words = [f"--config={path}" for path in layers(recipe)]
        named = parse(RunConfig, [*words, "--dataset=in", "--output=out"], "").model
        if named.vision.tower == "clip_convnext":
            words.append(f"--model.vision.settings={json.dumps(CONVNEXT)}")
            words.append(f"--model.vision.image_size={TINY_SIDE}")
        if named.vision.pretrained:
            words.append(f"--model.vision.pretrained={self.tower(named.vision.pretrained)}")
        if named.language.pretrained:
            words.append(f"--model.language.pretrained={self.language(named.language.pretrained)}")
        if named.aux.heads:
            layers_of = {task: [1] for task in named.aux.tasks}
            words.append(f"--model.aux.layers={json.dumps(layers_of)}")
        if named.aux.mode:
            words.append(f"--model.aux.shapes={json.dumps(SHAPES)}")
        if recipe.startswith("own_data/"):
            words.append("--max_length=512")  # the tokenizer here writes words letter by letter
        places = [f"--dataset={self.dataset}", f"--output={output}"]
        return [*words, *places, *SCALE, *flags]

    def tower(self, name: str) -> Path:
        """The tiny folder for a published tower."""
        return self.models / TOWERS[name]

    def language(self, name: str) -> Path:
        """The tiny folder for a published language model."""
        return self.models / LANGUAGES[name]


def training_recipes() -> list[str]:
    """Every recipe of a run in the tree, by its path below `recipes`, and some with a layer."""
    layered = {name.partition("/")[0] + f"/{one}" for name in WITH_LAYERS for one in _added(name)}
    found: list[str] = []
    for path in sorted(RECIPES.rglob("*.yaml")):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        name = path.relative_to(RECIPES).with_suffix("").as_posix()
        is_run = "sources" not in values and ("model" in values or "sampler" in values)
        if is_run and name not in layered:
            found.append(name)
    return [*found, *WITH_LAYERS]


def _added(recipe: str) -> list[str]:
    return recipe.split("+")[1:]


def layers(recipe: str) -> list[Path]:
    """The files a recipe is made of: a layer stands on another one, or is named behind a `+`."""
    path = RECIPES / f"{recipe.partition('+')[0]}.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "view" in values:
        return [path, *(path.with_name(f"{name}.yaml") for name in _added(recipe))]
    below = "finetune.yaml" if "model" not in values else "pretrain.yaml"
    return [path.with_name(below), path]


def write_convnext(folder: Path) -> None:
    """Random weights of a tiny trunk, as open_clip publishes one."""
    folder.mkdir(parents=True)
    config = {"model_cfg": {"vision_cfg": {"timm_model_name": "convnext_xxlarge"}}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    settings: list[Any] = [tuple(sizes) for sizes in CONVNEXT.values()]
    trunk = ConvNextTrunk(ConvNextSettings(*settings))
    named = {f"visual.trunk.{name}": value for name, value in trunk.state_dict().items()}
    save_file(named, folder / "open_clip_model.safetensors")


def make_material(folder: Path) -> Material:
    """Write weights (without a tokenizer of their own) and a dataset; a megabyte."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder / "tokenizer")
    models = folder / "models"
    CLIPVisionModel(CLIPVisionConfig(**TOWER)).save_pretrained(models / "clip")
    SiglipVisionModel(SiglipVisionConfig(**TOWER)).save_pretrained(models / "siglip")
    Dinov2Model(Dinov2Config(**TOWER)).save_pretrained(models / "dinov2")
    write_convnext(models / "clip_convnext")
    write_qwen1(models / "qwen", rows=DECODER["vocab_size"], seq_length=2048)
    for kind in sorted({*LANGUAGES.values()} - {"qwen"}):
        config = AutoConfig.for_model(kind, **DECODER)
        AutoModelForCausalLM.from_config(config).save_pretrained(models / kind)
    mixture = make_mixture(folder / "raw", images=14, text_only=2)
    views = {name: ImageSpec(SIDE, CLIP_MEAN, max_pixels=10_000_000) for name in VIEWS}
    views["dinov2_112"] = ImageSpec(112, CLIP_MEAN, max_pixels=10_000_000)
    views["clip768"] = ImageSpec(TINY_SIDE, CLIP_MEAN, max_pixels=10_000_000)
    views["square64"] = ImageSpec(TINY_SIDE, CLIP_MEAN, max_pixels=10_000_000)
    held_out = MixtureConfig(held_out=2)  # which some recipes look at
    targets = {
        task: TargetConfig("tests.teaching:blocks", rows=rows, width=width, size=SIDE)
        for task, (rows, width) in SHAPES.items()
    }
    build_dataset(
        mixture, folder / "dataset", tokenizer, views=views, mixture=held_out, targets=targets
    )
    return Material(folder / "dataset", models)
