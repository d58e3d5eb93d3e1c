"""What a worker does: set up, then step after step to the end, saving on the way."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lapilli.data.batches.collate import blank_batches
from lapilli.data.dataset.dataset import Dataset, open_dataset
from lapilli.data.errors import DataError
from lapilli.data.text.encode import load_tokenizer, tokenizer_facts
from lapilli.data.text.tokenizer_files import has_vocabulary, tokenizer_folder
from lapilli.model.parts.pretrained import Loading, whole
from lapilli.model.parts.trainable import GROUPS, set_modes
from lapilli.model.vlm import Outline, VisionLanguageModel
from lapilli.train.checkpoint import save_load as checkpoint
from lapilli.train.checkpoint.frozen import FORM, check_frozen
from lapilli.train.checkpoint.init_from import Built, build_on, find_chain, recorded
from lapilli.train.checkpoint.layout import tidy
from lapilli.train.checkpoint.token_ids import extends, keeps_ids
from lapilli.train.checkpoint.upload import Uploads
from lapilli.train.config import RunConfig
from lapilli.train.device import Device, check_precision, peak_memory, prepare_process
from lapilli.train.engine import deepspeed_engine as engine
from lapilli.train.errors import TrainError
from lapilli.train.health.step_guard import StepGuard
from lapilli.train.metrics.batch_digest import lanes_text, sample_lanes
from lapilli.train.metrics.step_log import Journal
from lapilli.train.metrics.step_metrics import StepMeter, slot_losses
from lapilli.train.run_folder.dataset_files import data_facts
from lapilli.train.run_folder.messages import note
from lapilli.train.run_folder.names import FOLDER, MILESTONES
from lapilli.train.run_folder.restarts import record_start
from lapilli.train.run_folder.stop_request import is_stop_asked
from lapilli.train.steps.device_copy import SentStep, send_ahead
from lapilli.train.steps.feed import Feed
from lapilli.train.steps.optim import build_optimizer, learning_rate
from lapilli.train.steps.step import seed_step, to_device, train_step, warm_up
from lapilli.train.validation.sample_generations import Generation, Generations, forget_generations
from lapilli.train.validation.validation_loss import HeldOut, open_held_out

__all__ = [
    "Setup", "build_run", "build_start", "check_model", "check_start", "data_facts", "fit",
    "one_step", "open_for", "setup",
]  # fmt: skip


@dataclass
class Setup:
    """What a worker has before its first step."""

    config: RunConfig
    device: torch.device
    feed: Feed
    engine: Any
    start: int
    state: dict[str, Any]
    rank: int
    world_size: int
    held_out: HeldOut | None = None
    generations: Generations | None = None

    @property
    def is_writer(self) -> bool:
        """Whether this worker writes metrics and checkpoints."""
        return self.rank == 0


def build_start(
    config: RunConfig, loading: Loading = whole
) -> tuple[VisionLanguageModel, checkpoint.Checkpoint | None]:
    """The model as its run begins, and the checkpoint of the earlier run it starts from.

    `loading` as for `build_run`, which also tells what lies frozen below.

    Raises:
        ModelError, TrainError: A part that cannot be built, or a start that does not fit.
    """
    built = build_run(config, loading)
    return built.model, built.start


def build_run(config: RunConfig, loading: Loading = whole) -> Built:
    """The model as its run begins: on the weights that the run has started from, if it has.

    `loading` stands around the reading of pretrained weights; a worker gives `engine.loading_of`.

    Raises:
        ModelError, TrainError: A part that cannot be built, a start that does not fit, or other
            frozen weights than the run was begun beside.
    """
    run = Path(config.output)
    before = recorded(run)
    chain = find_chain(config.start_from, before.get("start", ""), by=run)
    built = build_on(config.model, chain, loading)
    if before:
        check_frozen(before, built.frozen, run=run)
    return built


def open_for(
    model: VisionLanguageModel | Outline,
    config: RunConfig,
    on_note: Callable[[str], None] = lambda line: None,
) -> Dataset:
    """Open a run's dataset as its model sees it, and check that they fit.

    `on_note` is called with a line where there is no tokenizer to compare with.

    Raises:
        DataError: The dataset cannot be opened.
        TrainError: Another image size, token ids the model does not know, another tokenizer than
            the language model's own, or one of its own that cannot be loaded.
    """
    dataset = open_dataset(
        config.dataset,
        view=config.view,
        image_tokens=model.vision.num_tokens,
        max_length=config.max_length,
        truncate=config.truncates,
    )
    check_model(model, dataset)
    _check_tokenizer(config.model.language.pretrained, dataset, on_note)
    return dataset


def _check_tokenizer(pretrained: str, dataset: Dataset, on_note: Callable[[str], None]) -> None:
    """The shards' ids are the language model's own, if that comes with a tokenizer."""
    if not pretrained:
        return
    try:
        folder = tokenizer_folder(pretrained)
        if not has_vocabulary(folder):
            on_note(
                f"tokenizer: {pretrained} holds weights alone, so that {dataset.path} is compared "
                "in the number of ids and not in the tokenizer"
            )
            return
        loaded = load_tokenizer(pretrained)
        own = tokenizer_facts(loaded)
    except DataError as error:
        raise TrainError(
            f"tokenizer: that of model.language.pretrained cannot be compared with the one "
            f"{dataset.path} was made with: {error}"
        ) from None
    there = dataset.manifest.tokenizer
    if own.fingerprint == there["fingerprint"]:
        return
    if not extends(dataset.tokenizer, loaded):  # tokens may be added
        raise TrainError(
            f"tokenizer: {dataset.path} was made with {there['name']} (fingerprint "
            f"{there['fingerprint'][:12]}), {pretrained} has another ({own.fingerprint[:12]}); "
            f"preprocess with --tokenizer {pretrained}"
        )


def check_model(model: VisionLanguageModel | Outline, dataset: Dataset) -> None:
    """Compare the manifest's facts with the model's.

    Raises:
        TrainError: Names both values and the remedy.
    """
    if dataset.image_size != model.vision.image_size:
        raise TrainError(
            f"view: {dataset.view} has images of {dataset.image_size} px, the tower takes "
            f"{model.vision.image_size}; choose another view or preprocess one with that size"
        )
    tokenizer = dataset.manifest.tokenizer
    if tokenizer["vocab_size"] > model.vocab_size:
        raise TrainError(
            f"tokenizer: {dataset.path} was made with {tokenizer['name']} "
            f"({tokenizer['vocab_size']} ids), the language model knows {model.vocab_size}; "
            "preprocess with the language model's own tokenizer, or set "
            f"model.language.vocab_size: {tokenizer['vocab_size']} if it has tokens added"
        )


def setup(config: RunConfig, device: Device, *, rank: int, world_size: int) -> Setup:
    """Build model, feed and engine, and load the newest checkpoint there is."""
    torch_device = prepare_process(device)
    check_precision(device, config.precision)
    built_on = build_run(config, engine.loading_of(config))
    model = built_on.model
    set_modes(model)
    dataset = open_for(model, config)
    check_start(built_on.start, dataset)
    state = _facts(built_on, dataset, config)
    found = _find_checkpoint(Path(config.output), state, rank)
    if found:
        checkpoint.load_weights(found, model)
    model.to(torch_device)
    feed = Feed(dataset, config, rank=rank, world_size=world_size)
    optimizer = build_optimizer(model, config.optim)
    built = engine.initialize(model, optimizer, engine.deepspeed_settings(config))
    if found:
        checkpoint.load_into(built, found)
        engine.restore_scale(built, found.state.get("loss_scale", {}))
    if torch_device.type != "cpu":  # whose shapes cost nothing the first time
        blank = blank_batches(feed.shape, dataset.image_size)
        warm_up(built, (to_device(batch, torch_device) for batch in blank))
    start = found.step if found else 0
    ready = Setup(config, torch_device, feed, built, start, state, rank, world_size)
    if samples := open_held_out(config, dataset.image_tokens):
        if config.eval_every:
            ready.held_out = HeldOut(samples, config, feed.shape, (rank, world_size))
        if config.generate_every:
            ready.generations = Generations(samples, config, rank)
    return ready


def check_start(
    start: checkpoint.Checkpoint | None,
    dataset: Dataset,
    on_note: Callable[[str], None] = lambda line: None,
) -> None:
    """An embedding that has learnt other ids is no start; tokens may have been added.

    Another template is one, as LLaVA's second stage has it; `on_note` is called with a line where
    it has the same name.

    Raises:
        TrainError: Names both tokenizers' fingerprints.
    """
    if start is None:
        return
    before: dict[str, Any] = start.state.get("data", {})
    if missing := {"tokenizer", "template"} - before.keys():
        raise TrainError(
            f"start_from: {start.path} does not say what {min(missing)} it was trained with; name "
            "another run"
        )
    here, there = dataset.manifest.tokenizer["fingerprint"], before["tokenizer"]
    if here != there and not keeps_ids(start, dataset.tokenizer):
        raise TrainError(
            f"start_from: {start.path} was trained with another tokenizer (fingerprint "
            f"{there[:12]}) than {dataset.path} was made with ({here[:12]}); preprocess with the "
            "same tokenizer, or with that one and tokens added"
        )
    mine, theirs = data_facts(dataset), before
    is_named_alike = mine["template_name"] == theirs.get("template_name")
    if is_named_alike and mine["template"] != theirs["template"]:
        on_note(
            f"start_from: {start.path} was trained with another template named "
            f"{mine['template_name']} (fingerprint {theirs['template'][:12]}, of {dataset.path} "
            f"{mine['template'][:12]}); this run takes the dataset's"
        )


def _facts(built: Built, dataset: Dataset, config: RunConfig) -> dict[str, Any]:
    """What a checkpoint says of the run it is from."""
    start = built.start
    return {
        "start": start.state["files"][checkpoint.WEIGHTS]["sha256"] if start else "",
        "dataset": dataset.manifest.fingerprint,
        "data": data_facts(dataset),
        "frozen": {"form": FORM, "weights": built.frozen},
        "config": asdict(config),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("lapilli", "torch", "deepspeed", "transformers")
        },
    }


def _find_checkpoint(run: Path, state: dict[str, Any], rank: int) -> checkpoint.Checkpoint | None:
    """The newest whole checkpoint, checked to be of this dataset and this start.

    Rank 0 decides for all: ranks that went on from different steps would wait for each other.
    """
    newest = checkpoint.latest_checkpoint(run) if rank == 0 else None
    steps = [newest.step if newest else -1]
    if dist.is_initialized():
        dist.broadcast_object_list(steps, src=0)
    found = newest or (checkpoint.at_step(run, steps[0]) if steps[0] >= 0 else None)
    for name in ("dataset", "start"):
        if found and (before := found.state.get(name, "")) != state[name]:
            raise TrainError(
                f"{found.path}: was saved with another {name} (fingerprint "
                f"{before[:12]}, now {state[name][:12]}); choose another --output"
            )
    return found


def fit(ready: Setup) -> None:
    """Step from where the run is to its end, or to where it is asked to stop."""
    if ready.is_writer:
        run = Path(ready.config.output)
        for line in tidy(run, ready.start):
            note(run, line)
        forget_generations(run, ready.start)
    journal = _open_journal(ready) if ready.is_writer else None
    uploads = _open_uploads(ready)
    clock = time.monotonic()
    guard = StepGuard(
        ready.config, ready.engine.module, ready.device, (ready.rank, ready.world_size), ready.start
    )
    closed = _closed(journal) if journal else contextlib.nullcontext()
    copied = uploads or contextlib.nullcontext()
    with copied, closed, checkpoint.Writer() as writer, guard:
        for batches in send_ahead(ready.feed.steps(ready.start), ready.device):
            waited = time.monotonic() - clock
            guard.begin(waited)
            row, stops, losses = one_step(ready, batches, wants_stop=_wants_stop(ready))
            guard.check(batches, row["loss"], row["grad_norm"])
            guard.end(batches.step)
            row.update(_held_out_loss(ready, batches.step))
            generated, answers = _generated(ready, batches.step)
            row.update(generated)
            aside = row.get("held_out_seconds", 0.0) + row.get("generated_seconds", 0.0)
            seconds = time.monotonic() - clock - aside
            if journal:
                memory = peak_memory(ready.device)
                timing = {"seconds": seconds, "wait_seconds": waited, "memory_bytes": memory}
                journal.write(batches, {**row, **timing}, losses, answers)
            writer.check()
            _save(ready, batches.step + 1, writer, uploads, now=stops)
            if stops:
                break
            clock = time.monotonic()


@contextlib.contextmanager
def _closed(journal: Journal) -> Generator[None]:
    """Close a journal at the end; what ended the training is what is told."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            journal.close()
        raise
    journal.close()


def _open_uploads(ready: Setup) -> Uploads | None:
    config = ready.config
    if not config.mirror or not ready.is_writer:
        return None
    return Uploads(Path(config.output), config.mirror, keep=config.keep, start=ready.start)


def _open_journal(ready: Setup) -> Journal:
    config = ready.config
    start = record_start(Path(config.output), ready.start, ready.world_size)
    if start.reason == "restart":
        note(
            Path(config.output),
            f"the workers were started again; the run goes on from step {start.step} with "
            f"{start.workers} after {start.seconds:.0f} s; {start.repeated} steps are repeated",
        )
    meter = StepMeter(ready.feed, ready.engine.module, ready.device)
    return Journal(config, ready.start, meter)


def _held_out_loss(ready: Setup, step: int) -> dict[str, float]:
    """The held-out loss after a step, where it is due. Collective."""
    if not (ready.held_out and _is_due(ready, step, ready.config.eval_every)):
        return {}
    start = time.monotonic()
    loss = ready.held_out.loss(ready.engine, ready.device)
    return {"held_out_loss": loss, "held_out_seconds": time.monotonic() - start}


def _generated(ready: Setup, step: int) -> tuple[dict[str, float], list[Generation]]:
    """Have held-out questions answered after a step, where it is due. Collective."""
    if not (ready.generations and _is_due(ready, step, ready.config.generate_every)):
        return {}, []
    start = time.monotonic()
    answers = ready.generations.ask(ready.engine, step)
    return {"generated_seconds": time.monotonic() - start}, answers


def _is_due(ready: Setup, step: int, every: int) -> bool:
    """Every so many steps, and after the last."""
    return (step + 1) % every == 0 or step + 1 == ready.feed.total_steps


def _wants_stop(ready: Setup) -> bool:
    return ready.is_writer and is_stop_asked(Path(ready.config.output))


def _save(
    ready: Setup, done: int, writer: checkpoint.Writer, uploads: Uploads | None, *, now: bool
) -> None:
    """Save where it is time to; the disk works while training goes on."""
    config = ready.config
    is_last = done == ready.feed.total_steps
    forms = [FOLDER] if now or is_last or done % config.save_every == 0 else []
    if config.milestone_every and done % config.milestone_every == 0:
        forms.append(MILESTONES)
    if forms:
        scale = engine.scale_state(ready.engine)
        state = {**ready.state, "loss_scale": scale} if scale else ready.state
        checkpoint.save(
            ready.engine, Path(config.output), done, state,
            keep=config.keep, is_writer=ready.is_writer, writer=writer, forms=forms,
            copies=uploads,
        )  # fmt: skip


def one_step(
    ready: Setup, batches: SentStep, *, wants_stop: bool
) -> tuple[dict[str, Any], bool, list[float]]:
    """Take one optimizer step.

    Returns:
        What is worth writing down; whether any rank stops; every sample's summed loss by its place
        in the global batch.
    """
    rate = learning_rate(
        ready.config.optim, batches.step, ready.feed.total_steps,
        starts_at_zero=ready.config.policy == "llava",
    )  # fmt: skip
    engine.set_learning_rate(ready.engine, rate)
    total, squares, scaling = _take(ready, batches)
    taken = sample_lanes(batch.sample_ids for batch in batches.batches)
    losses = slot_losses(batches.slots, batches.on_device, ready.config.global_batch)
    told = torch.cat([total[None], total.new_tensor([float(wants_stop), *taken]), squares, losses])
    if ready.world_size > 1:
        dist.all_reduce(told)
    summed, stops, *rest = told.tolist()  # the step's one wait for the device
    lanes, rest = rest[: len(taken)], rest[len(taken) :]
    squared, by_slot = rest[: len(squares)], rest[len(squares) :]
    loss = summed / max(1, batches.global_tokens)
    norm = _norm(ready.engine, squared)
    row = {
        "step": batches.step,
        "loss": loss,
        "lr": rate,
        "grad_norm": norm,
        "grad_norm_by_part": _by_part(ready.engine, squared),
        "samples": batches.global_samples,
        "trained_tokens": batches.global_tokens,
        "batch": lanes_text(lanes),
        **scaling,
    }
    return row, stops > 0, by_slot


def _take(ready: Setup, batches: SentStep) -> tuple[Tensor, Tensor, dict[str, float]]:
    """The step itself: this rank's summed loss, its share of the gradient by part; fp16's scale.

    Where fp16 overflows, DeepSpeed updates nothing and lowers the scale, on all ranks alike. The
    same samples are then taken again, so that none is lost, until there is nothing to lower.
    """
    squares: list[Tensor] = []
    overflows = 0
    while True:
        seed_step(ready.config.seed, batches.step, ready.rank)
        scale = engine.loss_scale(ready.engine)
        total = train_step(
            ready.engine,
            batches.on_device,
            global_tokens=batches.global_tokens,
            world_size=ready.world_size,
            before_update=lambda: squares.append(engine.part_squares(ready.engine)),
        )
        if engine.loss_scale(ready.engine) >= scale:
            break
        overflows += 1
    if ready.config.precision != "fp16":
        return total, squares[-1], {}
    if overflows and ready.is_writer:
        note(
            Path(ready.config.output),
            f"step {batches.step}: its gradient overflowed fp16; taken again with the loss scale "
            f"lowered {overflows} times, to {scale:g}; no sample is lost",
        )
    return total, squares[-1], {"loss_scale": scale, "overflows": overflows}


def _by_part(built: Any, squares: list[float]) -> dict[str, float]:
    """The gradient's norm before clipping for each part that learns."""
    learning = {group["part"] for group in built.optimizer.param_groups}
    return {
        part: math.sqrt(square) if square >= 0 else math.nan
        for part, square in zip(GROUPS, squares, strict=True)
        if part in learning
    }


def _norm(built: Any, squares: list[float]) -> float:
    """The whole gradient's norm before clipping; DeepSpeed has none at ZeRO stage 0."""
    norm = built.get_global_grad_norm()
    if norm is not None:
        return float(norm)
    whole = sum(squares)
    return math.sqrt(whole) if whole >= 0 else math.nan
