"""Train probes on a frozen model's hidden states, and measure them on held-out images.

VisPer-LM asks so what each layer knows of an image: one resampler a layer, smooth L1 against a
teacher's features, the model's own weights untouched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, smooth_l1_loss

from lapilli.data.batches.collate import BatchShape, collate
from lapilli.data.dataset.dataset import Dataset, Sample
from lapilli.data.dataset.targets import TargetReader, open_targets
from lapilli.data.shards.target_rows import decode_rows
from lapilli.model.auxiliary.layer_states import decoder_layers
from lapilli.model.auxiliary.probes import build_probes, image_states
from lapilli.model.vlm import VisionLanguageModel
from lapilli.train.errors import TrainError
from lapilli.train.steps.step import to_device

__all__ = ["LayerScore", "ProbePlan", "ProbeScores", "chosen_layers", "train_probes"]

WARM_UP = 0.03  # of the steps; then a cosine to zero, as upstream's
FIRST = 128  # images whose targets' mean and deviation the probes start with


@dataclass(frozen=True, kw_only=True)
class ProbePlan:
    """How probes are trained.

    Attributes:
        target: Name of the dataset's targets.
        layers: Decoder layers, counted from 1.
        steps: Optimizer steps.
        batch_size: Samples of a step, and of a pass over the held-out ones.
        lr: Highest learning rate of AdamW.
        samples: Most held-out samples.
        seed: Decides the probes' first weights and the order of the samples.
    """

    target: str
    layers: Sequence[int]
    steps: int
    batch_size: int = 32
    lr: float = 1e-3
    samples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        for name in ("steps", "batch_size", "samples"):
            if getattr(self, name) < 1:
                raise TrainError(f"{name}: {getattr(self, name)}; expected at least 1")
        if not 0 < self.lr < math.inf:
            raise TrainError(f"lr: {self.lr}; expected more than 0")


@dataclass(frozen=True)
class LayerScore:
    """A layer's probe on held-out images.

    Attributes:
        layer: Its number, from 1.
        smooth_l1: Mean over images of the mean over the target's values.
        cosine: Mean over images of the mean over rows of their cosine similarity.
        trained_smooth_l1: `smooth_l1` of the last tenth of the steps, on the images trained on.
    """

    layer: int
    smooth_l1: float
    cosine: float
    trained_smooth_l1: float


@dataclass(frozen=True)
class ProbeScores:
    """Probes of a model.

    Attributes:
        layers: Each layer's.
        mean_smooth_l1: `smooth_l1` of predicting the mean target of the images trained on, whatever
            the image: what a probe that knows nothing of it reaches.
        trained_on: Images with a target that were drawn from for training.
        held_out: Images with a target that were measured on.
    """

    layers: Sequence[LayerScore]
    mean_smooth_l1: float
    trained_on: int
    held_out: int


def chosen_layers(text: str, model: VisionLanguageModel) -> tuple[int, ...]:
    """The layers of `1,4,8`, or of `all`.

    Raises:
        TrainError: No such layers.
    """
    count = len(decoder_layers(model.language.get_decoder()))
    if text == "all":
        return tuple(range(1, count + 1))
    words = [word.strip() for word in text.split(",")]
    layers = [int(word) for word in words if word.isdecimal()]
    if len(layers) < len(words) or len({*layers}) < len(layers) or not _are_within(layers, count):
        raise TrainError(
            f"layers: {text!r}; expected numbers from 1 to {count}, each once and separated by "
            "commas, or all"
        )
    return tuple(sorted(layers))


def _are_within(layers: Sequence[int], count: int) -> bool:
    return all(1 <= layer <= count for layer in layers)


@dataclass(frozen=True)
class _TargetImages:
    """The samples of a split whose first image has a target, an image once.

    Attributes:
        dataset: The split.
        reader: Its targets.
        ids: int64, the samples.
        slots: Of their first images.
    """

    dataset: Dataset
    reader: TargetReader
    ids: NDArray[np.int64]
    slots: frozenset[int]

    @staticmethod
    def of(dataset: Dataset, target: str, without: frozenset[int] = frozenset()) -> _TargetImages:
        """Those of a dataset but the images of some slots.

        Raises:
            DataError: It has no such targets.
            TrainError: No image is left.
        """
        reader = open_targets(dataset, target)
        by_slot: dict[int, int] = {}
        for index in np.flatnonzero(dataset.has_images).tolist():
            by_slot.setdefault(int(dataset.image_slots(index)[0]), index)
        by_slot = {
            slot: index
            for slot, index in by_slot.items()
            if slot not in without and reader.read(slot) is not None
        }
        if not by_slot:
            raise TrainError(
                f"target: no image of {dataset.path} is left that has one of {target}; "
                "expected some to train on and others to measure on"
            )
        ids = np.array(sorted(by_slot.values()), np.int64)
        return _TargetImages(dataset, reader, ids, frozenset(by_slot))

    def targets(self, ids: NDArray[np.int64], device: torch.device) -> Tensor:
        """fp32 [N, R, C].

        Raises:
            TrainError: A number that is not finite.
        """
        found: list[NDArray[np.float32]] = []
        for index in ids.tolist():
            stored = self.reader.read(int(self.dataset.image_slots(index)[0]))
            assert stored is not None, "such images are left out"
            found.append(decode_rows(*stored))
            if not np.isfinite(found[-1]).all():
                raise TrainError(
                    f"target: {self.reader.name} of {self.dataset.sample_id(index)} in "
                    f"{self.dataset.path} has a number that is not finite; run verify, then "
                    "preprocess again"
                )
        return torch.from_numpy(np.stack(found)).to(device)


def train_probes(
    model: VisionLanguageModel,
    train: Dataset,
    held_out: Dataset,
    plan: ProbePlan,
    device: torch.device,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> ProbeScores:
    """Train a probe for each layer and measure it.

    All probes learn from the same batches at once, and none from another's. A sample ends behind
    its first image, of which the states of the tower's rows alone are read: a decoder's states do
    not depend on what follows. An image that is held out is not trained on.

    Args:
        model: The model, on `device`, in eval mode; its weights stay as they are.
        train: Samples to train on.
        held_out: Samples to measure on.
        plan: How.
        device: Where the model computes.
        on_step: Called after each step with the mean loss of the probes.

    Raises:
        DataError: A dataset has no such targets.
        TrainError: No image to train or to measure on, or numbers that are not finite.
    """
    measured = _TargetImages.of(held_out, plan.target)
    learnt = _TargetImages.of(train, plan.target, without=measured.slots)
    size = int(model.language.get_input_embeddings().embedding_dim)
    some = learnt.targets(next(_drawn(learnt.ids, replace(plan, batch_size=FIRST))), device)
    probes = build_probes(plan.layers, size, some.cpu(), seed=plan.seed).to(device)
    taken, mean_RC = _fit(model, probes, learnt, plan, device, on_step)
    spread = np.linspace(0, len(measured.ids) - 1, min(plan.samples, len(measured.ids)))
    ids = measured.ids[np.unique(spread.astype(np.int64))]
    sums = _measure(model, probes, replace(measured, ids=ids), plan, device, mean_RC)
    means = (sums / len(ids)).tolist()
    layers = [
        LayerScore(layer, smooth, alike, before)
        for layer, (smooth, alike), before in zip(plan.layers, means[1:], taken, strict=True)
    ]
    return ProbeScores(layers, means[0][0], len(learnt.ids), len(ids))


def _fit(
    model: VisionLanguageModel, probes: nn.ModuleDict, images: _TargetImages, plan: ProbePlan,
    device: torch.device, on_step: Callable[[int, float], None],
) -> tuple[list[float], Tensor]:  # fmt: skip
    """Train; gives each probe's loss of the last tenth of the steps, and the mean target."""
    optimizer = torch.optim.AdamW(probes.parameters(), lr=plan.lr, weight_decay=0.0)
    last = torch.zeros(len(plan.layers), device=device)
    seen, count = torch.zeros((), device=device), 0
    tail = max(1, plan.steps // 10)
    probes.train()
    for step, ids in enumerate(_drawn(images.ids, plan)):
        states = _states(model, images.dataset, ids, plan, device)
        targets_NRC = images.targets(ids, device)
        seen, count = seen + targets_NRC.sum(0), count + len(ids)
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * _share(step, plan.steps)
        losses = torch.stack([
            smooth_l1_loss(probe(states[layer]), targets_NRC)
            for layer, probe in zip(plan.layers, probes.values(), strict=True)
        ])  # fmt: skip
        if not bool(losses.isfinite().all()):
            layer = plan.layers[int((~losses.isfinite()).nonzero()[0])]
            raise TrainError(
                f"probe: the loss of layer {layer} is not finite at step {step + 1}; check the "
                "model's weights, or lower --lr"
            )
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        if step >= plan.steps - tail:
            last += losses.detach() / tail
        on_step(step + 1, float(losses.detach().mean()))
    return last.tolist(), seen / count


def _share(step: int, steps: int) -> float:
    """Of the highest learning rate: warm-up, then a cosine."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def _drawn(ids: NDArray[np.int64], plan: ProbePlan) -> Iterator[NDArray[np.int64]]:
    """A batch of samples a step, each sample once an epoch, in an order that the seed decides."""
    order = np.random.default_rng(plan.seed)
    waiting = ids[:0]
    size = min(plan.batch_size, len(ids))
    for _ in range(plan.steps):
        if len(waiting) < size:
            waiting = np.concatenate([waiting, order.permutation(ids)])
        yield waiting[:size]
        waiting = waiting[size:]


@torch.no_grad()
def _measure(
    model: VisionLanguageModel, probes: nn.ModuleDict, images: _TargetImages, plan: ProbePlan,
    device: torch.device, mean_RC: Tensor,
) -> Tensor:  # fmt: skip
    """Sums over images of smooth L1 and cosine: of the mean target, then of each probe."""
    probes.eval()
    sums = torch.zeros(1 + len(plan.layers), 2, dtype=torch.float64)
    for start in range(0, len(images.ids), plan.batch_size):
        ids = images.ids[start : start + plan.batch_size]
        states = _states(model, images.dataset, ids, plan, device)
        targets_NRC = images.targets(ids, device)
        said = [probe(states[n]) for n, probe in zip(plan.layers, probes.values(), strict=True)]
        for number, found_NRC in enumerate([mean_RC.expand_as(targets_NRC), *said]):
            smooth_N = smooth_l1_loss(found_NRC, targets_NRC, reduction="none").flatten(1).mean(1)
            alike_N = cosine_similarity(found_NRC, targets_NRC, dim=-1).mean(1)
            sums[number] += torch.stack([smooth_N.sum(), alike_N.sum()]).double().cpu()
    return sums


def _states(
    model: VisionLanguageModel, dataset: Dataset, ids: NDArray[np.int64], plan: ProbePlan,
    device: torch.device,
) -> dict[int, Tensor]:  # fmt: skip
    """Layers' states of the samples' first images."""
    samples = [_first_image(dataset.sample(index)) for index in ids.tolist()]
    longest = max(len(one.input_ids) for one in samples) + dataset.image_tokens - 1
    shape = BatchShape(
        rows=len(samples), buckets=(-(-longest // 8) * 8,), image_tokens=dataset.image_tokens
    )
    batch = collate(samples, shape, dataset.image_size)
    return image_states(model, to_device(batch, device).inputs, plan.layers, batch.num_images)


def _first_image(sample: Sample) -> Sample:
    """A sample up to its first image."""
    end = int(np.flatnonzero(sample.input_ids < 0)[0]) + 1
    return replace(
        sample, input_ids=sample.input_ids[:end], label_spans=sample.label_spans[:0],
        pixels=sample.pixels[:1],
    )  # fmt: skip
