"""Checkpoints as safetensors and JSON tell them, and small ones that were never trained."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from lapilli.train.checkpoint.save_load import write_checkpoint
from lapilli.train.checkpoint.staging import StagedFragment
from lapilli.train.run_folder.checkpoint_state import CheckpointState

__all__ = ["parts", "pieces", "saved_tensors", "saved_weights", "write_small"]


def parts(checkpoint: Path) -> list[Path]:
    """A checkpoint's files of fragments."""
    return sorted(checkpoint.glob("part-*.safetensors"))


def saved_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every weight and moment by `NAME/KIND`, put together of the fragments of all parts."""
    shapes = json.loads((checkpoint / "state.json").read_text())["shapes"]
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    found = {
        f"{n}/{k}": torch.full((math.prod(s),), torch.nan) for n, s in shapes.items() for k in kinds
    }
    for part in parts(checkpoint):
        for name, numbers in load_file(part).items():
            key, _, start = name.rpartition("@")
            place = found[key][int(start) : int(start) + len(numbers)]
            assert len(place) == len(numbers), name
            assert place.isnan().all(), f"{name} is there twice"
            place.copy_(numbers)
    assert not any(value.isnan().any() for value in found.values())
    return {key: v.view(shapes[key.rpartition("/")[0]]) for key, v in found.items()}


def saved_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights alone, by name."""
    found = saved_tensors(checkpoint)
    return {k.removesuffix("/weight"): v for k, v in found.items() if k.endswith("/weight")}


def pieces(weights: Mapping[str, torch.Tensor]) -> list[StagedFragment]:
    """Weights with moments that follow from them."""
    found = list[StagedFragment]()
    for name, value in weights.items():
        flat = value.detach().float().reshape(-1).clone()
        for kind, numbers in (("weight", flat), ("exp_avg", -flat), ("exp_avg_sq", flat.square())):
            found.append(StagedFragment(f"{name}/{kind}", 0, numbers))
    return found


def write_small(
    run: Path, weights: Mapping[str, torch.Tensor], state: CheckpointState, keep: int = 100
) -> None:
    """A run's checkpoint with these weights, as a worker that is alone writes it."""
    shapes = {name: [*value.shape] for name, value in weights.items()}
    write_checkpoint(pieces(weights), run, replace(state, shapes=shapes), keep=keep)
