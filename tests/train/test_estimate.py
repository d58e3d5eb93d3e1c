"""Memory by ZeRO stage against the paper's own figures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch

from lapilli.data.batches.collate import Batch, BatchShape, collate
from lapilli.model.config import KEEP_ALL, ModelConfig, Part
from lapilli.model.vlm import build_model
from lapilli.train.driver.activation_memory import leanest
from lapilli.train.driver.fake_model import sketch_model
from lapilli.train.driver.memory_estimate import (
    RowSizes,
    estimate_run,
    sketch_run,
    state_bytes,
    time_micro_batch,
)
from lapilli.train.errors import TrainError
from lapilli.train.steps.step import to_device
from tests.train.tiny import IMAGE_SIZE, SHAPE, model_config, random_sample, run_config


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_papers_example_of_7_5_billion_parameters_on_64_devices(
    stage: Literal[0, 1, 2, 3], gigabytes: float
) -> None:
    found = state_bytes(7_500_000_000, 7_500_000_000, stage=stage, workers=64, precision="bf16")
    assert found.total / 1e9 == pytest.approx(gigabytes, abs=0.05)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_is_frozen_has_weights_alone(stage: Literal[0, 1, 2, 3]) -> None:
    found = state_bytes(1000, 0, stage=stage, workers=2, precision="fp32")
    assert (found.gradients, found.optimizer) == (0, 0)
    assert found.weights == (2000 if stage == 3 else 4000)


def test_plain_fp32_is_what_torchs_adamw_holds() -> None:
    layer = torch.nn.Linear(30, 20)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 30)).sum().backward()
    optimizer.step()
    moments = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if value.dim()  # the step count is a scalar
    )
    found = state_bytes(620, 620, stage=0, workers=1, precision="fp32")
    assert found.weights == found.gradients == sum(p.nbytes for p in layer.parameters())
    assert found.optimizer == moments


def test_timing_leaves_no_gradient_and_the_threads_as_they_were() -> None:
    model = build_model(model_config())
    samples = [random_sample("a", np.random.default_rng(0), images=1)]
    batch = to_device(collate(samples, SHAPE, IMAGE_SIZE), torch.device("cpu"))
    threads = torch.get_num_threads()
    assert time_micro_batch(model, batch) > 0
    assert torch.get_num_threads() == threads
    assert all(parameter.grad is None for parameter in model.parameters())


def really_kept(config: ModelConfig, batch: Batch) -> int:
    """Bytes that autograd keeps in a forward with real tensors, the weights left out."""
    model = build_model(config)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(saved: torch.Tensor) -> torch.Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        model(**to_device(batch, torch.device("cpu")).inputs)
    return sum(storage.nbytes() for place, storage in kept.items() if place not in weights)


@pytest.mark.parametrize("trainable", [("projector",), ("vision", "projector", "language")])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_kept_for_backward_is_what_autograd_keeps(
    trainable: tuple[Part, ...], dtype: Literal["fp32", "bf16"]
) -> None:
    config = replace(model_config(*trainable), dtype=dtype)
    batch = collate([], SHAPE, IMAGE_SIZE, with_images=True)
    found = sketch_model(config).activations(batch)
    assert found.held(KEEP_ALL) == pytest.approx(really_kept(config, batch), rel=0.01)
    assert found.peak(leanest(found, offload=False)) < found.held(KEEP_ALL)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("window", [None, 16])
def test_packs_are_estimated_with_all_their_images_and_their_masks(
    dtype: Literal["fp32", "bf16"], window: int | None
) -> None:
    model = replace(model_config("vision", "projector", "language"), dtype=dtype)
    settings: dict[str, Any] = {**model.language.settings, "max_position_embeddings": 256}
    if window:  # every second layer's, so that there are two masks
        layers = ["sliding_attention", "full_attention"]
        settings |= {"sliding_window": window, "layer_types": layers, "use_sliding_window": True}
    family = "qwen2" if window else "llama"
    model = replace(model, language=replace(model.language, model_type=family, settings=settings))
    shape = BatchShape(
        rows=2, buckets=(256,), image_tokens=4, target_sizes=(40,), image_sizes=(6,),
        has_trees=True,
    )  # fmt: skip
    batch = collate([], shape, IMAGE_SIZE, with_images=True)
    assert len(batch.pixels) == 6
    config = run_config(model, precision=dtype, share_images=True, pack=True)
    rows = RowSizes(length=256, trained=20, images=3)
    found = estimate_run(config, sketch_run(config), rows).activations(2).held(KEEP_ALL)
    assert found == pytest.approx(really_kept(model, batch), rel=0.01)
    mask = 2 * 256 * 256 * (4 if dtype == "fp32" else 2)
    assert mask > 0.1 * found  # one more or less would be seen
    on_gpu = estimate_run(config, sketch_run(config), rows, device="cuda").activations(2)
    held = mask * 2 - mask // 2 if window else mask  # a window's is there without trees, once
    assert found - on_gpu.held(KEEP_ALL) == held


def test_a_layer_more_costs_a_recomputing_run_one_input() -> None:
    batch = collate([], SHAPE, IMAGE_SIZE, with_images=True)
    sizes: list[list[int]] = []
    for layers in (2, 3):
        config = model_config()
        config.language.settings["num_hidden_layers"] = layers
        found = sketch_model(config).activations(batch)
        sizes.append([found.peak(leanest(found, offload=offload)) for offload in (False, True)])
    rows, length = batch.input_ids.shape
    (two, two_offloaded), (three, three_offloaded) = sizes
    assert three - two == rows * length * 24 * 4
    assert two_offloaded == three_offloaded < two


def test_a_sketch_has_the_parameters_of_the_model() -> None:
    config = run_config(model_config())
    found = estimate_run(config, sketch_run(config), RowSizes(32)).parameters
    for name, part in build_model(config.model).named_children():
        sizes = [p.numel() for p in part.parameters()]
        learning = [p.numel() for p in part.parameters() if p.requires_grad]
        assert found[name] == (sum(sizes), sum(learning))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"global_batch_size": 12, "micro_batch_size": 4},
            "= 8; 8 or 16 would fit, or a micro_batch_size of 1, 2",
        ),
        (
            {"global_batch_size": 5, "micro_batch_size": 0},
            r"5 is no multiple .* 2 x 1 = 2; 4 or 6 would fit$",
        ),
        (
            {"micro_batch_size": 0, "loss_reduction": "micro_batch_mean"},
            "micro_batch_size: 0 with sampler llava or loss_reduction micro_batch_mean",
        ),
    ],
)
def test_a_batch_that_cannot_be_cut_names_numbers_that_can(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainError, match=message):
        run_config(model_config(), **values)


def test_rows_of_one_length_add_up() -> None:
    sketch = sketch_model(model_config())
    kept = [
        sketch.activations(
            collate([], BatchShape(n, (32,), 4, 8), IMAGE_SIZE, with_images=True)
        ).held(KEEP_ALL)
        for n in (1, 2, 5)
    ]
    assert kept[2] - kept[0] == pytest.approx(4 * (kept[1] - kept[0]), rel=0.01)
