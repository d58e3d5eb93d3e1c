"""What `memory: auto` chooses for the published recipes on cards, estimated without a weight.

Rows of a recipe's longest sequence, each with an image; parts have the published models' shapes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lapilli.model.config import LanguageConfig
from lapilli.train.config import RunConfig
from lapilli.train.driver.memory_estimate import Estimate, RowSizes, estimate_run, sketch_run
from lapilli.train.driver.memory_policy import GIB, USABLE, choose_memory
from lapilli.train.errors import TrainError
from pipelines.benchmarks.harness import add_row, provenance, table
from pipelines.benchmarks.step.shapes import CLIP_L, LLAMA_3, PHI_15, QWEN_7B, SIGLIP, SIZES
from pipelines.cli.command import parse

__all__ = ["CARDS", "main"]

RECIPES = Path(__file__).parents[2] / "recipes"
PACKAGES = ("torch", "transformers", "peft")
# GiB that torch reports for a card.
CARDS = {"RTX 4090": 23.5, "A100 40 GB": 39.4, "A100 80 GB": 79.1, "H200": 139.8}


@dataclass(frozen=True)
class Shapes:
    """The published models behind a recipe: the tower's and the decoder's settings."""

    name: str
    vision: dict[str, Any]
    model_type: str
    language: dict[str, Any]


VICUNA = [
    Shapes(f"Vicuna {size}", CLIP_L, "llama", SIZES[size.lower()][1]) for size in ("7B", "13B")
]
PHI = [Shapes("Phi 1.5", CLIP_L | {"image_size": 224}, "phi", PHI_15)]
CASES: dict[str, list[Shapes]] = {
    "llava15/pretrain": VICUNA,
    "llava15/finetune_lora": VICUNA,
    "llava15/finetune": VICUNA,
    "visper_lm/finetune": [Shapes("Llama 3 8B", CLIP_L, "llama", LLAMA_3)],
    "basic_vlm/train": [Shapes("Qwen 7B", SIGLIP, "qwen", QWEN_7B)],
    "vlm_training/pretrain": PHI,
    "vlm_training/finetune_lora": PHI,
}


@dataclass(frozen=True)
class MemoryTable:
    """The table.

    Attributes:
        recipes: Recipes, by folder and name.
        save: Add rows to `results/memory.csv`.
    """

    recipes: tuple[str, ...] = field(default=(*CASES,))
    save: bool = True


def main(argv: Sequence[str]) -> int:
    """Print a line for each recipe, model and card, and add rows."""
    config = parse(MemoryTable, argv, "What memory: auto chooses for the recipes on cards.")
    head = provenance(PACKAGES, "memory", argv)
    for recipe in config.recipes:
        for shapes in CASES[recipe]:
            for row in _choose(recipe, shapes):
                if config.save:
                    add_row("memory", head | row)
    return 0


def _choose(recipe: str, shapes: Shapes) -> list[dict[str, Any]]:
    run = parse(
        RunConfig, [f"--config={RECIPES / recipe}.yaml", "--dataset=in", "--output=out"], ""
    )
    vision = replace(run.model.vision, pretrained="", settings=shapes.vision)
    with tempfile.TemporaryDirectory() as folder:  # a config alone; no weight is read
        text = json.dumps({"model_type": shapes.model_type, **shapes.language})
        (Path(folder) / "config.json").write_text(text, encoding="utf-8")
        language = LanguageConfig(pretrained=folder)
        run = replace(run, model=replace(run.model, vision=vision, language=language))
        found = estimate_run(run, sketch_run(run), RowSizes(run.max_length), device="cuda")

    def estimate(config: RunConfig) -> Estimate:
        if config != run:
            raise TrainError("another model, which is not built here")
        return found

    rows: list[dict[str, Any]] = []
    for card, size in CARDS.items():
        row: dict[str, Any] = {"recipe": recipe, "model": shapes.name, "card": card}
        row |= {"devices": run.num_workers, "rows": run.micro_batch_size, "tokens": run.max_length}
        try:
            _, policy = choose_memory(run, "cuda", int(size * GIB * USABLE), estimate)
        except TrainError as error:
            row |= {"recomputed": "", "host_gib": "", "estimated_gib": "", "said": str(error)}
        else:
            assert policy.estimated is not None
            again = policy.activations.recompute
            layers = [f"{again[part]} of {n} {part}" for part, n in policy.layers.items()]
            row |= {"recomputed": ", ".join(layers), "host_gib": round(policy.host / GIB, 1)}
            row |= {"estimated_gib": round(policy.estimated / GIB, 1), "said": ""}
        rows.append(row)
    columns = ("card", "recomputed", "host_gib", "estimated_gib", "said")
    table(
        f"{recipe}, {shapes.name}: {run.num_workers} x {run.micro_batch_size} rows", columns,
        [[row[column] for column in columns] for row in rows],
    )  # fmt: skip
    return rows
