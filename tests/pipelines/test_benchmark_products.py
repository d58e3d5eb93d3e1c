"""The floor of a step is exactly the products that torch's profiler saw in it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from pipelines.benchmarks.sides.products import PRODUCTS, Recorder, product_seconds


def products_of(step: Callable[[], None]) -> dict[str, int]:
    """Products by the profiler: only those that no other product called."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    return {event.key: event.count for event in profile.key_averages() if event.key in PRODUCTS}


def make_step() -> Callable[[], None]:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(32, 96), nn.SiLU(), nn.Linear(96, 32, bias=False))
    rows = torch.randn(4, 16, 32)

    def step() -> None:
        out = layers(rows)
        heads = out.unflatten(-1, (2, 16)).transpose(1, 2)
        scaled_dot_product_attention(heads, heads, heads, is_causal=True).sum().backward()
        layers.zero_grad()

    return step


def test_recorded_products_are_the_profilers() -> None:
    step = make_step()
    recorder = Recorder()
    with recorder:
        step()

    def replay() -> None:
        for call in recorder.calls:
            call()

    expected = products_of(step)
    assert expected["aten::mm"] == 3 + 1  # backward of two layers, forward of the one without bias
    assert products_of(replay) == expected


def test_operands_are_copies_laid_out_alike() -> None:
    left, right = torch.randn(3, 5), torch.randn(4, 5)
    recorder = Recorder()
    with recorder:
        product = left @ right.T
    left.zero_()
    replayed = recorder.calls[0]()
    assert isinstance(replayed, torch.Tensor)
    assert torch.equal(replayed, product)


def test_products_take_time() -> None:
    assert product_seconds(make_step(), rounds=2) > 0
