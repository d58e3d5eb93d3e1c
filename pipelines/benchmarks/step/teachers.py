"""Teachers' features: actors of Ray Data beside bare processes, and what a whole dataset costs.

`teachers` measures, `targets` calculates: GPU hours of VisPer-LM's three teachers, disk by form of
storage, and what training reads.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lapilli.data.config import BuildConfig, TargetConfig
from lapilli.model.flops import BatchNumbers, model_numbers, step_flops
from lapilli.model.peak import peak_flops
from lapilli.train.config import RunConfig
from lapilli.train.driver.fake_model import sketch_model
from pipelines.benchmarks.harness import by_turns, provenance, publish, table
from pipelines.benchmarks.material.photos import write_photos
from pipelines.benchmarks.sides.teacher_sides import SIDES, SIZE
from pipelines.benchmarks.step.shapes import CLIP_L, LLAMA_3
from pipelines.cli.command import UsageError, parse, say
from pipelines.cli.recipes import RECIPES

__all__ = ["TargetCostsConfig", "TeachersConfig", "costs", "main", "storages", "teacher_flops"]

NAMES = {"bare": "two bare processes", "ray": "Ray Data, two actors"}
SHOWN = {
    "side": "side", "images/s": "images_per_second", "least": "low", "most": "high",
    "x bare": "of_bare",
}  # fmt: skip
# Data sheets' rates of fp32 without tensor cores, in which teachers compute; dense.
FP32_RATES = {"A100": 19.5e12, "H100": 66.9e12, "H200": 66.9e12}
TEXT_TOKENS = 80  # of an average caption of the 558K, with Llama 3's frames


@dataclass(frozen=True)
class TeachersConfig:
    """What is measured.

    Attributes:
        images: Images that are given to the teacher.
        milliseconds: That it takes an image.
        rows: Vectors an image.
        width: Numbers of each.
        workers: Processes, each with a teacher.
        rounds: Turns that count.
        folder: Keeps the photos between runs; else they are made anew.
        save: Add rows to `results/teachers.csv`.
    """

    images: int = 10_000
    milliseconds: float = 20.0
    rows: int = 64
    width: int = 384
    workers: int = 2
    rounds: int = 1
    folder: str = ""
    save: bool = True


def main(argv: Sequence[str]) -> int:
    """Let both sides run by turns, tell, and add a row for each."""
    config = parse(TeachersConfig, argv, "Features of a paced teacher, on Ray and by bare loops.")
    head = provenance(("ray", "numpy", "pyarrow"), "teachers", argv)
    with tempfile.TemporaryDirectory() as made:
        photos = Path(config.folder or made) / "photos"
        photos.mkdir(parents=True, exist_ok=True)
        write_photos(photos, config.images, (SIZE, SIZE))
        sides = {side: partial(_side, side, config, photos, Path(made)) for side in SIDES}
        found = by_turns(sides, config.rounds, warm=False)
    bare = found["bare"].median
    rows = [
        {
            "side": NAMES[side], "images": config.images, "milliseconds": config.milliseconds,
            "rows": config.rows, "width": config.width, "workers": config.workers,
            "rounds": config.rounds,
            "images_per_second": round(spread.rate(config.images).median, 2),
            "low": round(spread.rate(config.images).low, 2),
            "high": round(spread.rate(config.images).high, 2),
            "of_bare": round(bare / spread.median, 3),
        }
        for side, spread in found.items()
    ]  # fmt: skip
    title = f"{config.images:,} images, {config.milliseconds:g} ms each"
    publish("teachers", head, rows, SHOWN, title=title, save=config.save)
    return 0


def _side(side: str, config: TeachersConfig, photos: Path, folder: Path) -> float:
    output = folder / "out"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    job = {
        "photos": str(photos), "output": str(output), "count": config.images,
        "milliseconds": config.milliseconds, "rows": config.rows, "width": config.width,
        "workers": config.workers,
    }  # fmt: skip
    command = [sys.executable, "-m", "pipelines.benchmarks.sides.teacher_sides", side]
    done = subprocess.run(
        [*command, json.dumps(job)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        raise UsageError(f"{side}: ended with exit code {done.returncode}: {last[0]}")
    return float(json.loads(done.stdout.strip().splitlines()[-1])["seconds"])


# ---- what a dataset costs ------------------------------------------------------------------------


@dataclass(frozen=True)
class TargetCostsConfig:
    """What is calculated for VisPer-LM's first stage.

    Attributes:
        images: Of the dataset.
        gpu: Whose data sheet's rates are taken: A100, H100 or H200.
        utilisation: Share of its rate that teachers and training reach; assumed.
        gpus: Of the training.
    """

    images: int = 558_128
    gpu: str = "H100"
    utilisation: float = 0.4
    gpus: int = 8

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        if self.gpu not in FP32_RATES:
            raise UsageError(f"gpu: {self.gpu!r}; expected {', '.join(FP32_RATES)}")
        if not 0 < self.utilisation <= 1:
            raise UsageError(f"utilisation: {self.utilisation}; expected above 0, at most 1")


def costs(argv: Sequence[str]) -> int:
    """Tell GPU hours, disk and read bandwidth."""
    config = parse(TargetCostsConfig, argv, "What VisPer-LM's targets cost, calculated.")
    recipe = [f"--config={RECIPES / 'visper_lm' / 'pretrain_data.yaml'}", "--root=in"]
    targets = parse(BuildConfig, [*recipe, "--output=out"], "").targets
    rate = FP32_RATES[config.gpu] * config.utilisation
    operations = {task: teacher_flops(target) for task, target in targets.items()}
    hours = {task: each * config.images / rate / 3600 for task, each in operations.items()}
    table(
        f"GPU hours for {config.images:,} images, {config.gpu} in fp32 at {config.utilisation:.0%}",
        ("teacher", "GFLOP an image", "images/s a GPU", "GPU hours"),
        [
            [task, round(each / 1e9, 1), round(rate / each), round(hours[task], 1)]
            for task, each in operations.items()
        ],
    )
    say(f"all teachers: {sum(hours.values()):.1f} GPU hours")
    speed = _training_speed(config)
    table(
        f"disk, and reading at {speed:,.0f} images/s of {config.gpus} {config.gpu}",
        ("storage", "KB an image", "GB in all", "MB/s read"),
        [
            [name, round(each / 1e3, 1), round(each * config.images / 1e9), round(each * speed / 1e6)]
            for name, each in storages(targets).items()
        ],
    )  # fmt: skip
    return 0


def storages(targets: dict[str, TargetConfig]) -> dict[str, int]:
    """Bytes of an image's targets of all teachers, by form of storage."""

    def total(storage: Any, pool: int) -> int:
        grids = [target for target in targets.values() if target.rows > 1]
        single = [target for target in targets.values() if target.rows == 1]
        changed = [replace(target, storage=storage, pool=pool) for target in grids]
        return sum(target.image_bytes for target in [*changed, *single])

    return {
        "bf16": total("bf16", 1), "int8, as the recipe has it": total("int8", 1),
        "bf16, 12 x 12": total("bf16", 2), "int8, 12 x 12": total("int8", 2),
    }  # fmt: skip


def teacher_flops(target: TargetConfig) -> int:
    """Operations of a teacher's forward for an image, of the published model's sizes."""
    model = _PUBLISHED[target.teacher]()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.empty(1, 3, target.size, target.size, device="meta"))
    return counter.get_total_flops()


def _depth_encoder() -> nn.Module:
    """DINOv2-L of Depth-Anything-V2-Large."""
    from transformers import Dinov2Config, Dinov2Model

    sizes: dict[str, Any] = {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    }  # fmt: skip
    with torch.device("meta"):
        return Dinov2Model(Dinov2Config(**sizes, image_size=518, patch_size=14))


def _segmentation_encoder() -> nn.Module:
    """Swin-L of OneFormer, whose window is 12."""
    from transformers import SwinConfig, SwinModel

    with torch.device("meta"):
        return SwinModel(SwinConfig(
            image_size=768, embed_dim=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48],
            window_size=12,
        ))  # fmt: skip


def _image_encoder() -> nn.Module:
    """CLIP ViT-H/14, the encoder of Stable Diffusion 2.1's unCLIP."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.device("meta"):
        return CLIPVisionModelWithProjection(CLIPVisionConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
            num_attention_heads=16, image_size=224, patch_size=14, projection_dim=1024,
        ))  # fmt: skip


_PUBLISHED = {
    "depth_anything_v2": _depth_encoder,
    "oneformer": _segmentation_encoder,
    "clip_image": _image_encoder,
}


def _training_speed(config: TargetCostsConfig) -> float:
    """Images a second of the first stage at an assumed share of the cards' bf16 rate."""
    path = RECIPES / "visper_lm" / "pretrain.yaml"
    run = parse(RunConfig, [f"--config={path}", "--dataset=in", "--output=out"], "")
    vision = replace(run.model.vision, pretrained="", settings=CLIP_L)
    language = replace(run.model.language, pretrained="", settings=LLAMA_3)
    model = sketch_model(replace(run.model, vision=vision, language=language)).model
    rows = run.micro_batch_size
    length = model.image_tokens + TEXT_TOKENS
    trained = rows * TEXT_TOKENS // 2
    batch = BatchNumbers(
        row_lengths=[length] * rows, images=rows, targets=trained, padded_rows=rows,
        padded_length=length, padded_images=rows, padded_targets=trained,
    )  # fmt: skip
    each = step_flops(model_numbers(model), batch).model.total / rows
    peak = peak_flops(config.gpu)
    assert peak is not None  # of all that `gpu` may be
    return config.gpus * peak * config.utilisation / each
