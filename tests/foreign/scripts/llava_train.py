"""LLaVA's own `train()`, unmodified, with notes taken from outside.

python llava_train.py NOTES.json ADAPTERS.pt|- [arguments of LLaVA's train]

Writes, for the process of `$RANK`, `NOTES.json` with: the samples of each micro-batch in the
sampler's order, loss and trained tokens of each micro-batch, rate and gradient norm of each step.
With ADAPTERS the first values of LoRA's adapters are taken from that file: LLaVA draws its own
before it seeds. The tower stays in fp32; without `--bf16` LLaVA casts it to fp16.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import BatchSampler

NOTES, ADAPTERS, *GIVEN = sys.argv[1:]


def wrapped(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Put `around(original, *arguments)` in a method's place."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *given, **named: around(original, *given, **named))


def with_adapters(original: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """A model with adapters whose first values are the file's."""
    made = original(*given, **named)
    values: dict[str, torch.Tensor] = torch.load(ADAPTERS)
    found = {n: p for n, p in made.named_parameters() if "lora_" in n}
    assert len(found) == len(values), (len(found), len(values))
    with torch.no_grad():
        for name, parameter in found.items():
            short = "layers." + name.partition(".layers.")[2].replace(".default.", ".")
            parameter.copy_(values[short])
    return made


def main() -> None:
    """Train and write the notes down."""
    sys.argv = ["train.py", *GIVEN]
    accelerate, peft = map(importlib.import_module, ("accelerate", "peft"))
    train = importlib.import_module("llava.train.train")
    trainer = importlib.import_module("llava.train.llava_trainer").LLaVATrainer
    tower = importlib.import_module("llava.model.multimodal_encoder.clip_encoder").CLIPVisionTower
    tower.to = lambda self, *given, **named: self
    sampled: list[list[int]] = []
    micro: list[dict[str, float]] = []
    norms: list[float] = []
    rates: list[float] = []

    def clipped(original: Callable[..., Any], *given: Any, **named: Any) -> Any:
        norm = original(*given, **named)
        norms.append(float(norm))
        return norm

    def dealt(original: Callable[..., Any], sampler: Any) -> Any:
        for batch in original(sampler):
            sampled.append([int(i) for i in batch])
            yield batch

    def stepped(original: Callable[..., Any], self: Any, model: Any, inputs: Any) -> Any:
        trained = int((inputs["labels"][:, 1:] != -100).sum())
        loss = original(self, model, inputs)
        micro.append(
            {"loss": float(loss) * self.args.gradient_accumulation_steps, "trained": trained}
        )
        return loss

    def updating(optimizer: torch.optim.Optimizer, given: Any, named: Any) -> None:
        del given, named
        rates.append(float(optimizer.param_groups[0]["lr"]))

    register_optimizer_step_pre_hook(updating)
    wrapped(accelerate.Accelerator, "clip_grad_norm_", clipped)
    wrapped(BatchSampler, "__iter__", dealt)
    wrapped(trainer, "training_step", stepped)
    if ADAPTERS != "-":
        wrapped(peft, "get_peft_model", with_adapters)
    train.train()
    found = {"sampled": sampled, "micro": micro, "norms": norms, "rates": rates}
    rank = int(os.environ.get("RANK", "0"))
    Path(NOTES).with_suffix(f".{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
