"""A training step of LLaVA-1.5's shapes with random weights: time, MFU, memory, the largest costs.

One process and plain torch (`lapilli.train.engine.torch_engine`): neither Ray nor DeepSpeed is
needed. On a GPU the 7B sizes in bf16, else a tiny model in fp32; stage 1 (the projector learns),
LoRA, and full.
Beside it transformers' Trainer on `LlavaForConditionalGeneration` of the same sizes, rows and
learning parts. MFU and HFU are `step_flops` over the peak rate: a data sheet's on a GPU, on a CPU
that of a square matrix product. The wait for data is the feed's matter (topic `feed`): here a batch
is on the device already.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lapilli.data.batches.collate import Batch, BatchShape, collate
from lapilli.data.dataset.dataset import Sample
from lapilli.model.attention.backend import attention_kernel
from lapilli.model.config import LanguageConfig, LoraConfig, ModelConfig, VisionConfig
from lapilli.model.flops import BatchNumbers, StepFlops, model_numbers, step_flops
from lapilli.model.kernels.choice import choose_kernels
from lapilli.model.parts.recomputation import recompute_all
from lapilli.model.parts.trainable import set_modes
from lapilli.model.peak import measured_peak, peak_flops
from lapilli.model.vlm import DTYPES, VisionLanguageModel, build_model
from lapilli.train.config import OptimConfig
from lapilli.train.device import peak_memory
from lapilli.train.engine.torch_engine import PlainEngine
from lapilli.train.steps.optim import build_optimizer
from lapilli.train.steps.step import to_device, train_step
from pipelines.benchmarks.harness import add_row, provenance
from pipelines.benchmarks.sides.products import product_seconds
from pipelines.benchmarks.sides.trainer_way import trainer_seconds
from pipelines.benchmarks.step.shapes import SIZES
from pipelines.cli.command import parse, say

__all__ = ["TrainBenchmark", "main"]

Mode = Literal["stage1", "lora", "full"]
PACKAGES = ("torch", "transformers", "peft")


@dataclass(frozen=True)
class TrainBenchmark:
    """What is measured.

    Attributes:
        size: `7b`, `1b` (TinyLlama's sizes), `tiny`, or `auto`: 7b on a GPU.
        modes: Of stage1, lora, full; one that does not fit in memory says so and has no row.
        micro_batch_size: Rows with an image each.
        accumulation: Micro-batches of a step.
        text_tokens: Text of a row; half of it is trained.
        steps: Timed steps, after two that are not.
        checkpointing: Run every layer again in backward.
        kernels: As in a recipe; `torch` fuses nothing but the merge.
        compile: As in a recipe.
        attention: As in a recipe.
        trainer: Measure transformers' Trainer too.
        trace: Folder for a trace file of a step of each mode; empty for none.
        save: Add rows to `results/train.csv`.
    """

    size: Literal["auto", "7b", "1b", "tiny"] = "auto"
    modes: tuple[Mode, ...] = field(default=("stage1", "lora", "full"))
    micro_batch_size: int = 8
    accumulation: int = 1
    text_tokens: int = 224
    steps: int = 10
    checkpointing: bool = False
    kernels: Literal["auto", "torch", "liger"] = "auto"
    compile: Literal["none", "blocks"] = "none"
    attention: str = "auto"
    trainer: bool = True
    trace: str = ""
    save: bool = True


def main(argv: Sequence[str]) -> int:
    """Measure, tell, and add a row for each mode."""
    config = parse(TrainBenchmark, argv, "A training step's time, MFU, memory and costs.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = config.size
    if size == "auto":
        size = "7b" if device.type == "cuda" else "tiny"
    head = provenance(PACKAGES, "train", argv)
    head |= {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}
    peak = peak_flops(head["device"]) if device.type == "cuda" else measured_peak(device)
    for mode in config.modes:
        try:
            figures = _measure(config, size, mode, device, peak)
        except torch.cuda.OutOfMemoryError:
            say(f"{mode}: does not fit in this GPU's memory")
            _forget(device)
            continue
        say(", ".join(f"{name} {value}" for name, value in figures.items()))
        if config.save:
            add_row("train", head | figures)
    return 0


def model_config(size: str, mode: Mode, device: torch.device) -> ModelConfig:
    """LLaVA-1.5's sizes, or tiny ones, with random weights."""
    vision, language = SIZES[size]
    return ModelConfig(
        vision=VisionConfig(settings=vision),
        language=LanguageConfig(settings=language),
        trainable=("projector",) if mode == "stage1" else ("projector", "language"),
        lora=LoraConfig(rank=128, alpha=256, dropout=0.0) if mode == "lora" else None,
        dtype="bf16" if device.type == "cuda" else "fp32",
    )


def make_batch(model: VisionLanguageModel, rows: int, text_tokens: int) -> Batch:
    """Rows of an image and text, the second half of which is trained."""
    draw = np.random.default_rng(0)
    side, tokens = model.vision.image_size, model.vision.num_tokens
    samples: list[Sample] = []
    last = model.vocab_size - 1  # an image's place in the model that `trainer_way` times
    for row in range(rows):
        ids = draw.integers(1, last, text_tokens + 1).astype(np.int32)
        ids[1] = -200
        spans = np.array([[1 + text_tokens // 2, text_tokens + 1]], np.int32)
        pixels = draw.integers(0, 256, (1, side, side, 3)).astype(np.uint8)
        samples.append(Sample(f"row{row}", ids, spans, pixels))
    length = -(-(text_tokens + tokens) // 8) * 8
    trained = rows * (text_tokens - text_tokens // 2)
    sizes = (-(-trained // 8) * 8,)  # as a run's feed chooses them
    shape = BatchShape(rows=rows, buckets=(length,), image_tokens=tokens, target_sizes=sizes)
    return collate(samples, shape, side)


def operations(model: VisionLanguageModel, batch: Batch) -> StepFlops:
    """Operations of the batch's forward and backward."""
    rows, length = batch.input_ids.shape
    numbers = BatchNumbers(
        row_lengths=batch.row_lengths.tolist(), images=batch.num_images,
        targets=batch.num_targets, padded_rows=rows, padded_length=length,
        padded_images=len(batch.pixels), padded_targets=len(batch.targets),
    )  # fmt: skip
    return step_flops(model_numbers(model), numbers)


@dataclass(frozen=True)
class OurStep:
    """What was measured of our step."""

    seconds: float
    memory: int
    costs: str
    host_reads: int | str
    kernels: str
    flops: StepFlops
    batch: Batch
    products: float | str


def _ours(config: TrainBenchmark, shapes: ModelConfig, mode: Mode, device: torch.device) -> OurStep:
    """Our step; its model is gone afterwards."""
    model, batch, step = _made(config, shapes, device)
    seconds = _median_seconds(step, config.steps, device)
    return OurStep(
        seconds=seconds, memory=peak_memory(device), costs=_largest_costs(step, device, config.trace, mode),
        host_reads=_host_reads(step, device),
        kernels=_kernels(model, batch, shapes, device), flops=operations(model, batch), batch=batch,
        products=_products(config, shapes, device),
    )  # fmt: skip


def _made(
    config: TrainBenchmark, shapes: ModelConfig, device: torch.device
) -> tuple[VisionLanguageModel, Batch, Callable[[], None]]:
    """A model, its batch, and what takes a step."""
    with device:
        model = build_model(shapes)
    if config.checkpointing:
        recompute_all(model)
    set_modes(model)
    batch = make_batch(model, config.micro_batch_size, config.text_tokens)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-5), fused=device.type == "cuda")
    engine = PlainEngine(model, optimizer, accumulation=config.accumulation, grad_clip=1.0)
    on_device = [to_device(batch, device)] * config.accumulation
    tokens = batch.num_targets * config.accumulation

    def step() -> None:
        train_step(engine, on_device, global_tokens=tokens, world_size=1)

    return model, batch, step


def _products(config: TrainBenchmark, shapes: ModelConfig, device: torch.device) -> float | str:
    """Seconds of the matrix products of a step that is not compiled; nothing on a GPU."""
    if device.type != "cpu":
        return ""
    *_, step = _made(config, replace(shapes, compile="none"), device)
    return product_seconds(step, config.steps)


def _kernels(
    model: VisionLanguageModel, batch: Batch, shapes: ModelConfig, device: torch.device
) -> str:
    """What computed the layers, the merge, the loss and the attention."""
    family = model.language.config.model_type
    chosen = choose_kernels(shapes, family, device.type)
    dtype = DTYPES[shapes.dtype]
    attention = attention_kernel(model.language, batch.input_ids.shape[1], dtype, device)
    return f"{chosen.note.removeprefix('kernels: ')}, attention {attention}"


def _host_reads(step: Callable[[], None], device: torch.device) -> int | str:
    """How often a step waits for the device, as far as torch can tell; nothing on a CPU."""
    if device.type != "cuda":
        return ""
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in found)


def _measure(
    config: TrainBenchmark, size: str, mode: Mode, device: torch.device, peak: float | None
) -> dict[str, Any]:
    """One mode: ours, its costs, then transformers' Trainer."""
    shapes = model_config(size, mode, device)
    shapes = replace(
        shapes, kernels=config.kernels, compile=config.compile,
        language=replace(shapes.language, attention=config.attention),
    )  # fmt: skip
    _forget(device)
    ours = _ours(config, shapes, mode, device)
    _forget(device)
    folder = config.trace or tempfile.gettempdir()
    share = {
        name: round(getattr(ours.flops, kind).total * config.accumulation / ours.seconds / peak, 4)
        if peak
        else ""
        for name, kind in (("mfu", "model"), ("hfu", "hardware"))
    }
    figures: dict[str, Any] = {
        "size": size, "mode": mode, "rows": config.micro_batch_size, "accumulation": config.accumulation,
        "length": ours.batch.input_ids.shape[1], "checkpointing": config.checkpointing,
        "seconds": round(ours.seconds, 4), **share,
        "peak_tflops": round(peak / 1e12, 3) if peak else "",
        "memory_gb": round(ours.memory / 1e9, 2), "trainer_seconds": "",
        "trainer_memory_gb": "", "of_trainer": "", "costs": ours.costs,
        "host_reads": ours.host_reads, "kernels": ours.kernels,
        "products_seconds": round(ours.products, 4) if isinstance(ours.products, float) else "",
    }  # fmt: skip
    if config.trainer:
        theirs = trainer_seconds(
            shapes,
            ours.batch,
            config.steps,
            device,
            config.accumulation,
            folder=folder,
            recomputes=config.checkpointing,
        )
        figures |= {
            "trainer_seconds": round(theirs.seconds, 4),
            "trainer_memory_gb": round(theirs.memory / 1e9, 2),
            "of_trainer": round(theirs.seconds / ours.seconds, 2),
        }
    return figures


def _median_seconds(step: Callable[[], None], count: int, device: torch.device) -> float:
    found: list[float] = []
    for _ in range(count + 2):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return statistics.median(found[2:])


def _largest_costs(step: Callable[[], None], device: torch.device, folder: str, mode: str) -> str:
    """The three operators that take most of a step's own time, with their shares."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(f"{folder}/{mode}.json")
    name = f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total"
    events: list[Any] = list(profile.key_averages())
    whole = sum(getattr(event, name) for event in events)
    largest = sorted(events, key=lambda event: -getattr(event, name))[:3]
    return "; ".join(f"{event.key} {getattr(event, name) / whole:.0%}" for event in largest)


def _forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
