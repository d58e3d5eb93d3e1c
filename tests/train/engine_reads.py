"""What a whole step reads of the device: two workers, DeepSpeed's engine, families and stages."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lapilli.data.batches.collate import BatchShape, collate
from lapilli.model.config import LoraConfig, ModelConfig
from lapilli.model.vlm import build_model
from lapilli.train.config import RunConfig
from lapilli.train.device import prepare_process
from lapilli.train.engine import deepspeed_engine
from lapilli.train.steps.device_copy import SentStep
from lapilli.train.steps.optim import build_optimizer
from lapilli.train.steps.step import to_device
from lapilli.train.worker.setup import Setup
from lapilli.train.worker.taken_step import take_step
from tests.device_reads import Read, device_reads
from tests.model import twins
from tests.train.tiny import run_config

__all__ = ["Case", "Found", "cases", "read_worker", "sent_step"]

CPU = torch.device("cpu")
DECODERS = (
    "llama", "mistral", "phi", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "cohere",
    "granite",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model under a ZeRO stage."""

    tower: str
    decoder: str
    stage: int
    precision: str
    lora: bool = False


@dataclass(frozen=True)
class Found:
    """A read: in whose code, and in which function."""

    owner: str
    function: str
    operation: str


def cases(*, whole: bool) -> Iterator[Case]:
    """Every decoder, tower and ZeRO stage; `whole`: in every combination.

    They meet in tensors alone, so that otherwise each decoder is taken with one tower and stage.
    """
    towers = [*twins.TOWERS]
    for number, decoder in enumerate(DECODERS):
        for tower in towers if whole else [towers[number % len(towers)]]:
            for stage in (0, 1, 2, 3) if whole else [1 + number % 3]:
                yield Case(tower, decoder, stage, "bf16" if stage else "fp32")
    for stage in (0, 1, 2, 3):
        yield Case("clip", "llama", stage, "fp32", lora=True)


def _model(case: Case) -> ModelConfig:
    made = twins.config(case.tower, case.decoder)
    lora = LoraConfig(rank=2, alpha=4, dropout=0.1) if case.lora else None
    trainable: Any = ("projector", "language") if case.lora else made.trainable
    return replace(
        made, language=replace(made.language, attention="auto"), lora=lora, trainable=trainable
    )


def sent_step(
    step: int,
    images: Sequence[int],
    tokens: int,
    device: torch.device,
    side: int = twins.SIDE,
) -> SentStep:
    """A step of one worker: two micro-batches of samples with so many images, `side` px wide."""
    shape = BatchShape(2, (48,), tokens, target_sizes=(8, 16))
    samples = [
        [
            replace(one, input_ids=one.input_ids.clip(max=47), pixels=one.pixels[:, :side, :side])
            for one in twins.samples(step + micro, tuple(images))
        ]
        for micro in (0, 1)
    ]
    batches = [collate(some, shape, side) for some in samples]
    rows = [[[[np.array([2 * micro + row])] for row in (0, 1)] for micro in (0, 1)]]
    return SentStep(
        step=step, batches=batches, global_tokens=24, global_samples=8,
        sample_indices=np.arange(8), weights=[1.0, 1.0], rows=rows, placed=np.arange(8),
        slots=[np.arange(2), np.arange(2, 4)],
        on_device=[to_device(batch, device) for batch in batches],
    )  # fmt: skip


def _ready(case: Case, rank: int) -> Setup:
    config: RunConfig = run_config(
        _model(case), zero_stage=case.stage, precision=case.precision, global_batch_size=8,
        micro_batch_size=2,
    )  # fmt: skip
    prepare_process("cpu")
    model = build_model(config.model)
    optimizer = build_optimizer(model, config.optim, fused=True)  # as on a GPU
    engine = deepspeed_engine.initialize(
        model, optimizer, deepspeed_engine.deepspeed_settings(config)
    )
    feed: Any = SimpleNamespace(total_steps=9)
    state: Any = None  # nothing is saved
    return Setup(config, CPU, feed, engine, 0, state, rank, 2)


def read_worker(rank: int, folder: str, chosen: Sequence[Case], planted: bool) -> None:
    """Two steps of every case, with images and without; what was read is written to a file."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    found: list[dict[str, Any]] = []
    for case in chosen:
        ready = _ready(case, rank)
        if planted:
            ready.engine.module.projector.register_forward_hook(_ask)
        tokens = ready.engine.module.vision.num_tokens
        sent = [sent_step(step, [step % 2] * 2, tokens, CPU) for step in range(3)]
        take_step(ready, sent[0]).known()  # state that is made at the first step
        with device_reads() as reads:
            before = take_step(ready, sent[1])
            after = take_step(ready, sent[2])
            count = len(reads)
            before.known()
            after.known()
        told = [asdict(_found(read)) for read in reads]
        found.append({"case": asdict(case), "step": told[:count], "read": told[count:]})
    Path(f"{folder}/found-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _ask(module: Any, inputs: Any, output: torch.Tensor) -> None:
    del module, inputs
    output.sum().item()


def _found(read: Read) -> Found:
    place, _, function = read.where.rpartition(" ")
    path, _, line = place.rpartition(":")
    owners = ("deepspeed", "transformers", "peft", "lapilli", "tests")
    owner = next((name for name in owners if name in Path(path).parts), place)
    if function.startswith("<"):  # Python 3.11 has a frame for a comprehension
        function = _function_at(Path(path), int(line))
    return Found(owner, function, read.operation)


def _function_at(path: Path, line: int) -> str:
    """The innermost function that a line is in."""
    found = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.lineno <= line <= (node.end_lineno or 0)
    ]
    return max(found, key=lambda node: node.lineno).name
