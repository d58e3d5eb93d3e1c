"""Set up a worker: model, engine, data and checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lapilli.data.batches.collate import blank_batches
from lapilli.data.dataset.dataset import Dataset
from lapilli.data.versions import installed_versions
from lapilli.model.attention.backend import attention_kernel
from lapilli.model.auxiliary.target_loss import AuxInputs
from lapilli.model.config import KEEP_ALL, ActivationPolicy
from lapilli.model.deepspeed_internals import shape_of
from lapilli.model.parts.recomputation import apply_policy
from lapilli.model.parts.trainable import set_modes
from lapilli.train.checkpoint import save_load as checkpoint
from lapilli.train.checkpoint.find import Checkpoint, at_step, latest_checkpoint
from lapilli.train.checkpoint.frozen import FORM
from lapilli.train.checkpoint.init_from import Built
from lapilli.train.checkpoint.places import Places, find_places
from lapilli.train.checkpoint.store import fetch_agreed
from lapilli.train.config import RunConfig
from lapilli.train.device import Device, check_precision, prepare_process, use_tf32
from lapilli.train.engine import deepspeed_engine as engine
from lapilli.train.engine.communication import communication_line, communication_settings
from lapilli.train.engine.deepspeed_internals import restore_scale
from lapilli.train.errors import TrainError
from lapilli.train.gaudi import record_graphs, set_environment, step_marker
from lapilli.train.run_folder.checkpoint_state import CheckpointState
from lapilli.train.run_folder.dataset_files import training_data
from lapilli.train.run_folder.messages import note
from lapilli.train.run_folder.scratch import lies_in_store
from lapilli.train.steps.feed import Feed
from lapilli.train.steps.optim import build_optimizer
from lapilli.train.steps.step import DeviceBatch, to_device, warm_up
from lapilli.train.validation.sample_generations import Generations
from lapilli.train.validation.validation_loss import HeldOut, open_held_out
from lapilli.train.worker.compatibility import build_run, check_start, open_for
from lapilli.train.worker.node_cache import prepare_cache

__all__ = [
    "Setup",
    "setup",
]


@dataclass
class Setup:
    """What a worker has before its first step; `flush` ends a graph of Gaudi's lazy mode."""

    config: RunConfig
    device: torch.device
    feed: Feed
    engine: Any
    start: int
    state: CheckpointState
    rank: int
    world_size: int
    held_out: HeldOut | None = None
    generations: Generations | None = None
    flush: Callable[[], None] = lambda: None
    places: Places = field(default_factory=Places)

    @property
    def is_writer(self) -> bool:
        """Whether this worker writes metrics and messages, and finishes checkpoints."""
        return self.rank == 0


def setup(
    config: RunConfig, device: Device, *, rank: int, world_size: int,
    activations: ActivationPolicy = KEEP_ALL,
) -> Setup:  # fmt: skip
    """Build model, feed and engine, and load the newest checkpoint there is."""
    if device == "hpu":
        set_environment(config.hpu)
    torch_device = prepare_process(device)
    check_precision(device, config.precision)
    use_tf32(config.tf32)
    places = _arrive(config)
    built_on = build_run(config, engine.loading_of(config))
    model = built_on.model
    apply_policy(model, activations)
    set_modes(model)
    dataset = open_for(model, config)
    check_start(built_on.start, dataset)
    state = _state(built_on, dataset, config)
    found = _find_checkpoint(Path(config.output), state, rank)
    if found:
        checkpoint.load_weights(found, model)
    model.to(torch_device)
    held_out = open_held_out(config, dataset.image_tokens)
    feed = Feed(dataset, config, rank=rank, world_size=world_size, held_out=held_out)
    prepare_cache(feed, found.step if found else 0)
    optimizer = _build_optimizer(model, config, device)
    if device == "hpu" and config.hpu.graphs:
        record_graphs(model)
    hidden_size = shape_of(model.language.get_input_embeddings().weight)[1]
    communication = communication_settings(config, hidden_size, device)
    if rank == 0 and world_size > 1:
        note(Path(config.output), communication_line(communication))
    built = engine.initialize(model, optimizer, engine.deepspeed_settings(config, communication))
    if found:
        checkpoint.load_into(built, found)
        restore_scale(built, found.state.loss_scale)
    flush = step_marker(config.hpu, torch_device)
    if torch_device.type != "cpu":  # whose shapes cost nothing the first time
        warm_up(built, _blanks(feed, dataset.image_size, torch_device), flush)
    if rank == 0 and torch_device.type == "cuda":
        dtype = model.language.get_input_embeddings().weight.dtype
        kernel = attention_kernel(model.language, feed.shape.buckets[-1], dtype, torch_device)
        note(Path(config.output), f"attention: {kernel} on {torch.cuda.get_device_name()}")
    ready = Setup(
        config=config,
        device=torch_device,
        feed=feed,
        engine=built,
        start=found.step if found else 0,
        state=state,
        rank=rank,
        world_size=world_size,
        flush=flush,
        places=places,
    )
    if held_out and config.validation.every:
        ready.held_out = HeldOut(held_out, config, feed.shape, (rank, world_size))
    if held_out and config.validation.answers_every:
        ready.generations = Generations(held_out, config, rank)
    return ready


def _blanks(
    feed: Feed, image_size: int, device: torch.device
) -> Iterator[tuple[DeviceBatch, AuxInputs | None]]:
    """A batch of each shape with nothing in it, and as much of the targets."""
    for batch in blank_batches(feed.shape, image_size):
        yield to_device(batch, device), feed.blank_aux(batch, device)


def _build_optimizer(model: nn.Module, config: RunConfig, device: Device) -> torch.optim.Optimizer:
    """The update of the device it is computed on."""
    is_on_gpu = device == "cuda" and config.offload.to == "none"
    is_habana = device == "hpu" and config.hpu.optimizer == "FusedAdamW"
    return build_optimizer(model, config.optim, fused=is_on_gpu, habana=is_habana)


def _arrive(config: RunConfig) -> Places:
    """Find out who shares the run's folder; of a run in a store, bring its newest checkpoint.

    Raises:
        TrainError: Workers have folders of their own, and the run is in no store.
    """
    run = Path(config.output)
    places = find_places(run)
    if lies_in_store(config):
        fetch_agreed(run, config.checkpoint.upload, places)
    if places.is_shared:
        return places
    if not lies_in_store(config):
        raise TrainError(
            f"output: {run} is another folder for rank {places.leaders[1]} than for rank 0; choose "
            "one on a file system that all nodes share, or an address (s3://bucket/run)"
        )
    if config.checkpoint.archive_every:
        raise TrainError(
            "checkpoint.archive_every: a milestone is written from the parts of all workers, which "
            f"lie on {len(places.leaders)} nodes; set 0, and export from a checkpoint"
        )
    return places


def _state(built: Built, dataset: Dataset, config: RunConfig) -> CheckpointState:
    """What all checkpoints of the run say; step and files are added when one is saved."""
    start = built.start
    return CheckpointState(
        start=start.state.weights_id if start else "",
        dataset=dataset.manifest.fingerprint,
        data=training_data(dataset),
        frozen={"form": FORM, "weights": built.frozen},
        config=asdict(config),
        versions=installed_versions("lapilli", "torch", "deepspeed", "transformers"),
        files={},
    )


def _find_checkpoint(run: Path, state: CheckpointState, rank: int) -> Checkpoint | None:
    """The newest whole checkpoint, checked to be of this dataset and this start.

    Rank 0 decides for all: ranks that went on from different steps would wait for each other.
    """
    newest = latest_checkpoint(run) if rank == 0 else None
    steps = [newest.step if newest else -1]
    if dist.is_initialized():
        dist.broadcast_object_list(steps, src=0)
    found = newest or (at_step(run, steps[0]) if steps[0] >= 0 else None)
    for name in ("dataset", "start"):
        now = getattr(state, name)
        if found and (before := getattr(found.state, name)) != now:
            raise TrainError(
                f"{found.path}: was saved with another {name} (fingerprint "
                f"{before[:12]}, now {now[:12]}); choose another --output"
            )
    return found
