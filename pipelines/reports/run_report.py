"""report.html of a run: loss curves, speed, samples with the highest loss."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lapilli.data.dataset.dataset import Dataset, open_dataset
from lapilli.data.errors import DataError
from lapilli.data.io.access import is_folder
from lapilli.data.io.printable import bytes_text
from lapilli.data.io.whole_file import read_whole
from lapilli.data.shards.schemas import HELD_OUT, TRAIN
from lapilli.data.text.token_text import transcript
from lapilli.train.config import RunConfig
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.generations import Generation, read_generations
from lapilli.train.run_folder.messages import notes_from
from lapilli.train.run_folder.metrics_file import StepMetrics, read_metrics
from lapilli.train.run_folder.names import PROFILE, REPLAY, REPLAY_STEP, REPORT, WORKERS
from lapilli.train.run_folder.restarts import Start, read_starts
from lapilli.train.run_folder.sample_losses import SampleLoss, read_worst
from lapilli.train.run_folder.settings import (
    RunInfo,
    plain_settings,
    read_run_config,
    read_run_info,
)
from pipelines.reports.page import Figure, GalleryItem, Page
from pipelines.reports.target_pictures import add_predictions

if TYPE_CHECKING:
    from lapilli.train.inference.target_predictions import ImagePrediction

__all__ = ["curves", "flat_settings", "smoothed", "time_parts", "write_run_report"]

SHOWN = 8  # of the worst samples, with their conversation
MEMORY = 0.98  # of the smoothed loss before; about the last 50 steps
ASKED_STEPS = 5  # times at which answers to held-out questions are shown
WHY = {"command": "the command", "restart": "Ray started the workers again"}
SHARE = 0.1  # of a short run's steps that its own curve is smoothed over
EMBEDDING_LOSSES = {"smooth_l1": "smooth L1", "info_nce": "InfoNCE"}
Rows: TypeAlias = Sequence[StepMetrics]
Curve: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64]]


def curves(rows: Rows, name: str, scale: float = 1.0) -> Curve:
    """Steps and values of a figure, of the steps that have it."""
    found = [(row.done, getattr(row, name)) for row in rows]
    return _curve((step, value * scale) for step, value in found if value is not None)


def _curve(found: Iterable[tuple[int, float]]) -> Curve:
    pairs = list(found)
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(steps, np.float64), np.array(values, np.float64)


def smoothed(values: NDArray[np.float64], memory: float = MEMORY) -> NDArray[np.float64]:
    """Exponential mean, unbiased at its beginning (Kingma and Ba, arXiv 1412.6980, section 3)."""
    result, total, weight = np.empty_like(values), 0.0, 0.0
    for place, value in enumerate(values):
        total = memory * total + (1 - memory) * value
        weight = memory * weight + (1 - memory)
        result[place] = total / weight
    return result


def _eased(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Smoothed over about the last 50 steps, fewer in a short run, whose curve would lag behind."""
    return smoothed(values, min(MEMORY, 1 - 1 / max(1.0, SHARE * len(values))))


def write_run_report(
    run: Path, predictions: Sequence[ImagePrediction] = (), stored: Sequence[str] = ()
) -> Path:
    """Write a run's page from what its folder holds, finished or not.

    Args:
        run: The run's folder.
        predictions: What its predictors say of some images, to be shown as pictures.
        stored: Paths of traces and kept steps that lie in the run's store and not in its folder.

    Returns:
        The page's path.

    Raises:
        TrainError: No run, or no step of it is done.
    """
    config, info = read_run_config(run), read_run_info(run)
    rows = read_metrics(run)
    if not rows or info is None:
        raise TrainError(f"{run}: no step done yet; nothing to report")
    page = Page(f"Run {run.name}", f"{config.dataset}, view {config.view}")
    page.figures(_figures(rows, info))
    _add_loss(page, rows)
    _add_embedding_losses(page, rows)
    if predictions:
        add_predictions(page, predictions)
    _add_speed(page, rows, read_starts(run))
    _add_answers(page, run, config, info)
    _add_worst(page, run, config, info)
    _add_notes(page, run)
    _add_beside(page, run, stored)
    page.section("Settings").key_values(flat_settings(plain_settings(config)))
    return page.write(run / REPORT)


def _figures(rows: Rows, info: RunInfo) -> list[Figure]:
    last, total = rows[-1], info.total_steps
    figures = [
        Figure("steps", f"{last.done:,}", f"of {total:,}"),
        Figure("loss", f"{_eased(curves(rows, 'loss')[1])[-1]:.4f}", "mean of the last steps"),
    ]
    held_out = curves(rows, "held_out_loss")[1]
    if len(held_out):
        figures.append(Figure("held-out loss", f"{held_out[-1]:.4f}", f"best {held_out.min():.4f}"))
    rate = np.median([row.samples / row.seconds for row in rows])
    figures.append(Figure("samples/s", f"{rate:,.1f}", "median step"))
    speed = curves(rows, "tokens_per_second")[1]
    if len(speed):
        figures.append(Figure("tokens/s", f"{np.median(speed):,.0f}", "median step"))
    for name in ("mfu", "hfu"):
        shares = curves(rows, name)[1]
        if len(shares):
            figures.append(Figure(name.upper(), f"{np.median(shares):.1%}", "median step"))
    memory = curves(rows, "memory_bytes")[1]
    if len(memory):
        figures.append(Figure("memory", bytes_text(memory.max()), "most of rank 0"))
    return figures


def _add_loss(page: Page, rows: Rows) -> None:
    page.section("Loss")
    steps, losses = curves(rows, "loss")
    series = {"each step": (steps, losses), "smoothed": (steps, _eased(losses))}
    held_out = curves(rows, "held_out_loss")
    if len(held_out[0]):
        series["held out"] = held_out
    page.line_chart(series, "step", "loss a trained token", "Loss")
    for by in ("source", "modality"):
        groups = _group_curves(rows, f"loss_by_{by}")
        if len(groups) > 1:
            page.line_chart(groups, "step", "smoothed loss", f"Loss by {by}")
            page.table([by, "last loss, smoothed", "steps"], _group_rows(groups))
    norms = {"whole": curves(rows, "grad_norm"), **_part_curves(rows)}
    page.line_chart(norms, "step", "norm", "Gradient before clipping")
    page.line_chart({"": curves(rows, "lr")}, "step", "rate", "Learning rate")


def _add_embedding_losses(page: Page, rows: Rows) -> None:
    """Each task's losses by layer, and those of the last steps in a table."""
    losses = [(row.done, row.aux_losses or {}) for row in rows]
    names = list(dict.fromkeys(name for _, found in losses for name in found))
    if not names:
        return
    page.section("Embedding losses")
    split = [name.split(".") for name in names]
    curves_of = {
        name: _curve((step, found[name]) for step, found in losses if name in found)
        for name in names
    }
    for task in dict.fromkeys(task for task, _, _ in split):
        for kind, title in EMBEDDING_LOSSES.items():
            series = {
                f"layer {layer}": (curves_of[name][0], _eased(curves_of[name][1]))
                for name, (of, layer, what) in zip(names, split, strict=True)
                if (of, what) == (task, kind)
            }
            page.line_chart(series, "step", title, f"{task}: {title}, smoothed")
    page.table(
        ["task", "layer", *EMBEDDING_LOSSES.values()],
        [
            [task, layer, *(
                f"{_eased(curves_of[f'{task}.{layer}.{kind}'][1])[-1]:.4f}"
                for kind in EMBEDDING_LOSSES
            )]
            for task, layer in dict.fromkeys((task, layer) for task, layer, _ in split)
        ],
        "Last losses, smoothed",
    )  # fmt: skip


def _group_curves(rows: Rows, name: str) -> dict[str, Curve]:
    """The smoothed loss of each group, over the steps that had any of it."""
    groups: list[tuple[int, dict[str, tuple[float, int]]]]
    groups = [(row.done, getattr(row, name)) for row in rows]
    found: dict[str, Curve] = {}
    for group in sorted({group for _, means in groups for group in means}):
        steps, values = _curve((step, means[group][0]) for step, means in groups if group in means)
        found[group] = steps, _eased(values)
    return found


def _part_curves(rows: Rows) -> dict[str, Curve]:
    """The gradient's norm in each part that learns; one alone is the whole."""
    parts = [(row.done, row.grad_norm_by_part) for row in rows]
    names = sorted({name for _, norms in parts for name in norms})
    if len(names) < 2:
        return {}
    return {
        name: _curve((step, norms[name]) for step, norms in parts if name in norms)
        for name in names
    }


def _group_rows(groups: Mapping[str, Curve]) -> list[list[object]]:
    return [[name, f"{values[-1]:.4f}", len(steps)] for name, (steps, values) in groups.items()]


def _add_speed(page: Page, rows: Rows, starts: Sequence[Start]) -> None:
    page.section("Speed")
    parts = time_parts(rows, starts)
    whole = sum(parts.values())
    page.table(
        ["what", "seconds", "share"],
        [[name, f"{part:,.1f}", f"{part / whole:.1%}"] for name, part in parts.items()],
        "Where the time went",
    )
    if len(starts) > 1:
        page.table(
            ["start", "at step", "workers", "why", "seconds until ready", "steps repeated"],
            [
                [number, s.step, s.workers, WHY[s.reason], f"{s.seconds:,.1f}", s.repeated]
                for number, s in enumerate(starts, 1)
            ],
            "Every start of the run",
        )
    charts = [
        ("tokens_per_second", 1.0, "tokens/s", "Tokens with the images' own"),
        ("mfu", 100.0, "%", "Model FLOPs utilisation: real tokens, nothing twice"),
        ("hfu", 100.0, "%", "Hardware FLOPs utilisation: with padding and recomputation"),
        ("memory_bytes", 1e-9, "GB", "Most memory rank 0 has held so far"),
    ]
    for name, scale, unit, title in charts:
        curve = curves(rows, name, scale)
        if len(curve[0]):
            page.line_chart({"": curve}, "step", unit, title)
    steps = curves(rows, "wait_seconds")[0]
    shares = np.array([100 * row.wait_seconds / row.seconds for row in rows])
    page.line_chart({"": (steps, shares)}, "step", "%", "Share of a step spent waiting for data")


def time_parts(rows: Rows, starts: Sequence[Start]) -> dict[str, float]:
    """Seconds of a run by what they were spent on; what took none is left out.

    Args:
        rows: Its metrics.
        starts: Its starts.
    """

    def total(name: str) -> float:
        return sum(getattr(row, name) or 0.0 for row in rows)

    parts = {
        "computing": total("seconds") - total("wait_seconds"),
        "waiting for data": total("wait_seconds"),
        "held-out loss": total("held_out_seconds"),
        "held-out answers": total("generated_seconds"),
        "starting workers": sum(start.seconds for start in starts),
        "steps repeated": sum(start.repeated_seconds for start in starts),
    }
    return {name: part for name, part in parts.items() if part or name == "waiting for data"}


def _add_worst(page: Page, run: Path, config: RunConfig, info: RunInfo) -> None:
    worst = read_worst(run)
    if not worst:
        return
    page.section("Samples of highest loss")
    page.table(
        ["sample", "loss", "step", "tokens"],
        [[s.sample_id, f"{s.mean:.4f}", s.step + 1, s.tokens] for s in worst],
        "Mean over a sample's trained tokens, when it was trained on",
    )
    dataset = _open(page, config, info, config.dataset, TRAIN)
    if dataset is None:
        return
    tokenizer = dataset.tokenizer
    for sample in worst[:SHOWN]:
        _add_sample(page, dataset, tokenizer, sample)


def _open(page: Page, config: RunConfig, info: RunInfo, path: str, split: str) -> Dataset | None:
    """A dataset as the run saw it; says on the page why it cannot be opened."""
    folder, limit = config.cache.folder, config.cache.limit
    if folder and not is_folder(Path(folder)):  # of other machines
        folder = limit = ""
    try:
        return open_dataset(
            path, view=config.view, image_tokens=info.image_tokens,
            max_length=config.max_length, split=split, cache=folder, cache_limit=limit,
        )  # fmt: skip
    except DataError as error:
        page.text(f"What is in the samples is not shown: {error}")
        return None


def _add_answers(page: Page, run: Path, config: RunConfig, info: RunInfo) -> None:
    """What was answered to each held-out question: at first, at last and some times between."""
    found = read_generations(run)
    if not found:
        return
    steps = sorted({one.step for one in found})
    places = np.linspace(0, len(steps) - 1, min(ASKED_STEPS, len(steps))).astype(int)
    shown = {steps[place] for place in places}
    other = config.validation.dataset
    page.section("Answers to held-out questions")
    dataset = _open(page, config, info, other or config.dataset, TRAIN if other else HELD_OUT)
    by_sample: dict[str, list[Generation]] = {}
    for one in found:
        if one.step in shown:
            by_sample.setdefault(one.sample_id, []).append(one)
    for name, answers in by_sample.items():
        index = answers[0].index
        if dataset and index < len(dataset) and dataset.sample_id(index) == name:
            sample = dataset.sample(index)
            asked = sample.input_ids[: sample.label_spans[0, 0]]  # later turns may have images too
            if count := int((asked < 0).sum()):
                page.gallery([GalleryItem(picture) for picture in sample.pixels[:count]])
        page.table(
            ["after", "answer"],
            [[f"step {one.step + 1:,}", one.given] for one in answers],
            f"{name}: {answers[0].question} Expected: {answers[0].expected}",
        )


def _add_sample(page: Page, dataset: Dataset, tokenizer: Any, found: SampleLoss) -> None:
    if found.index >= len(dataset) or dataset.sample_id(found.index) != found.sample_id:
        return  # the dataset has been built anew meanwhile
    sample = dataset.sample(found.index)
    if len(sample.pixels):
        page.gallery([GalleryItem(picture) for picture in sample.pixels])
    image = f"<image {dataset.image_tokens} tokens>"
    pieces = transcript(sample.input_ids, sample.label_spans, tokenizer, image_text=image)
    page.transcript(pieces, f"{found.sample_id}: loss {found.mean:.4f} at step {found.step + 1}")


def _add_notes(page: Page, run: Path) -> None:
    lines, _ = notes_from(run, 0)
    if lines:
        text = "\n".join(lines[-50:])
        for host, rank in sorted(_hosts(run).items(), key=lambda item: -len(item[0])):
            text = re.sub(rf"(?<![\w.-]){re.escape(host)}(?![\w-])", f"rank {rank}'s machine", text)
        page.section("What was noted").text(text)


def _add_beside(page: Page, run: Path, stored: Sequence[str]) -> None:
    """Links to what was profiled and kept: they work where the page lies in the run's folder."""
    here = (*run.glob(f"{PROFILE}/step-*-rank-*.*"), *run.glob(f"{REPLAY}/step-*/{REPLAY_STEP}"))
    paths = sorted({path.relative_to(run).as_posix() for path in here} | {*stored})
    if traces := [path for path in paths if path.startswith(f"{PROFILE}/")]:
        page.section("Profiled steps").text(
            "Open a .json in ui.perfetto.dev, a .pickle in pytorch.org/memory_viz."
        )
        page.links(traces)
    if kept := [path for path in paths if path.endswith(f"/{REPLAY_STEP}")]:
        page.section("Kept steps").text("lapilli replay looks for what went wrong in one.")
        page.links(kept)


def _hosts(run: Path) -> dict[str, int]:
    """Names of the run's machines, which stay in its folder, with the first rank on each."""
    try:
        workers = json.loads(read_whole(run / WORKERS))["workers"]
        return {str(one["host"]): int(one["rank"]) for one in reversed(workers) if one["host"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def flat_settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Settings with their full names, as overrides spell them."""
    flat: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(flat_settings(value, f"{prefix}{name}."))  # pyright: ignore[reportUnknownArgumentType]
        else:
            flat[f"{prefix}{name}"] = value
    return flat
