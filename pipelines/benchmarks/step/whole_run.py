"""A training run of LLaVA-1.5's shapes from photos to its last step, in one process without Ray.

Photos and conversations of topic `whole` become a dataset in this process; then `launch` trains on
it with DeepSpeed, random weights of the 7B sizes (tiny ones without a GPU) and the settings of
`recipes/llava15`. Reported are the run's own metrics: step time, MFU, waiting for data, memory.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from lapilli.data.building.driver import build
from lapilli.data.building.runners import run_here
from lapilli.data.config import BuildConfig, SourceConfig
from lapilli.data.images.view import ImageSpec
from lapilli.data.planning.plan import plan_build
from lapilli.train.config import CheckpointConfig, OptimConfig, RunConfig
from lapilli.train.driver.launching import launch
from lapilli.train.driver.preflight import preflight
from lapilli.train.run_folder.metrics_file import StepMetrics
from pipelines.benchmarks.harness import add_row, provenance
from pipelines.benchmarks.step.shapes import SIZES
from pipelines.benchmarks.step.training import Mode, model_config
from pipelines.benchmarks.whole import make_mixture
from pipelines.cli.command import UsageError, parse, say

__all__ = ["WholeRun", "main"]

VIEW = "clip"
PACKAGES = ("torch", "transformers", "peft", "deepspeed")
WARM_UP = 3  # first steps, which are not counted


@dataclass(frozen=True)
class WholeRun:
    """What is measured.

    Attributes:
        folder: Where photos, dataset and run are made; photos and dataset are kept.
        tokenizer: Hub name or folder of a tokenizer.
        mode: stage1, lora or full; full saves 12 bytes a parameter.
        size: `7b`, `1b` (TinyLlama's sizes), `tiny`, or `auto`: 1b on a GPU. On an H200 the first
            step of 7b came after minutes.
        records: Conversations, of which each has one of the photos or none.
        images: Photos of 640 x 480.
        steps: Optimizer steps, the first three of which are not counted.
        global_batch_size: Samples of a step.
        micro_batch_size: Samples at once.
        memory: As in a recipe.
        zero_stage: DeepSpeed's ZeRO stage.
        save: Add a row to `results/whole_run.csv`.
    """

    folder: str
    tokenizer: str
    mode: Mode = "lora"
    size: Literal["auto", "7b", "1b", "tiny"] = "auto"
    records: int = 2000
    images: int = 400
    steps: int = 12
    global_batch_size: int = 32
    micro_batch_size: int = 8
    memory: Literal["auto"] | float = "auto"
    zero_stage: Literal[1, 2, 3] = 2
    save: bool = True


def main(argv: Sequence[str]) -> int:
    """Train, tell, and add a row."""
    config = parse(WholeRun, argv, "A run from photos to its last step: time, MFU, wait, memory.")
    if config.steps <= WARM_UP:
        raise UsageError(f"steps: {config.steps}; expected more than {WARM_UP}, which warm up")
    on_gpu = torch.cuda.is_available()
    size = ("1b" if on_gpu else "tiny") if config.size == "auto" else config.size
    head = provenance(PACKAGES, "run", argv)
    head |= {"device": torch.cuda.get_device_name() if on_gpu else "cpu"}
    started = time.perf_counter()
    _make_dataset(config, _side(size))
    built = time.perf_counter()
    run = run_config(config, size, on_gpu=on_gpu)
    shutil.rmtree(run.output, ignore_errors=True)
    rows = launch(preflight(run, on_note=say), on_note=say)
    figures = {
        "size": size, "mode": config.mode, "zero_stage": config.zero_stage,
        "micro_batch_size": config.micro_batch_size,
        "global_batch_size": config.global_batch_size, "memory": config.memory,
        **_figures(rows, built - started, time.perf_counter() - built),
    }  # fmt: skip
    say(", ".join(f"{name} {value}" for name, value in figures.items()))
    if config.save:
        add_row("whole_run", head | figures)
    return 0


def run_config(config: WholeRun, size: str, *, on_gpu: bool) -> RunConfig:
    """The recipe's settings on one device; the vocabulary is LLaMA's at every size."""
    device = torch.device("cuda" if on_gpu else "cpu")
    model = model_config(size, config.mode, device)
    settings = model.language.settings | {"vocab_size": 32_000, "max_position_embeddings": 4096}
    is_stage1 = config.mode == "stage1"
    return RunConfig(
        dataset=f"{config.folder}/dataset{_side(size)}", output=f"{config.folder}/run",
        view=VIEW, model=replace(model, language=replace(model.language, settings=settings)),
        global_batch_size=config.global_batch_size, micro_batch_size=config.micro_batch_size,
        max_steps=config.steps, epochs=1000, zero_stage=config.zero_stage,
        memory=config.memory, precision="bf16" if on_gpu else "fp32", launcher="process",
        optim=OptimConfig(lr=1e-3 if is_stage1 else 2e-5),
        checkpoint=CheckpointConfig(every=10 * config.steps),
    )  # fmt: skip


def _side(size: str) -> int:
    return int(SIZES[size][0]["image_size"])


def _make_dataset(config: WholeRun, side: int) -> None:
    """Photos and conversations as shards, made in this process unless they are there."""
    folder = Path(config.folder)
    make_mixture(folder / "root", config.records, config.images)
    build_config = BuildConfig(
        root=str(folder / "root"), output=str(folder / f"dataset{side}"),
        tokenizer=config.tokenizer, template="v1",
        sources=[SourceConfig(name="mix", annotations=f"mix_{config.records}_{config.images}.json")],
        views={VIEW: ImageSpec(size=side, fill=(122, 116, 104), aspect="pad")},
    )  # fmt: skip
    build(plan_build(build_config), runner=run_here)


def _figures(rows: Sequence[StepMetrics], prepare: float, train: float) -> dict[str, Any]:
    """Medians over the counted steps."""
    counted = rows[WARM_UP:]

    def median(values: Sequence[float | None]) -> float | str:
        known = [value for value in values if value is not None]
        return round(statistics.median(known), 4) if known else ""

    return {
        "prepare_seconds": round(prepare, 1), "run_seconds": round(train, 1),
        "step_seconds": median([row.seconds for row in counted]),
        "wait_share": median([row.wait_seconds / row.seconds for row in counted]),
        "samples_per_second": median([row.samples / row.seconds for row in counted]),
        "tokens_per_second": median([row.tokens_per_second for row in counted]),
        "mfu": median([row.mfu for row in counted]), "hfu": median([row.hfu for row in counted]),
        "memory_gb": round(max(row.memory_bytes or 0 for row in counted) / 1e9, 2),
        "first_loss": round(rows[0].loss, 4), "last_loss": round(rows[-1].loss, 4),
    }  # fmt: skip
