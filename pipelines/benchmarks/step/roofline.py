"""What a training step must cost: operations and bytes of its parts over a card's ceilings.

Every kernel takes the longer of its operations over the card's rate and its bytes over the card's
bandwidth. Launches, communication, data, and what a product loses to its shape are not in it: a
floor, and not a forecast. `--check` compares the same sum with a measured step on this CPU.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from lapilli.model.parts.trainable import set_modes
from lapilli.model.peak import peak_flops
from lapilli.model.vlm import build_model
from lapilli.train.config import OptimConfig
from lapilli.train.driver.fake_model import sketch_model
from lapilli.train.engine.torch_engine import PlainEngine
from lapilli.train.steps.optim import build_optimizer
from lapilli.train.steps.step import to_device, train_step
from pipelines.benchmarks.harness import add_row, provenance, table
from pipelines.benchmarks.sides.counting import ADAMW, Kernel, count_step, fused_bytes
from pipelines.benchmarks.step.training import Mode, make_batch, model_config, operations
from pipelines.cli.command import parse, say

__all__ = ["CARDS", "Ceilings", "RooflineConfig", "floor_by_part", "main"]

ALL = frozenset({"norms", "rotary", "swiglu", "merge", "adamw"})
FUSED = {
    "torch kernels": frozenset[str](),
    **{f"{part} fused": frozenset({part}) for part in sorted(ALL)},
    "all fused": ALL,
    "all fused, layers compiled": ALL | {"compile"},
}
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches at most: operations and bytes a second."""

    flops: float
    bytes: float


# An H200's data sheet (dense bf16, HBM3e), and what one such card did: a product of 8192 x 8192
# random numbers in bf16, and a copy within its memory.
CARDS = {
    "data sheet": Ceilings(peak_flops("H200") or 0.0, 4.8e12),
    "measured": Ceilings(788e12, 4.3e12),
}


@dataclass(frozen=True)
class RooflineConfig:
    """What is calculated.

    Attributes:
        sizes: Of 7b, 13b, small, tiny.
        modes: Of stage1, lora, full.
        micro_batch_size: Rows with an image each.
        text_tokens: Text of a row; half of it is trained.
        check: Instead, compare `small` (two rows) with a measured step on this CPU.
        save: Add rows to `results/roofline.csv`.
    """

    sizes: tuple[Literal["7b", "13b", "small", "tiny"], ...] = field(default=("7b", "13b"))
    modes: tuple[Mode, ...] = field(default=("stage1", "lora", "full"))
    micro_batch_size: int = 8
    text_tokens: int = 224
    check: bool = False
    save: bool = True


def main(argv: Sequence[str]) -> int:
    """Calculate, tell, and add a row for each way of computing a step."""
    config = parse(RooflineConfig, argv, "The floor of a training step, part by part.")
    head = provenance(("torch", "transformers", "peft"), "roofline", argv)
    for size in ("small",) if config.check else config.sizes:
        for mode in config.modes:
            if config.check:
                _check(config, mode)
                continue
            for row in _calculate(config, size, mode):
                if config.save:
                    add_row("roofline", head | row)
    return 0


def floor_by_part(
    kernels: Sequence[Kernel], ceilings: Ceilings, fused: frozenset[str] = FUSED["torch kernels"]
) -> dict[str, float]:
    """Seconds by part; what checkpointed layers run again is a part of its own.

    Args:
        kernels: A step's (`count_step`).
        ceilings: The device's.
        fused: Parts that are one kernel forward and one backward in each module; `adamw`;
            `compile`, which makes one kernel of the norms with the sums beside them.
    """
    groups = _groups(kernels, fused)
    found: dict[str, float] = defaultdict(float)
    part_of: dict[Hashable, str] = {}
    for kernel, group in zip(kernels, groups, strict=True):
        part = "recomputation" if kernel.phase == "recompute" else kernel.part
        if group is None:
            found[part] += max(kernel.flops / ceilings.flops, kernel.bytes / ceilings.bytes)
        else:
            part_of.setdefault((group, kernel.phase), part)
    for key, size in fused_bytes(kernels, groups).items():
        found[part_of[key]] += size / ceilings.bytes
    return dict(found)


def _groups(kernels: Sequence[Kernel], fused: frozenset[str]) -> list[Hashable]:
    """The group of each kernel, None for one that stays by itself."""
    groups: list[Hashable] = []
    run = 0
    for kernel in kernels:
        run += kernel.flops > 0
        group: Hashable = None
        if kernel.part in ("norms", "residual", "adapters") and "compile" in fused:
            group = run
        elif kernel.part in fused or (kernel.owner == ADAMW and "adamw" in fused):
            group = kernel.part, kernel.owner.removesuffix(".act_fn")
        groups.append(group)
    return groups


def _count(
    config: RooflineConfig, size: str, mode: Mode, *, rows: int, dtype: Literal["fp32", "bf16"],
    checkpointing: bool = False, attention: str = "auto",
) -> tuple[list[Kernel], int]:  # fmt: skip
    """A step's kernels, and the operations that its mathematics needs."""
    shapes = model_config(size, mode, torch.device("cpu"))
    language = replace(shapes.language, attention=attention)
    sketch = sketch_model(replace(shapes, language=language, dtype=dtype))
    batch = make_batch(sketch.model, rows, config.text_tokens)
    kernels = count_step(sketch, batch, checkpointing=checkpointing)
    return kernels, operations(sketch.model, batch).model.total


def _calculate(config: RooflineConfig, size: str, mode: Mode) -> list[dict[str, Any]]:
    """The table of one size and mode, printed and as rows."""
    given: dict[str, Any] = {"rows": config.micro_batch_size, "dtype": "bf16"}
    plain, flops = _count(config, size, mode, **given)
    eager, _ = _count(config, size, mode, attention="eager", **given)
    again, _ = _count(config, size, mode, checkpointing=True, **given)
    ways = {name: (plain, fused) for name, fused in FUSED.items()}
    ways |= {"all fused, attention eager": (eager, ALL), "all fused, recomputed": (again, ALL)}
    found: list[dict[str, Any]] = []
    for name, (kernels, fused) in ways.items():
        row: dict[str, Any] = {"size": size, "mode": mode, "rows": config.micro_batch_size}
        row |= {"way": name, "tflop": round(sum(kernel.flops for kernel in kernels) / 1e12, 2)}
        for card, ceilings in CARDS.items():
            parts = floor_by_part(kernels, ceilings, fused)
            seconds = sum(parts.values())
            mfu = flops / CARDS["data sheet"].flops / seconds
            row |= {f"seconds {card}": round(seconds, 4), f"mfu {card}": round(mfu, 4)}
            largest = sorted(parts, key=lambda part: -parts[part])[:3]
            row["largest"] = "; ".join(f"{part} {parts[part] / seconds:.0%}" for part in largest)
        found.append(row)
    _show_parts(f"{size} {mode}: floor by part, measured ceilings", again)
    columns = "way", "seconds measured", "mfu measured", "mfu data sheet"
    table(f"{size} {mode}", columns, [[row[column] for column in columns] for row in found])
    for row in found:
        say(f"{row['way']}: largest {row['largest']}")
    return found


def _show_parts(title: str, kernels: Sequence[Kernel]) -> None:
    """Operations, bytes and time of each part, as torch computes it and with all fused."""
    apart, fused = (floor_by_part(kernels, CARDS["measured"], way) for way in (frozenset(), ALL))
    flops: dict[str, float] = defaultdict(float)
    moved: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        part = "recomputation" if kernel.phase == "recompute" else kernel.part
        flops[part] += kernel.flops / 1e12
        moved[part] += kernel.bytes / 1e9
    rows = [
        (part, *(round(n, 1) for n in (flops[part], moved[part], apart[part] * 1e3, taken * 1e3)))
        for part, taken in sorted(fused.items(), key=lambda item: -item[1])
    ]
    table(title, ("part", "TFLOP", "GB", "ms", "ms fused"), rows)


def _check(config: RooflineConfig, mode: Mode) -> None:
    """Say the seconds of a step's matrix products and of all else, calculated and measured."""
    kernels, _ = _count(config, "small", mode, rows=2, dtype="fp32")
    products = [kernel for kernel in kernels if f"aten::{kernel.name}" in PRODUCTS]
    device = torch.device("cpu")
    model = build_model(model_config("small", mode, device))
    set_modes(model)
    batch = make_batch(model, 2, config.text_tokens)
    engine = PlainEngine(model, build_optimizer(model, OptimConfig(lr=1e-5)), grad_clip=1.0)
    on_device = [to_device(batch, device)]
    found: dict[str, list[float]] = defaultdict(list)
    for turn in range(6):
        before = _ceilings()
        with torch.profiler.profile() as profile:
            train_step(engine, on_device, global_tokens=batch.num_targets, world_size=1)
        after = _ceilings()  # of a machine that others use too, on both sides of the step
        limits = Ceilings((before.flops + after.flops) / 2, (before.bytes + after.bytes) / 2)
        events: list[Any] = list(profile.key_averages())
        whole = sum(event.self_cpu_time_total for event in events) / 1e6
        taken = sum(event.self_cpu_time_total for event in events if event.key in PRODUCTS) / 1e6
        floor = sum(floor_by_part(kernels, limits).values())
        expected = sum(floor_by_part(products, limits).values())
        times = (expected, taken, taken / expected, floor - expected, whole - taken)
        names = ("products s", "measured s", "ratio", "else s", "measured else s")
        for name, value in zip(names, times, strict=True):
            found[name] += [value] * (turn > 0)
    middle = [f"{name} {statistics.median(values):.3f}" for name, values in found.items()]
    say(f"small {mode}: {', '.join(middle)}")


def _ceilings(size: int = 768, rounds: int = 10) -> Ceilings:
    """This CPU's mean rates of square products and of copies."""
    square, long = torch.ones(size, size), torch.ones(2**24)
    target = torch.empty_like(long)
    start = time.perf_counter()
    for _ in range(rounds):
        torch.mm(square, square)
    middle = time.perf_counter()
    for _ in range(rounds):
        target.copy_(long)
    end = time.perf_counter()
    flops = rounds * 2 * size**3 / (middle - start)
    return Ceilings(flops, rounds * 2 * long.nbytes / (end - middle))
