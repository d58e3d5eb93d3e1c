"""A checkpoint's cost beside DeepSpeed's own: stall, wall time, host memory, bytes.

Workers on a CPU hold weights, fp32 weights and moments of square layers, as ZeRO divides them, and
save by turns. The floor is one plain copy of a worker's share, made by all workers at once. Memory
is what a worker has in anonymous pages above what it had before, sampled while it saves.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn

from lapilli.model.config import LanguageConfig, ModelConfig, VisionConfig
from lapilli.model.deepspeed_internals import shape_of
from lapilli.train.checkpoint import save_load
from lapilli.train.checkpoint.find import latest_checkpoint
from lapilli.train.checkpoint.layout import folder_bytes
from lapilli.train.config import OptimConfig, RunConfig
from lapilli.train.device import prepare_process
from lapilli.train.engine import deepspeed_engine
from lapilli.train.engine.deepspeed_internals import MOMENTS, inner_optimizer, optimized_tensors
from lapilli.train.engine.fragments import checkpoint_share, held_fragments
from lapilli.train.run_folder.checkpoint_state import CheckpointState
from lapilli.train.steps.optim import build_optimizer
from pipelines.benchmarks.harness import provenance, publish
from pipelines.cli.command import parse

__all__ = ["CheckpointCost", "Side", "Stopwatch", "main", "measure", "ours"]

WIDTH = 2048
TARGET = 2**27  # numbers that a plain copy has room for, far above any cache
SAMPLED = 0.002  # seconds between two looks at the memory
SHOWN = {
    "way": "way", "stage": "stage", "workers": "workers", "stall, s": "stall_s",
    "of a copy": "stall_of_copy", "wall, s": "wall_s", "added, MB": "added_mb",
    "of the share": "added_of_share", "written, MB": "written_mb", "restored, s": "restore_s",
    "added then, MB": "restore_added_mb",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CheckpointCost:
    """What is saved.

    Attributes:
        parameters: How many learn, rounded up to whole layers.
        stage: DeepSpeed's ZeRO stage.
        workers: Processes on this machine.
        precision: Of the weights that are computed with; stage 0 takes fp32.
        rounds: How often each way saves; told are medians, of memory the most.
        folder: Where it is written; empty for the temporary folder.
        save: Add rows to `results/checkpoint.csv`.
    """

    parameters: int = 500_000_000
    stage: Literal[0, 1, 2, 3] = 3
    workers: int = 2
    precision: Literal["fp32", "bf16"] = "bf16"
    rounds: int = 3
    folder: str = ""
    save: bool = True


class Layers(nn.Module):
    """Square layers, each with a number by itself that cannot be divided among workers."""

    config = ModelConfig(vision=VisionConfig(), language=LanguageConfig(), trainable=("language",))

    def __init__(self, parameters: int, dtype: torch.dtype) -> None:
        super().__init__()
        count = math.ceil(parameters / (WIDTH * WIDTH + WIDTH + 1))
        self.language = nn.ModuleList()
        for _ in range(count):
            layer = nn.Linear(WIDTH, WIDTH, dtype=dtype)
            layer.register_parameter("scale", nn.Parameter(torch.ones(1, dtype=dtype)))
            self.language.append(layer)


class Stopwatch:
    """Seconds and anonymous memory of a span."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.added = 0

    @contextmanager
    def running(self) -> Generator[None]:
        """Measure what is inside; all workers begin together."""
        before, most, done = _anonymous(), 0, threading.Event()

        def look() -> None:
            nonlocal most
            while not done.wait(SAMPLED):
                most = max(most, _anonymous())

        looker = threading.Thread(target=look)
        dist.barrier()
        looker.start()
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds = time.perf_counter() - started
            done.set()
            looker.join()
            self.added = max(0, most - before)


def _anonymous() -> int:
    with Path("/proc/self/status").open() as file:
        return 1024 * int(next(line for line in file if line.startswith("RssAnon")).split()[1])


Side = Callable[[Any, Path, int], tuple[Callable[[], None], Callable[[], None]]]


def ours(engine: Any, run: Path, step: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """What begins a save, and what waits for it."""
    if not hasattr(engine, "checkpoint_writer"):
        engine.checkpoint_writer = save_load.Writer()
        engine.checkpoint_writer.reserve(engine)
    writer = engine.checkpoint_writer
    state = CheckpointState(files={})

    def begin() -> None:
        save_load.save(engine, run, step, state, keep=1, writer=writer)

    return begin, writer.wait


def deepspeeds(engine: Any, run: Path, step: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """DeepSpeed's own checkpoint."""

    def begin() -> None:
        engine.save_checkpoint(str(run), tag=f"step-{step}")

    return begin, lambda: None


def restore_ours(engine: Any, run: Path) -> None:
    """Fp32 weights, moments and steps."""
    found = latest_checkpoint(run)
    assert found is not None
    save_load.load_into(engine, found)


def restore_deepspeeds(engine: Any, run: Path) -> None:
    """The same, and the weights that are computed with."""
    engine.load_checkpoint(str(run))


SIDES: dict[str, tuple[Side, Callable[[Any, Path], None]]] = {
    "lapilli": (ours, restore_ours),
    "DeepSpeed": (deepspeeds, restore_deepspeeds),
}


def main(argv: Sequence[str]) -> int:
    """Measure, tell, and add a row for each way."""
    config = parse(CheckpointCost, argv, "A checkpoint beside DeepSpeed's own.")
    head = provenance(("torch", "deepspeed"), "checkpoint", argv)
    rows = measure(config, SIDES)
    publish("checkpoint", head, rows, SHOWN, title="a checkpoint", save=config.save)
    return 0


def measure(config: CheckpointCost, sides: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each way."""
    with tempfile.TemporaryDirectory(dir=config.folder or None) as folder:
        spawn(_work, (config, folder, [*sides]), nprocs=config.workers)
        ranks = [
            torch.load(f"{folder}/rank-{rank}.pt", weights_only=True)
            for rank in range(config.workers)
        ]
    return [_row(config, name, [found[name] for found in ranks]) for name in sides]


def _row(config: CheckpointCost, name: str, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the slowest rank, and of the one that needs the most memory."""
    rounds = range(config.rounds)

    def slowest(key: str) -> float:
        return statistics.median(max(rank[key][i] for rank in ranks) for i in rounds)

    share = checkpoint_share(ranks[0]["parameters"], config.workers)
    added = max(max(rank["added"]) for rank in ranks)
    stall, copy = slowest("stall"), slowest("copy")
    return {
        "way": name, "parameters": ranks[0]["parameters"], "stage": config.stage,
        "workers": config.workers, "precision": config.precision, "share_mb": round(share / 1e6),
        "copy_s": round(copy, 3), "stall_s": round(stall, 3),
        "first_stall_s": round(max(rank["stall"][0] for rank in ranks), 3),
        "stall_of_copy": round(stall / copy, 2), "wall_s": round(slowest("wall"), 2),
        "added_mb": round(added / 1e6), "added_of_share": round(added / share, 3),
        "written_mb": round(ranks[0]["written"] / 1e6),
        "restore_s": round(max(rank["restore"] for rank in ranks), 2),
        "restore_added_mb": round(max(rank["restore_added"] for rank in ranks) / 1e6),
    }  # fmt: skip


def _work(rank: int, config: CheckpointCost, folder: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(config.workers),
        LOCAL_WORLD_SIZE=str(config.workers),
    )  # fmt: skip
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=config.workers)
    found = measure_rank(config, Path(folder), {name: SIDES[name] for name in names})
    torch.save(found, f"{folder}/rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def make_engine(config: CheckpointCost) -> Any:
    """An engine with moments that are not zero, so that they lie in memory."""
    prepare_process("cpu")
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    model = Layers(config.parameters, dtype)
    run = RunConfig(
        dataset="", output="", view="", model=Layers.config, zero_stage=config.stage,
        precision=config.precision, num_workers=config.workers, global_batch_size=config.workers,
        micro_batch_size=1,
    )  # fmt: skip
    settings = deepspeed_engine.deepspeed_settings(run)
    settings["zero_optimization"] |= {
        "stage3_param_persistence_threshold": 0,
        "reduce_bucket_size": WIDTH * WIDTH,  # no gradient is computed here
    }
    engine = deepspeed_engine.initialize(model, build_optimizer(model, OptimConfig()), settings)
    for tensor in optimized_tensors(engine):
        for moment in MOMENTS:
            inner_optimizer(engine).state[tensor][moment].fill_(0.5)
    return engine


def measure_rank(
    config: CheckpointCost, folder: Path, sides: dict[str, tuple[Any, Any]]
) -> dict[str, Any]:
    """What this rank sees of each way."""
    engine = make_engine(config)
    numbers = sum(math.prod(shape_of(p)) for p in engine.module.parameters())
    copies = [_copy(engine) for _ in range(config.rounds)]
    results: dict[str, Any] = {}
    for name, (side, restore) in sides.items():
        seen: dict[str, Any] = {
            "stall": [], "wall": [], "added": [], "copy": copies, "parameters": numbers,
        }  # fmt: skip
        run = folder / name
        for step in range(1, config.rounds + 1):
            watch = Stopwatch()
            with watch.running():
                begin, wait = side(engine, run, step)  # which takes its memory before the first
                dist.barrier()
                started = time.perf_counter()
                begin()
                seen["stall"].append(time.perf_counter() - started)
                wait()
                seen["wall"].append(time.perf_counter() - started)
            seen["added"].append(watch.added)
            dist.barrier()
            if dist.get_rank() == 0:
                seen["written"] = _newest_bytes(run)
            dist.barrier()
        watch = Stopwatch()
        with watch.running():
            restore(engine, run)
        seen |= {"restore": watch.seconds, "restore_added": watch.added}
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(run)
        results[name] = seen
    return results


def _copy(engine: Any) -> float:
    """Seconds of one plain copy of this worker's share to memory that it has touched before.

    Watched as a save is: the watching thread takes time of the same cores.
    """
    fragments = [one.get() for one in held_fragments(engine, divided=True)]
    target = torch.zeros(max(TARGET, *map(len, fragments)))
    target.fill_(1.0)
    with Stopwatch().running():
        dist.barrier()
        started, used = time.perf_counter(), 0
        for one in fragments:
            used = 0 if used + len(one) > len(target) else used
            target[used : used + len(one)].copy_(one)
            used += len(one)
        return time.perf_counter() - started


def _newest_bytes(run: Path) -> int:
    """Bytes of the newest checkpoint; older ones of DeepSpeed's are removed."""
    *older, newest = sorted(
        (path for path in [*run.glob("step-*"), *run.glob("checkpoints/step-*")]),
        key=lambda path: path.stat().st_mtime,
    )
    for path in older:
        shutil.rmtree(path)
    return folder_bytes(newest)
