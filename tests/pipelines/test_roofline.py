"""What `roofline` counts equals hand formulas and `step_flops`; what it times is no matter here."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

import pytest
import torch

from lapilli.model.flops import BatchNumbers, model_numbers, step_flops
from lapilli.train.driver.fake_model import sketch_model
from pipelines.benchmarks import harness
from pipelines.benchmarks.__main__ import main
from pipelines.benchmarks.sides.counting import Kernel, count_step, fused_bytes
from pipelines.benchmarks.step import roofline
from pipelines.benchmarks.step.roofline import ALL, Ceilings, floor_by_part
from pipelines.benchmarks.step.training import Mode, make_batch, model_config

ROWS, TEXT, LENGTH, HIDDEN, INNER, LAYERS = 2, 48, 64, 128, 256, 2


@cache
def count(
    mode: Mode,
    *,
    recomputed: bool = False,
    attention: str = "auto",
    dtype: Literal["fp32", "bf16"] = "bf16",
) -> tuple[list[Kernel], int]:
    """Kernels of a tiny step, and the operations that `step_flops` says run."""
    shapes = model_config("tiny", mode, torch.device("cpu"))
    language = replace(shapes.language, attention=attention)
    sketch = sketch_model(replace(shapes, language=language, dtype=dtype))
    batch = make_batch(sketch.model, ROWS, TEXT)
    kernels = count_step(sketch, batch, checkpointing=recomputed)
    rows, length = batch.input_ids.shape
    numbers = BatchNumbers(
        row_lengths=batch.row_lengths.tolist(), images=batch.num_images,
        targets=batch.num_targets, padded_rows=rows, padded_length=length,
        padded_images=len(batch.pixels), padded_targets=len(batch.targets),
    )  # fmt: skip
    return kernels, step_flops(model_numbers(sketch.model), numbers).hardware.total


def moved(kernels: list[Kernel], part: str, phase: str) -> int:
    return sum(k.bytes for k in kernels if k.part == part and k.phase == phase)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("mode", ["stage1", "lora", "full"])
def test_operations_are_those_that_step_flops_counts(mode: Mode, recomputed: bool) -> None:
    kernels, expected = count(mode, recomputed=recomputed)
    assert sum(kernel.flops for kernel in kernels) == expected
    assert any(kernel.phase == "recompute" for kernel in kernels) == recomputed


def test_operations_do_not_depend_on_the_type() -> None:
    kernels, expected = count("full", dtype="fp32")
    assert sum(kernel.flops for kernel in kernels) == expected


def test_each_part_of_a_full_step_has_the_operations_of_its_formula() -> None:
    kernels, _ = count("full")
    found: Counter[str] = Counter()
    for kernel in kernels:
        found[kernel.part] += kernel.flops
    tokens = ROWS * LENGTH
    assert found["mlp"] == 6 * tokens * 3 * HIDDEN * INNER * LAYERS
    projections = 6 * tokens * 4 * HIDDEN**2 * LAYERS
    scores = int(4 * HIDDEN * ROWS * (LENGTH * (LENGTH + 1) // 2) * 3.5 * LAYERS)
    assert found["attention"] == projections + scores
    assert found["norms"] == found["rotary"] == found["swiglu"] == found["optimizer"] == 0


def test_bytes_of_fused_kernels_are_those_of_their_formulas() -> None:
    kernels, _ = count("full")
    fused = fused_bytes(kernels, [k.part if k.part == "swiglu" else None for k in kernels])
    one = ROWS * LENGTH * INNER * 2 * LAYERS
    # silu(gate) x up: two read, one written; backward: three read, two written
    assert fused == {("swiglu", "forward"): 3 * one, ("swiglu", "backward"): 5 * one}
    groups = [k.owner if k.part == "norms" else None for k in kernels]
    norms: Counter[str] = Counter()
    for (_, phase), size in fused_bytes(kernels, groups).items():
        norms[phase] += size
    one, weight = ROWS * LENGTH * HIDDEN * 2, HIDDEN * 2
    count_of = 2 * LAYERS + 1
    assert norms["forward"] == count_of * (2 * one + weight)
    # a norm's input and gradient; what it gives to its input; but for the last norm, the gradient
    # beside it that autograd adds at once
    assert norms["backward"] == pytest.approx((4 * count_of - 1) * one, rel=0.02)
    assert sum(norms.values()) < moved(kernels, "norms", "forward")


def test_the_update_reads_and_writes_what_adamw_keeps() -> None:
    kernels, _ = count("full")
    shapes = model_config("tiny", "full", torch.device("cpu"))
    trained = sketch_model(shapes).parameters()
    numbers = sum(learning for _, learning in trained.values())
    groups = [k.owner if k.owner == "adamw" else None for k in kernels]
    (size,) = fused_bytes(kernels, groups).values()
    # weight, gradient and two moments in, weight and moments out; beside them counts of steps
    assert size == pytest.approx(7 * 4 * numbers, rel=1e-4)
    update = moved(kernels, "optimizer", "update")
    assert update > size + 16 * numbers


def test_fusing_takes_time_away_and_eager_attention_adds_some() -> None:
    card = Ceilings(1e12, 1e10)
    kernels, _ = count("lora")
    plain = floor_by_part(kernels, card)
    fused = floor_by_part(kernels, card, ALL)
    for part in ("norms", "rotary", "swiglu", "optimizer"):
        assert fused[part] < plain[part]
    assert fused["mlp"] == plain["mlp"]
    compiled = floor_by_part(kernels, card, ALL | {"compile"})
    assert sum(compiled.values()) < sum(fused.values())
    eager = floor_by_part(count("lora", attention="eager")[0], card)
    assert eager["attention"] > plain["attention"]


def test_a_kernel_takes_the_longer_of_its_operations_and_its_bytes() -> None:
    product = Kernel(
        name="mm", phase="forward", part="mlp", owner="a", flops=100, reads={1: 3}, writes={2: 2}
    )
    copy = Kernel(
        name="copy_", phase="forward", part="merge", owner="b", flops=0, reads={2: 4}, writes={3: 4}
    )
    found = floor_by_part([product, copy], Ceilings(flops=10.0, bytes=1.0))
    assert found == {"mlp": 10.0, "merge": 8.0}


def test_the_topic_adds_a_row_for_each_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        roofline, "add_row", lambda topic, row: harness.add_row(topic, row, tmp_path)
    )
    flags = ["--sizes", '["tiny"]', "--modes", '["stage1"]', "--micro_batch_size=2"]
    assert main(["roofline", *flags]) == 0
    lines = (tmp_path / "roofline.csv").read_text().splitlines()
    assert len(lines) == 1 + len(roofline.FUSED) + 2
