"""Tiny models, pictures and records that LLaVA's trainer and ours both read."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mistral_common
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lapilli.data.building.driver import build
from lapilli.data.building.runners import run_here
from lapilli.data.config import BuildConfig
from lapilli.data.planning.plan import plan_build
from pipelines.cli.command import parse
from tests.factories import picture

__all__ = [
    "IMAGE_TOKENS", "LIMIT", "SIDE", "Material", "make_models", "make_records", "write_tower",
]  # fmt: skip

RECIPES = Path(__file__).parents[2] / "pipelines" / "recipes" / "llava15"
SIDE, PATCH, HIDDEN = 56, 14, 64
IMAGE_TOKENS = (SIDE // PATCH) ** 2
LIMIT = 160  # --model_max_length
WORDS = [
    "a",
    "red",
    "cat",
    "sits",
    "on",
    "the",
    "old",
    "table",
    "near",
    "two",
    "cups",
    "of",
    "rain",
]


@dataclass(frozen=True)
class Material:
    """A folder with `language/`, `tower/`, `mm_projector.bin` and pictures."""

    folder: Path

    def dataset(self, name: str, records: list[dict[str, Any]], *, stage: str) -> Path:
        """Write records as LLaVA's JSON and build our dataset of them by its recipes."""
        (self.folder / f"{name}.json").write_text(json.dumps(records))
        view = {"finetune": "clip336_pad", "pretrain": "clip336_crop"}[stage]
        sources = [{"name": name, "annotations": f"{name}.json", "images": "."}]
        config = parse(
            BuildConfig,
            [
                f"--config={RECIPES / f'{stage}_data.yaml'}",
                f"--config={RECIPES / 'compat_data.yaml'}",
                f"--sources={json.dumps(sources)}",
                f"--root={self.folder}",
                f"--output={self.folder / 'datasets' / name}",
                f"--tokenizer={self.folder / 'language'}",
                f"--max_text_length={LIMIT}",
                f"--views.{view}.size={SIDE}",
            ],
            "",
        )
        report = build(plan_build(config), runner=run_here)
        assert report.manifest.counts["kept"] == len(records)
        return Path(config.output)


def make_models(folder: Path) -> Material:
    """Random weights in the layouts that both sides read; a real 32k sentencepiece tokenizer."""
    torch.manual_seed(1)
    language = folder / "language"
    config = LlamaConfig(
        vocab_size=32768,
        hidden_size=HIDDEN,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        initializer_range=0.15,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(language)
    vocabulary = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    shutil.copyfile(vocabulary, language / "tokenizer.model")
    facts = {
        "tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True,
        "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "pad_token": "<unk>", "model_max_length": 4096,
    }  # fmt: skip
    (language / "tokenizer_config.json").write_text(json.dumps(facts))
    write_tower(folder / "tower")
    projector = torch.nn.Sequential(
        torch.nn.Linear(48, HIDDEN), torch.nn.GELU(), torch.nn.Linear(HIDDEN, HIDDEN)
    )
    begun = {f"model.mm_projector.{n}": v for n, v in projector.state_dict().items()}
    torch.save(begun, folder / "mm_projector.bin")
    for number in range(24):
        picture(40 + 7 * number, 90 - 2 * number, number).save(folder / f"{number}.png")
    return Material(folder)


def write_tower(folder: Path) -> None:
    """A CLIP tower with its image processor, in the layout of the published ones."""
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=PATCH,
            projection_dim=32,
        )
    )
    for parameter in tower.parameters():  # CLIP's own are so small that all images look alike
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    tower.save_pretrained(folder)
    saved = folder / "model.safetensors"  # in the names of the published folders
    weights = {f"vision_model.{name}": value for name, value in load_file(saved).items()}
    save_file(weights, saved, metadata={"format": "pt"})
    square = {"height": SIDE, "width": SIDE}
    processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=square)
    processor.save_pretrained(folder)


def make_records(
    count: int, seed: int, *, stage: str, text_share: float = 0.35, long: int = 0
) -> list[dict[str, Any]]:
    """Records of unlike lengths, some without an image, `long` of them beyond the limit."""
    draw = random.Random(seed)

    def words(least: int, most: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(least, most)))

    records: list[dict[str, Any]] = []
    for number in range(count):
        with_image = stage == "pretrain" or draw.random() >= text_share
        asked = f"<image>\n{words(2, 8)}?" if with_image else f"{words(2, 12)}?"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": words(1, 20)}]
        if stage == "finetune" and draw.random() < 0.4:
            turns += [
                {"from": "human", "value": words(2, 6)},
                {"from": "gpt", "value": words(1, 12)},
            ]
        if number < long:
            turns[-1]["value"] = words(150, 220)
        image = {"image": f"{draw.randrange(24)}.png"} if with_image else {}
        records.append({"id": f"r{number}", **image, "conversations": turns})
    draw.shuffle(records)
    return records
