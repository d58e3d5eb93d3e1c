"""Choose what is recomputed and offloaded, and the micro-batch, so that a run fits in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from lapilli.model.config import KEEP_ALL, ActivationPolicy, LoraConfig
from lapilli.model.errors import ModelError
from lapilli.train.config import RunConfig
from lapilli.train.device import Device
from lapilli.train.driver.activation_memory import leanest, policies
from lapilli.train.driver.memory_estimate import Estimate
from lapilli.train.errors import TrainError
from lapilli.train.steps.step import OutOfMemory

__all__ = ["USABLE", "MemoryPolicy", "choose_memory", "memory_budget", "shortage_line"]

GIB = 2**30
USABLE = 0.9  # of a device's memory: the rest is the context, buffers of collectives, fragments
MOST_ON_CPU = 8  # rows of a micro-batch that follows; more make a core no faster
MOST_DEVICES = 64  # that a refusal proposes
Estimator = Callable[[RunConfig], Estimate]


@dataclass(frozen=True, kw_only=True)
class MemoryPolicy:
    """How a run fits in its devices' memory.

    Attributes:
        activations: What is kept for backward, and where.
        layers: Layers that could run again, by part.
        estimated: Bytes a worker takes on its device; None where nothing was estimated.
        budget: Bytes it may take; None without a bound.
        host: Bytes of activations in the host's memory.
    """

    activations: ActivationPolicy = KEEP_ALL
    layers: dict[str, int] = field(default_factory=dict[str, int])
    estimated: int | None = None
    budget: int | None = None
    host: int = 0

    @property
    def note(self) -> str:
        """One line."""
        if self.budget is None or self.estimated is None:
            return "memory: auto sets no bound on a CPU; no layer is recomputed"
        again = self.activations.recompute
        parts = [f"{again.get(part, 0)} of {n} {part} layers" for part, n in self.layers.items()]
        offloaded = f", their inputs ({gib(self.host)}) on the host" if self.host else ""
        return (
            f"memory: {' and '.join(parts) or 'no layers'} recomputed{offloaded}; estimated "
            f"{gib(self.estimated)} of {gib(self.budget)} a worker"
        )


def gib(size: float) -> str:
    """`31.2 GiB`, in three figures."""
    return f"{size / GIB:.3g} GiB"


def memory_budget(
    config: RunConfig, device: Device, total: Callable[[Device], int | None]
) -> int | None:
    """Bytes that a worker may hold on its device.

    Args:
        config: The run.
        device: What it computes on.
        total: Says a device's memory in bytes; asked where `memory` is `auto`.

    Returns:
        None without a bound: `auto` on a CPU.
    """
    if config.memory != "auto":
        return int(config.memory * GIB)
    found = total(device)
    return None if found is None else int(found * USABLE)


def choose_memory(
    config: RunConfig, device: Device, budget: int | None, estimate: Estimator
) -> tuple[RunConfig, MemoryPolicy]:
    """The run with a micro-batch, its own or the largest that fits, and its policy.

    For a micro-batch the policy is the one that costs least operations. Inputs of layers go to the
    host only where no micro-batch fits without: a smaller one computes as much, a copy takes time.

    Args:
        config: The run; its micro-batch may be 0.
        device: What it computes on.
        budget: Bytes a worker may hold (`memory_budget`).
        estimate: Says what a run takes; called where it matters.

    Raises:
        TrainError: Nothing fits; names what would.
    """
    if budget is None:
        return _with_rows(config, _micro_batches(config, device)[0]), MemoryPolicy()
    found = estimate(config)
    sizes = _micro_batches(config, device)
    if config.micro_batch_tokens:
        sizes = [max(1, config.micro_batch_tokens // found.length)]
    for offload in _offloads(config):
        choices = policies(found.one, offload=offload)
        for rows in sizes:
            for policy in choices:
                taken = found.worker_bytes(config.zero_stage, rows, policy)
                if taken <= budget:
                    return _with_rows(config, rows), MemoryPolicy(
                        activations=policy,
                        layers=found.one.counts(),
                        estimated=taken,
                        budget=budget,
                        host=found.activations(rows).on_host(policy),
                    )
    raise TrainError(_refusal(config, budget, found, estimate))


def _with_rows(config: RunConfig, rows: int) -> RunConfig:
    """The run with so many rows a micro-batch, unless it bounds their tokens."""
    return config if config.micro_batch_tokens else replace(config, micro_batch_size=rows)


def _micro_batches(config: RunConfig, device: Device) -> list[int]:
    """Rows that a micro-batch may have, the most first."""
    if config.micro_batch_size:
        return [config.micro_batch_size]
    share = config.global_batch_size // config.num_workers
    most = MOST_ON_CPU if device == "cpu" else share
    return [rows for rows in range(min(share, most), 0, -1) if share % rows == 0]


def _least(config: RunConfig, found: Estimate, rows: int) -> int:
    """Least bytes that a run takes with a micro-batch."""
    lean = [leanest(found.one, offload=offload) for offload in _offloads(config)]
    choices = (*lean, KEEP_ALL)
    return min(found.worker_bytes(config.zero_stage, rows, policy) for policy in choices)


def _offloads(config: RunConfig) -> tuple[bool, ...]:
    """Whether inputs of layers may go to the host; a compiled layer is one graph on the device."""
    return (False, True) if config.model.compile == "none" else (False,)


def _refusal(config: RunConfig, budget: int, found: Estimate, estimate: Estimator) -> str:
    """What is needed, and what would fit; where nothing would, what needs least."""
    rows = config.micro_batch_size or max(1, config.micro_batch_tokens // found.length)
    named = list[tuple[int, str]]()
    smaller = _fitting(config, rows, lambda n: _least(config, found, n) <= budget)
    if smaller and not _is_fixed(config):
        setting, number = _setting_of(config, smaller, found.length)
        named.append((_least(config, found, smaller), f"{setting} {number}"))
    for name, changed in _alternatives(config):
        with contextlib.suppress(ModelError, TrainError):
            other = found.under(changed) if changed.model == config.model else estimate(changed)
            named.append((_least(changed, other, rows), name))
    fitting = [f"with {name} {gib(size)}" for size, name in named if size <= budget]
    if not fitting:
        fitting = [f"with {name} {gib(size)}" for size, name in sorted(named)[:2]]
    remedies = [*_least_devices(fitting), "or less with a smaller max_length"]
    if not fitting:
        remedies = ["a smaller max_length needs less"]
    wanted = "auto" if config.memory == "auto" else f"{config.memory:g}"
    return (
        f"memory: {wanted} gives {gib(budget)} a worker; a micro-batch of {rows} x {found.length} "
        f"tokens under zero_stage {config.zero_stage} needs at least "
        f"{gib(_least(config, found, rows))}, all layers recomputed and offloaded: "
        f"{', '.join(remedies)}"
    )


def _least_devices(named: list[str]) -> list[str]:
    """Of ZeRO-3 over more and more devices the fewest."""
    over = [name for name in named if " devices " in name]
    return [name for name in named if name not in over[1:]]


def _alternatives(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Other ways to train the same model, by name; settings that cannot be are left out."""
    model, stage = config.model, config.zero_stage
    is_packed = model.language.quantize != "none"
    learns_whole = "language" in model.trainable and model.lora is None
    adapted = replace(model, lora=LoraConfig()) if learns_whole else model
    with contextlib.suppress(ModelError, TrainError):
        if learns_whole:
            yield "lora", replace(config, model=adapted)
        if model.language.pretrained and not is_packed:
            packed = replace(adapted, language=replace(model.language, quantize="nf4"))
            name = "4-bit weights" + (" and lora" if learns_whole else "")
            changed = replace(config, model=packed, zero_stage=2 if stage == 3 else stage)
            yield name, changed
    stages = [s for s in (1, 2) if stage < s and config.num_workers > 1]
    for higher in stages:
        yield f"zero_stage {higher}", replace(config, zero_stage=higher)
    if config.offload.to == "none" and stage:
        yield "offload.to: cpu", replace(config, offload=replace(config.offload, to="cpu"))
    for devices in (2**n for n in range(MOST_DEVICES.bit_length())):
        is_more = devices > config.num_workers or (stage < 3 and devices == config.num_workers)
        with contextlib.suppress(TrainError):
            if is_more and devices > 1 and not is_packed:
                name = f"ZeRO-3 over {devices} devices"
                yield name, replace(config, zero_stage=3, num_workers=devices)


def _fitting(config: RunConfig, below: int, fits: Callable[[int], bool]) -> int:
    """The largest smaller micro-batch that fits; 0 for none."""
    share = config.global_batch_size // config.num_workers
    sizes = (
        rows
        for rows in range(min(share, below - 1), 0, -1)
        if share % rows == 0 or config.micro_batch_tokens
    )
    return next((rows for rows in sizes if fits(rows)), 0)


def _setting_of(config: RunConfig, rows: int, length: int) -> tuple[str, int]:
    """The setting under which a micro-batch has so many rows of that length, and its value."""
    if config.micro_batch_tokens:
        return "micro_batch_tokens", rows * length
    return "micro_batch_size", rows


def _is_fixed(config: RunConfig) -> bool:
    """Whether the micro-batches decide the loss."""
    return config.sampler == "llava" or config.loss_reduction == "micro_batch_mean"


def shortage_line(
    config: RunConfig, policy: MemoryPolicy, error: OutOfMemory, estimate: Estimator
) -> str:
    """What to say of a micro-batch that the device had no room for.

    Args:
        config: The run.
        policy: What it was run with.
        error: The batch's shape.
        estimate: Says what the run takes with sequences of that length.
    """
    found = estimate(config)
    taken = found.worker_bytes(config.zero_stage, error.rows, policy.activations)
    target = int(USABLE * min(taken, policy.budget or taken))
    rows = _fitting(
        config, error.rows,
        lambda n: found.worker_bytes(config.zero_stage, n, policy.activations) <= target,
    )  # fmt: skip
    remedies = list[str]()
    if rows and not _is_fixed(config):
        setting, number = _setting_of(config, rows, error.tokens)
        remedies.append(f"{setting}: {number}, the largest that is estimated to fit")
    if _least(config, found, error.rows) <= target:
        remedies.append(f"memory: {target / GIB:.3g} to have more layers recomputed")
    remedies = remedies or ["a smaller max_length, a higher zero_stage, offload.to: cpu or lora"]
    return (
        f"memory: none left for a micro-batch of {error.rows} x {error.tokens} tokens with "
        f"{error.images} images, estimated at {gib(taken)} a worker ({error.said}); set "
        f"{', or '.join(remedies)}"
    )
