"""Check settings, data, model, devices, disk and memory before a run starts."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lapilli.data.dataset.dataset import Dataset
from lapilli.data.dataset.shard_cache import dataset_folder
from lapilli.data.dataset.targets import require_target
from lapilli.data.shards.manifest import read_manifest
from lapilli.data.text.export_template import export_obstacle
from lapilli.model.attention.choice import Attention, choose_attention
from lapilli.model.attention.trees import check_trees
from lapilli.model.kernels.choice import KernelChoice, choose_kernels
from lapilli.model.parts.language import language_settings
from lapilli.model.parts.pretrained import one_line
from lapilli.model.parts.quantized import Quantization, packed_numbers
from lapilli.model.parts.trainable import parameter_counts
from lapilli.model.vlm import Outline, VisionLanguageModel, read_outline
from lapilli.train.checkpoint import save_load as checkpoint
from lapilli.train.checkpoint.at_hand import local_model
from lapilli.train.checkpoint.find import Checkpoint, at_step, require_layout
from lapilli.train.checkpoint.store import (
    newest_checkpoint,
)
from lapilli.train.config import RunConfig
from lapilli.train.device import (
    Device,
    check_tf32,
)
from lapilli.train.driver.context_length import check_context
from lapilli.train.driver.devices import find_device, memory_of
from lapilli.train.driver.fake_model import sketch_model
from lapilli.train.driver.memory_estimate import (
    StateBytes,
    estimate_run,
    row_sizes,
    sketch_run,
    state_bytes,
    time_micro_batch,
)
from lapilli.train.driver.memory_policy import MemoryPolicy, choose_memory, memory_budget
from lapilli.train.driver.same_run import (
    bring_run,
    changed_length,
    check_config,
    check_length,
    fetch_newer,
    with_absolute_paths,
)
from lapilli.train.errors import TrainError
from lapilli.train.gaudi import check_stage, hpu_environment, ignored_line
from lapilli.train.run_folder.dataset_files import keep_data
from lapilli.train.run_folder.names import STATE
from lapilli.train.run_folder.scratch import lies_in_store
from lapilli.train.run_folder.settings import (
    RunInfo,
    read_run_info,
)
from lapilli.train.steps.feed import Feed
from lapilli.train.steps.rows import EpochPlans, PlannedRows, planned_rows
from lapilli.train.steps.step import to_device
from lapilli.train.validation.sample_generations import choose_questions
from lapilli.train.validation.validation_loss import check_same_tokenizer, open_held_out
from lapilli.train.worker.compatibility import (
    build_start,
    check_model,
    check_start,
    find_start,
    open_for,
)

__all__ = [
    "Preflight",
    "finished_steps",
    "preflight",
]


MEASURED = 100_000_000  # a model with fewer parameters is built and timed here before it starts


@dataclass(frozen=True)
class Preflight:
    """The results of all checks before a run starts.

    Attributes:
        config: The run's settings, its local paths absolute: workers have folders of their own.
        total_steps: Optimizer steps of the run.
        start: Step at which it continues.
        samples: Samples of the dataset that are used.
        too_long: Samples left out because they exceed `max_length`.
        parameters: Parameters by part: total and trained.
        memory: What a worker holds for each part; activations come on top.
        step_seconds: Forward and backward of an optimizer step, measured on one core of this
            machine; None where workers compute on something else.
        device: What the workers compute on.
        image_tokens: Tokens an image takes in the sequence.
        attention: The language model's attention implementation.
        num_cut: Samples whose text is cut at `max_length`.
        kernels: What computes merge, layers and loss on the device.
        memory_policy: What is recomputed and offloaded so that a worker fits in its memory.
        environment: Variables that workers on Gaudi are started with.
    """

    config: RunConfig
    total_steps: int
    start: int
    samples: int
    too_long: int
    parameters: dict[str, tuple[int, int]]
    memory: dict[str, StateBytes]
    step_seconds: float | None
    device: Device
    image_tokens: int
    attention: Attention
    num_cut: int = 0
    kernels: KernelChoice | None = None
    memory_policy: MemoryPolicy = field(default_factory=MemoryPolicy)
    environment: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def is_done(self) -> bool:
        """Whether an earlier run is complete."""
        return self.start >= self.total_steps

    def info(self) -> RunInfo:
        """The part that is stored in the run's folder."""
        policy = self.memory_policy
        known: dict[str, Any] = asdict(self)
        known |= {"activations": policy.activations, "memory_note": policy.note}
        return RunInfo(**{one.name: known[one.name] for one in fields(RunInfo)})


def _check_loggers(config: RunConfig) -> None:
    for name in config.loggers:
        if importlib.util.find_spec(name) is None:
            raise TrainError(
                f"loggers: {name} is not installed; pip install 'lapilli[{name}]', or leave it out"
            )


def _shared_note(plans: EpochPlans) -> str:
    """How many samples can share a row; none is a template or data that puts images last."""
    tokens = plans.shared_tokens
    shared, samples = int((tokens > 0).sum()), len(tokens)
    line = f"share_images: {shared:,} of {samples:,} samples begin like another one"
    return line if shared else f"{line}; nothing is shared, see the template and share_images"


def _dropout_note(model: nn.Module) -> str:
    """What dropout does to what samples share; empty where there is none."""
    language = model.get_submodule("language")
    rates = [float(one.p) for one in language.modules() if isinstance(one, nn.Dropout)]
    rates.append(float(getattr(language.config, "attention_dropout", None) or 0.0))
    if not max(rates):
        return ""
    return (
        f"share_images: dropout ({max(rates):g}) is drawn once for what samples share, which alone "
        "would draw each their own; set model.lora.dropout 0 for the same gradient"
    )


def _state_by_part(
    config: RunConfig, model: nn.Module, parameters: dict[str, tuple[int, int]]
) -> dict[str, StateBytes]:
    """What a worker holds of each part."""
    return {
        name: state_bytes(
            *parameters[name],
            stage=config.zero_stage,
            workers=config.num_workers,
            precision=config.precision,
            offload=config.offload.to,
            packed=packed_numbers(part),
            how=Quantization.of(config.model.language),
        )
        for name, part in model.named_children()
    }


def _choose_kernels(config: RunConfig, family: str, device: Device) -> KernelChoice:
    if config.model.compile != "none" and config.zero_stage == 3:
        raise TrainError(
            f"model.compile: {config.model.compile} with zero_stage 3, whose hooks fetch weights "
            "inside the layers that are compiled; set zero_stage 2 or model.compile: none"
        )
    return choose_kernels(config.model, family, device)


def preflight(config: RunConfig, on_note: Callable[[str], None] = lambda line: None) -> Preflight:
    """Check everything that can be checked before workers start; launcher `ray` needs a Ray.

    A newer checkpoint that the run has at `checkpoint.upload` is fetched; `on_note` is called with
    a line.

    Raises:
        DataError, ModelError, TrainError: What does not fit, and the remedy.
    """
    _check_loggers(config)
    config = with_absolute_paths(config)
    device = find_device(config)
    _check_device(config, device, on_note)
    bring_run(config)
    check_config(Path(config.output), config)
    # No weight is read before dataset, view and sizes are known to fit.
    outline = read_outline(local_model(config.model))
    opened = _open_datasets(outline, config, on_note) if outline else None
    language = language_settings(local_model(config.model).language)
    kernels = _choose_kernels(config, str(language.model_type), device)
    attention = choose_attention(config.model.language.attention, language)
    if config.shares_rows:
        check_trees(attention.name)
    model, start_weights = _look_at(config)
    dataset, held_out = opened or _open_datasets(model, config, on_note)
    check_model(model, dataset)
    check_start(start_weights, dataset, on_note)
    check_context(model, config, dataset, held_out, on_note)
    plans = EpochPlans(dataset, config)
    planned = planned_rows(plans.sampled, dataset)
    rows = row_sizes(config, planned, dataset)
    config, policy = choose_memory(
        config,
        device,
        memory_budget(config, device, partial(memory_of, config, on_note=on_note)),
        lambda changed: estimate_run(changed, sketch_run(changed), rows, device=device),
    )
    feed = Feed(
        dataset, config, rank=0, world_size=config.num_workers, held_out=held_out, plans=plans
    )
    _note_rows(config, plans, planned, model, on_note)
    _check_disk(config, model, feed.total_steps)
    start = _goes_on_at(config, dataset.manifest.fingerprint, feed.total_steps, on_note)
    parameters = parameter_counts(model)
    is_small = sum(total for total, _ in parameters.values()) < MEASURED
    step_seconds = None
    if device == "cpu" and is_small and start < feed.total_steps:
        step_seconds = _time_step(model, feed)
    return Preflight(
        config=config, total_steps=feed.total_steps, start=start, samples=len(dataset),
        too_long=dataset.too_long, parameters=parameters, device=device,
        memory=_state_by_part(config, model, parameters),
        step_seconds=step_seconds, image_tokens=dataset.image_tokens, attention=attention,
        num_cut=dataset.num_cut, kernels=kernels, memory_policy=policy,
        environment=hpu_environment(config.hpu) if device == "hpu" else {},
    )  # fmt: skip


def _check_device(config: RunConfig, device: Device, on_note: Callable[[str], None]) -> None:
    """What the settings ask for and the device has not; a line for what it does not use."""
    check_tf32(device, config.tf32)
    check_stage(config, device)
    if line := ignored_line(config.hpu, device):
        on_note(line)


def _note_rows(
    config: RunConfig, plans: EpochPlans, planned: PlannedRows, model: nn.Module,
    on_note: Callable[[str], None],
) -> None:  # fmt: skip
    """Say what rows of several samples hold, and what differs from rows of one."""
    if config.share_images:
        on_note(_shared_note(plans))
        if note := _dropout_note(model):
            on_note(note)
    if config.shares_rows:
        on_note(planned.note)
        if note := planned.padding_note(config.micro_batch_size, config.num_workers):
            on_note(note)


def _check_disk(config: RunConfig, model: nn.Module, steps: int) -> None:
    """Room for the checkpoints to come; of a run in a store each worker's part is on its node."""
    if lies_in_store(config):
        return
    saved = config.checkpoint
    kept = saved.keep_last + bool(saved.upload)  # one is being copied
    archived = steps // saved.archive_every if saved.archive_every else 0
    checkpoint.check_disk(Path(config.output), model, kept, archived)


def _open_datasets(
    model: VisionLanguageModel | Outline, config: RunConfig, on_note: Callable[[str], None]
) -> tuple[Dataset, Dataset | None]:
    """The run's dataset and the held-out one, checked to fit the model."""
    dataset = open_for(model, config, on_note)
    # what the run keeps is what the dataset was made with, or said now
    if obstacle := export_obstacle(dataset.template, dataset.tokenizer):
        raise TrainError(f"dataset: {obstacle}")
    if held_out := open_held_out(config, dataset.image_tokens):
        check_model(model, held_out)
        tasks = dict.fromkeys(task for task, _ in config.model.aux.heads)
        check_same_tokenizer(dataset, held_out, tasks)
        for task in tasks if held_out.has_images.any() else ():
            require_target(held_out.manifest, held_out.path, task)
        if config.validation.answers_every:
            choose_questions(held_out, config.validation.answers)
    return dataset, held_out


def _look_at(config: RunConfig) -> tuple[VisionLanguageModel, Checkpoint | None]:
    """The model to check a run against, and the checkpoint of the run it starts from.

    Only a model that is small enough to be timed here is built: of the others shapes are known, at
    any ZeRO stage, and the workers find whether the weights of a start fit.
    """
    sketch = sketch_model(config.model)
    if sum(total for total, _ in sketch.parameters().values()) >= MEASURED:
        return sketch.model, find_start(config)
    return build_start(config)


def _goes_on_at(config: RunConfig, dataset: str, total: int, on_note: Callable[[str], None]) -> int:
    """The step to resume from; downloads a newer checkpoint from the run's copy."""
    found = newest_checkpoint(config)
    _check_dataset(found, dataset)
    start = found.step if found else 0
    if config.checkpoint.upload and not lies_in_store(config):
        start = fetch_newer(config, start, on_note)
        found = at_step(Path(config.output), start) if start else None
    if found:
        require_layout(found)
        before = found.state.settings(found.path / STATE)
        check_length(before, config, start, total, on_note)
    return start


def _time_step(model: VisionLanguageModel, feed: Feed) -> float:
    """Forward and backward of the step in the middle of the run: neither longest nor shortest."""
    middle = feed.make(feed.total_steps // 2)
    batch = to_device(middle.batches[0], torch.device("cpu"))
    parts = (feed.config.model.vision, feed.config.model.language)
    if all(part.pretrained for part in parts):
        return time_micro_batch(model, batch) * len(middle.batches)
    with one_line("model: a batch cannot be computed with these settings"):
        return time_micro_batch(model, batch) * len(middle.batches)


def finished_steps(config: RunConfig) -> int | None:
    """Steps of the run, if an earlier run with the same settings and data is complete.

    Needs neither Ray nor the model. One from before runs kept what they need of their dataset gets
    it.

    Raises:
        DataError, TrainError: The dataset cannot be read or is another, or the folder belongs to
            other settings.
    """
    config = with_absolute_paths(config)
    run = Path(config.output)
    bring_run(config)
    check_config(run, config)
    found = newest_checkpoint(config)
    info = read_run_info(run)
    if found is None or info is None:
        return None
    if changed_length(found.state.settings(found.path / STATE), config):
        return None  # there may be more to do
    total = info.total_steps
    if found.step < total:
        return None
    dataset = dataset_folder(config.dataset, config.cache.folder)
    _check_dataset(found, read_manifest(dataset).fingerprint)
    keep_data(run, dataset, config.view, anew=False)
    return total


def _check_dataset(found: Checkpoint | None, fingerprint: str) -> None:
    """Require the dataset that the run was started with."""
    if found and (before := found.state.dataset) != fingerprint:
        raise TrainError(
            f"{found.path}: was saved with another dataset (fingerprint "
            f"{before[:12]}, now {fingerprint[:12]}); choose another --output"
        )
