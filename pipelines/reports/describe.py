"""Describe datasets and runs from their folders: names with short texts."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from lapilli.data.errors import DataError
from lapilli.data.io.access import cannot_read, exists, is_denied, is_folder
from lapilli.data.io.atomic import ShardFacts
from lapilli.data.io.filesystems import is_remote
from lapilli.data.io.local_copy import local_copy
from lapilli.data.io.printable import bytes_text
from lapilli.data.io.remote_path import RemotePath
from lapilli.data.io.typed_json import JsonError, from_json
from lapilli.data.io.whole_file import read_whole
from lapilli.data.shards.checks import open_selection
from lapilli.data.shards.manifest import NAME as MANIFEST
from lapilli.data.shards.manifest import PLAN, Manifest, ViewFacts, read_manifest
from lapilli.data.shards.quarantine import read_quarantine
from lapilli.train.checkpoint.find import find_checkpoints
from lapilli.train.checkpoint.layout import folder_bytes, steps_in
from lapilli.train.config import RunConfig
from lapilli.train.renamed import RUN_NAMES
from lapilli.train.run_folder.metrics_file import StepMetrics, read_metrics
from lapilli.train.run_folder.names import CONFIG, FOLDER, METRICS, MILESTONES, MISTAKE
from lapilli.train.run_folder.restarts import read_starts
from lapilli.train.run_folder.settings import RunInfo, read_run_config, read_run_info
from pipelines.reports.ticks import counted, duration_text

__all__ = [
    "Description",
    "SourceRow",
    "describe",
    "describe_dataset",
    "describe_run",
    "kind_of",
]

SHOWN_VERSIONS = ("lapilli", "torch", "deepspeed", "transformers", "ray", "pyarrow", "tokenizers")


Lines: TypeAlias = tuple[str, ...]  # short texts, one below the other or in a row


@dataclass(frozen=True)
class SourceRow:
    """Records of one source; `reasons` are those of the quarantined ones."""

    name: str
    read: int
    kept: int
    quarantined: int
    reasons: Lines


@dataclass(frozen=True)
class Description:
    """A dataset or a run.

    Attributes:
        path: Its folder.
        kind: Which of the two.
        facts: What there is to say by name, in the order to be shown.
        sources: A dataset's sources.
        address: Where a store has it; `path` is then this machine's copy, without its shards or
            checkpoints.
    """

    path: Path
    kind: Literal["dataset", "run"]
    facts: dict[str, Lines]
    sources: tuple[SourceRow, ...] = ()
    address: str = ""

    @property
    def name(self) -> str:
        """What it is called by."""
        return self.address or str(self.path)


def kind_of(path: Path) -> Literal["dataset", "run"]:
    """Whether a folder is a dataset, finished or not, or a run.

    Raises:
        DataError: It is neither.
    """
    if not is_folder(path):
        raise DataError(f"{path}: no such folder; expected the --output of preprocess or train")
    if exists(path / MANIFEST) or exists(path / PLAN):
        return "dataset"
    if "global_batch_size" in RUN_NAMES.with_new_names(_read_json(path / CONFIG)):
        return "run"
    raise DataError(
        f"{path}: neither a dataset nor a run; expected the --output of preprocess or train"
    )


def describe(place: str | Path) -> Description:
    """Read what there is to say of a folder, or of an address.

    Raises:
        DataError, TrainError: It is neither dataset nor run, unfinished or damaged.
    """
    if is_remote(address := str(place).rstrip("/")):
        if (RemotePath(address) / MANIFEST).exists():
            folder = local_copy(address, "folders", lambda name: not _is_shard(name))
            return replace(describe_dataset(folder), address=address)
        from lapilli.train.checkpoint.at_hand import local_records  # needs torch

        folder, sizes = local_records(address)
        return replace(describe_run(folder, sizes), address=address)
    path = Path(place)
    return describe_dataset(path) if kind_of(path) == "dataset" else describe_run(path)


def _is_shard(name: str) -> bool:
    return name.endswith(".arrow") and "/" in name  # the selection lies beside the manifest


# ---- datasets ----------------------------------------------------------------------------------


def describe_dataset(path: Path) -> Description:
    """Counts, views, shards, tokens and versions of a dataset. Opens no image."""
    manifest = read_manifest(path)
    counts = manifest.counts
    read, bad = counts["read"], counts["quarantined"]
    sources = _sources(path, manifest)
    facts: dict[str, Lines] = {
        "records": (
            f"{read:,} read",
            f"{counts['kept']:,} kept",
            f"{bad:,} quarantined{_share(bad, read)}",
        ),
        "quarantined": _counted(counts["reasons"]) or ("none",),
        "repaired keys": _counted(counts["repairs"]) or ("none",),
        "images": (f"{counts['images']:,} files", *_counted(counts.get("image_notes", {}))),
        **{f"view {name}": _view(view) for name, view in manifest.views.items()},
        **_tokens(path, manifest),
        "fingerprint": (manifest.fingerprint[:16],),
        "versions": _versions(manifest.versions),
    }
    return Description(path=path, kind="dataset", facts=facts, sources=sources)


def _sources(path: Path, manifest: Manifest) -> tuple[SourceRow, ...]:
    """Each source with what was quarantined of it and why."""
    bad: dict[str, Counter[str]] = {name: Counter() for name in manifest.counts["sources"]}
    if manifest.counts["quarantined"]:
        table = read_quarantine(path, ["source", "reason"])
        for row in table.group_by(["source", "reason"]).aggregate([([], "count_all")]).to_pylist():
            bad.setdefault(row["source"], Counter())[row["reason"]] += row["count_all"]
    return tuple(
        SourceRow(
            name=name,
            read=read,
            kept=read - bad[name].total(),
            quarantined=bad[name].total(),
            reasons=_counted(bad[name]),
        )
        for name, read in manifest.counts["sources"].items()
    )


def _view(view: ViewFacts) -> Lines:
    spec, codecs = view.spec, view.codecs
    error = f", PSNR {view.fast_error['psnr']:.1f} dB" if view.fast_error else ""
    set_later = "".join(f", {name} {spec[name]}" for name in ("alpha", "depth") if name in spec)
    return (
        f"{spec['size']} px, {spec['aspect']}, {spec['mode']}{set_later}{error}",
        *_shards(view.shards),
        f"decoder {codecs['decoder']}",
        f"resizer {codecs['resizer']} {codecs['resizer_version']}",
    )


def _tokens(path: Path, manifest: Manifest) -> dict[str, Lines]:
    """Text tokens; how many an image takes is the tower's affair."""
    table = open_selection(path, manifest)
    text, trained = table["text_length"].to_numpy(), table["num_trained"].to_numpy()
    images = np.diff(table["image_slots"].combine_chunks().offsets.to_numpy())
    tokenizer = manifest.tokenizer
    return {
        "images a record": (
            f"mean {images.mean():.2f}",
            f"most {images.max()}",
            f"{int((images == 0).sum()):,} text only",
        ),
        "token shards": _shards(manifest.tokens),
        "text tokens": (
            f"mean {text.mean():,.1f}",
            f"most {text.max():,}",
            f"{text.sum():,} in all",
        ),
        "trained tokens": (f"{trained.sum():,}{_share(int(trained.sum()), int(text.sum()))}",),
        "tokenizer": (f"{tokenizer['name']}", f"{tokenizer['vocab_size']:,} ids"),
        "template": (manifest.template,),
    }


def _shards(shards: Sequence[ShardFacts]) -> Lines:
    rows, size = sum(shard.rows for shard in shards), sum(shard.bytes for shard in shards)
    return f"{rows:,} rows", counted(len(shards), "shard"), bytes_text(size)


# ---- runs --------------------------------------------------------------------------------------


def describe_run(path: Path, stored: Mapping[int, int] | None = None) -> Description:
    """State, loss, speed, parts, checkpoints and settings of a run. Loads no weight.

    `stored` are its checkpoints where a store has them: bytes by step.
    """
    config, info = read_run_config(path), read_run_info(path)
    metrics = read_metrics(path)
    checkpoints = find_checkpoints(path, hashed=False)
    versions = checkpoints[-1].state.versions if checkpoints else {}
    optim = config.optim
    cut = (f"up to {config.micro_batch_tokens:,} tokens",)
    if not config.micro_batch_tokens:
        accumulated = config.accumulation if config.micro_batch_size else 0
        cut = (str(config.micro_batch_size), str(accumulated))
    facts: dict[str, Lines] = {
        "state": _state(path, metrics, info.total_steps if info else None),
        "loss": _loss(metrics),
        "held-out loss": _held_out(metrics),
        "speed": _speed(metrics),
        **_composition(metrics),
        **_starts(path),
        "parameters": _parts(info.parameters if info else {}),
        "global batch": (
            f"{config.global_batch_size:,} samples",
            " x ".join([counted(config.num_workers, "worker"), *cut]),
        ),
        "optimizer": (f"lr {optim.lr:g} {optim.schedule}", f"ZeRO-{config.zero_stage}"),
        "device": (info.device if info and info.device else config.device, config.precision),
        "samples": _samples(config, info),
        "dataset": (config.dataset, f"view {config.view}"),
        "checkpoints": _checkpoints([c.step for c in checkpoints], folder_bytes(path / FOLDER))
        if stored is None
        else _checkpoints(sorted(stored), sum(stored.values())),
        **_milestones(path),
        "versions": _versions(versions) or ("—",),
    }
    return Description(path=path, kind="run", facts=facts)


def _state(path: Path, metrics: Sequence[StepMetrics], total: int | None) -> Lines:
    done = metrics[-1].done if metrics else 0
    of = f"{done:,} of {total:,} steps" if total else f"{done:,} steps"
    mistake = path / MISTAKE
    if total and done >= total:
        return "finished", of
    if exists(mistake):
        why = " ".join(read_whole(mistake).decode(errors="replace").split())
        return "stopped", of, why
    if not metrics:
        return ("not a step done",)
    ago = time.time() - (path / METRICS).stat().st_mtime
    return "not finished", f"{of}{_share(done, total or 0)}", f"last step {duration_text(ago)} ago"


def _loss(metrics: Sequence[StepMetrics]) -> Lines:
    ends = (metrics[0], metrics[-1]) if metrics else ()
    return tuple(f"{row.loss:.4f} at step {row.done:,}" for row in ends) or ("—",)


def _held_out(metrics: Sequence[StepMetrics]) -> Lines:
    """The last and the best one."""
    found = [(row.held_out_loss, row.done) for row in metrics if row.held_out_loss is not None]
    if not found:
        return ("—",)
    best = min(found, key=lambda pair: pair[0])
    shown = found[-1:] if best is found[-1] else [found[-1], best]
    return tuple(f"{loss:.4f} at step {step:,}" for loss, step in shown)


def _composition(metrics: Sequence[StepMetrics]) -> dict[str, Lines]:
    """Rows and images of a global batch, where its rows hold several samples."""
    shared = [row for row in metrics if row.rows is not None and row.images is not None]
    if not shared:
        return {}
    samples, rows, images = (
        sum(getattr(row, name) for row in shared) for name in ("samples", "rows", "images")
    )
    each = (f"{samples / images:.3g} samples an image",) if images else ()
    steps = len(shared)
    return {
        "rows": (
            f"{samples / steps:.1f} samples in {rows / steps:.1f} rows a step",
            f"{images / steps:.1f} images",
            *each,
        )
    }


def _speed(metrics: Sequence[StepMetrics]) -> Lines:
    """The median step's rate: the first steps compile, and a disk may have held one up."""
    rates = [row.samples / row.seconds for row in metrics]
    if not rates:
        return ("—",)
    seconds = math.fsum(row.seconds for row in metrics)
    waited = math.fsum(row.wait_seconds for row in metrics) / seconds
    return (
        f"{float(np.median(rates)):,.1f} samples/s",
        *_utilisation(metrics),
        f"{duration_text(seconds)} of steps",
        f"{waited:.1%} waiting for data",
    )


def _utilisation(metrics: Sequence[StepMetrics]) -> Lines:
    """Tokens a second and MFU of the median step, where they are known."""
    speeds = [row.tokens_per_second for row in metrics if row.tokens_per_second is not None]
    mfus = [row.mfu for row in metrics if row.mfu is not None]
    return (
        *((f"{float(np.median(speeds)):,.0f} tokens/s",) if speeds else ()),
        *((f"MFU {float(np.median(mfus)):.1%}",) if mfus else ()),
    )


def _starts(path: Path) -> dict[str, Lines]:
    """How often a run was started, and what it cost; a run that was not restarted says nothing."""
    starts = read_starts(path)
    if len(starts) < 2:
        return {}
    restarts = sum(start.reason == "restart" for start in starts)
    repeated = sum(start.repeated for start in starts)
    seconds = sum(start.repeated_seconds for start in starts)
    return {
        "starts": (
            f"{len(starts)}, {restarts} of them by Ray",
            f"{duration_text(sum(start.seconds for start in starts))} until workers were ready",
            f"{counted(repeated, 'step')} repeated, {duration_text(seconds)}",
        )
    }


def _parts(parameters: Mapping[str, Sequence[int]]) -> Lines:
    """Each part of the model, and what of it learns, in the order data pass through."""
    order = ("vision", "projector", "language")
    lines: list[str] = []
    for name in sorted(parameters, key=lambda name: order.index(name) if name in order else 9):
        total, trained = parameters[name]
        state = "trained" if trained == total else f"{trained:,} trained" if trained else "frozen"
        lines.append(f"{name} {total:,} {state}")
    return tuple(lines) or ("—",)


def _samples(config: RunConfig, info: RunInfo | None) -> Lines:
    epochs = counted(config.epochs, "epoch")
    if info is None:
        return (epochs,)
    left_out = (f"{info.too_long:,} too long",) if info.too_long else ()
    return f"{info.samples:,}", epochs, *left_out


def _checkpoints(steps: Sequence[int], size: int) -> Lines:
    """Their steps, or how many there are where these would fill the table."""
    if not steps:
        return ("none",)
    if len(steps) <= 4:
        return f"step {' and '.join(f'{step:,}' for step in steps)}", bytes_text(size)
    return f"{len(steps)} from step {steps[0]:,} to {steps[-1]:,}", bytes_text(size)


def _milestones(run: Path) -> dict[str, Lines]:
    steps = [int(path.name.partition("-")[2]) for path in steps_in(run / MILESTONES)]
    if not steps:
        return {}
    ends = f"step {steps[0]:,}" if len(steps) == 1 else f"step {steps[0]:,} to {steps[-1]:,}"
    size = bytes_text(folder_bytes(run / MILESTONES))
    return {"milestones": (counted(len(steps), "milestone"), ends, size)}


# ---- words -------------------------------------------------------------------------------------


def _share(part: int, whole: int) -> str:
    return f" ({part / whole:.1%})" if part and whole else ""


def _counted(counts: Mapping[str, int]) -> Lines:
    return tuple(f"{name} {count:,}" for name, count in sorted(counts.items()))


def _versions(versions: Mapping[str, str]) -> Lines:
    first = [name for name in SHOWN_VERSIONS if name in versions]
    rest = [name for name in versions if name not in SHOWN_VERSIONS]
    return tuple(f"{name} {versions[name]}" for name in [*first, *rest])


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if the file is missing.

    Raises:
        DataError: It cannot be read.
    """
    try:
        return from_json(read_whole(path), dict[str, Any])
    except (OSError, JsonError) as error:
        if is_denied(error):
            raise DataError(cannot_read(path, error)) from None
        return {}
