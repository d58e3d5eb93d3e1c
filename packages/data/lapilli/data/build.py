"""The Ray Data graph of a build: one task makes one shard, then `select` joins them.

Pixels never pass through Ray's object store: a task reads files, writes its shard and returns
the shard's facts.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import pickle
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lapilli.data.codecs import Codecs
from lapilli.data.errors import DataError
from lapilli.data.images import BadImage, ImageSpec, decode, square
from lapilli.data.manifest import FORMAT, Manifest, ViewFacts, digest, read_manifest, write_manifest
from lapilli.data.plan import BuildPlan, ImageTask, TokenTask, check_quarantined
from lapilli.data.record import Entry, Reason, Verdict
from lapilli.data.shards import (
    IMAGE_SCHEMA,
    SELECTION_SCHEMA,
    TOKEN_SCHEMA,
    ShardFacts,
    finished_facts,
    open_table,
    write_atomic,
    write_shard,
)
from lapilli.data.tokenize import encode_batch, llava_length, load_tokenizer, tokenizer_facts

__all__ = ["BuildReport", "Runner", "build", "check_disk", "run_here", "run_on_ray", "run_task"]

PLAN = "plan.json"
TOKENIZER = "tokenizer"  # a copy of its files, so that a dataset can be moved
Progress = Callable[[int, int], None]
Task: TypeAlias = ImageTask | TokenTask
Runner: TypeAlias = Callable[[list[Task], Path, int], Iterator[ShardFacts]]


@dataclass(frozen=True)
class BuildReport:
    """What a build did, for the person who started it."""

    manifest: Manifest
    shards_built: int
    shards_reused: int
    seconds: float


def run_on_ray(tasks: list[Task], output: Path, workers: int) -> Iterator[ShardFacts]:
    """Run tasks on Ray Data, one block and one Ray task each; yields facts as they finish."""
    if not tasks:
        return
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    where = str(output.resolve())
    dataset = ray.data.from_items(
        [{"task": pickle.dumps(task), "output": where} for task in tasks],
        override_num_blocks=len(tasks),
    ).map(_run_row, num_cpus=1, concurrency=workers or None)
    for row in dataset.iter_rows():
        if row["error"]:
            raise DataError(row["error"]) if row["expected"] else RuntimeError(row["error"])
        yield ShardFacts(row["path"], row["rows"], row["bytes"], row["sha256"])


def run_here(tasks: list[Task], output: Path, workers: int) -> Iterator[ShardFacts]:
    """Run tasks one after the other in this process: a runner without Ray, for small things."""
    del workers
    for task in tasks:
        yield run_task(task, output)


def build(
    plan: BuildPlan,
    on_progress: Progress = lambda done, total: None,
    *,
    runner: Runner = run_on_ray,
) -> BuildReport:
    """Carry out a plan: build what is missing or damaged, select, write the manifest last.

    `on_progress(done, total)` is called after every shard. `runner` makes the shards; the default
    needs a running Ray (`lapilli.data.cluster.ray_session`), `run_here` none.

    Raises:
        DataError: The output holds something else, the disk is too small, a worker's libraries
            differ, or too much is quarantined.
    """
    started = time.monotonic()
    output = Path(plan.config.output)
    _check_output(output, plan.digests)
    tasks: list[Task] = [*plan.token_tasks(), *plan.image_tasks()]
    facts = {task.name: finished_facts(output, task.name) for task in tasks}
    missing = [task for task in tasks if facts[task.name] is None]
    check_disk(output, missing)
    _write_json(output / PLAN, plan.digests)
    on_progress(len(tasks) - len(missing), len(tasks))
    for done, built in enumerate(runner(missing, output, plan.config.workers), start=1):
        facts[built.path] = built
        on_progress(len(tasks) - len(missing) + done, len(tasks))
    finished = {name: fact for name, fact in facts.items() if fact is not None}
    manifest = _finish(plan, output, finished)
    seconds = time.monotonic() - started
    return BuildReport(manifest, len(missing), len(tasks) - len(missing), seconds)


def _check_output(output: Path, digests: dict[str, str]) -> None:
    """The output is new, or of the same plan; nothing else is overwritten or mixed in."""
    path = output / PLAN
    if not path.exists():
        if output.exists() and any(output.iterdir()):
            raise DataError(f"{output}: not empty and no dataset; choose another --output")
        return
    before: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    changed = [name for name in {**before, **digests} if before.get(name) != digests.get(name)]
    if changed:
        raise DataError(
            f"{output}: was built with another {', '.join(changed)}; expected the same inputs "
            "and settings; choose another --output or remove this folder"
        )


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1)
    write_atomic(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def check_disk(output: Path, missing: Iterable[Task]) -> None:
    """Stop before the work if the pixels still to be written do not fit on the disk.

    Raises:
        DataError: Names the bytes needed and free.
    """
    images = [task for task in missing if isinstance(task, ImageTask)]
    needed = sum(len(task.image_ids) * task.spec.size**2 * 3 for task in images)
    existing = next(
        folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists()
    )
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DataError(
            f"output: {output} has {free / 1e9:.1f} GB free, the images need "
            f"{needed / 1e9:.1f} GB; free space or choose another --output"
        )


def _run_row(row: dict[str, Any]) -> dict[str, Any]:
    """A task as Ray Data sees it: errors travel as values, since one exception ends a dataset."""
    empty = {"path": "", "rows": 0, "bytes": 0, "sha256": ""}
    try:
        return {
            **asdict(run_task(pickle.loads(row["task"]), Path(row["output"]))),
            "error": "",
            "expected": False,
        }
    except DataError as error:
        return {**empty, "error": str(error), "expected": True}
    except Exception:
        return {**empty, "error": traceback.format_exc(), "expected": False}


def run_task(task: Task, output: Path) -> ShardFacts:
    """Make one shard, in this process."""
    if isinstance(task, ImageTask):
        return write_shard(output, task.name, _image_columns(task), IMAGE_SCHEMA)
    return write_shard(output, task.name, _token_columns(task), TOKEN_SCHEMA)


def _image_columns(task: ImageTask) -> dict[str, list[Any]]:
    task.codecs.require()
    root = Path(task.root).resolve()
    columns: dict[str, list[Any]] = {field.name: [] for field in IMAGE_SCHEMA}
    for image_id in task.image_ids:
        row = _image_row(root / image_id, task.spec, task.codecs)
        for name, value in {"image_id": image_id, "encoding": "raw", **row}.items():
            columns[name].append(value)
    return columns


def _image_row(path: Path, spec: ImageSpec, codecs: Codecs) -> dict[str, Any]:
    """Decode one file; what is wrong with it ends here, as a status."""
    try:
        try:
            decoded = decode(path.read_bytes(), spec)
        except OSError as error:
            raise BadImage(Reason.IMAGE_MISSING, f"{error.strerror} when reading") from None
        pixels = square(decoded.image, spec, codecs.resizer)
    except BadImage as bad:
        return {
            "status": str(bad.reason), "detail": bad.detail,
            "source_width": None, "source_height": None, "pixels": None,
        }  # fmt: skip
    return {
        "status": "ok", "detail": "", "source_width": decoded.source_width,
        "source_height": decoded.source_height, "pixels": pixels.tobytes(),
    }  # fmt: skip


def _token_columns(task: TokenTask) -> dict[str, list[Any]]:
    tokenizer = load_tokenizer(task.tokenizer)
    if tokenizer_facts(tokenizer).fingerprint != task.fingerprint:
        raise DataError(
            f"tokenizer: {task.tokenizer} on this worker differs from the driver's; "
            "give every node the same files and library versions"
        )
    encoded = encode_batch(task.records, tokenizer, task.template)
    return {
        "sample_id": [record.sample_id for record in task.records],
        "source": [record.source for record in task.records],
        "input_ids": [row.input_ids for row in encoded],
        "label_spans": [row.label_spans for row in encoded],
        "text_length": [row.text_length for row in encoded],
        "num_trained": [row.num_trained for row in encoded],
        "image_ids": [list(ids) for ids in task.image_ids],
        "llava_length": [llava_length(record) for record in task.records],
    }


def _finish(plan: BuildPlan, output: Path, facts: dict[str, ShardFacts]) -> Manifest:
    """Join verdicts and statuses: selection, quarantine, then the manifest."""
    tokens = [facts[task.name] for task in plan.token_tasks()]
    views = _view_facts(plan, facts)
    verdicts = _image_verdicts(output, views, plan.image_ids)
    selection = _select(plan, output, tokens, verdicts)
    check_quarantined(plan.entries, plan.config.max_quarantined)
    _write_quarantine(output, plan.entries)
    selected = write_shard(output, "selection.arrow", selection, SELECTION_SCHEMA)
    shards = [*tokens, *(shard for view in views.values() for shard in view.shards), selected]
    load_tokenizer(plan.config.tokenizer).save_pretrained(str(output / TOKENIZER))
    manifest = Manifest(
        format=FORMAT,
        fingerprint=digest([[shard.path, shard.sha256] for shard in shards]),
        plan=plan.digests,
        tokenizer=asdict(plan.tokenizer),
        template=plan.template.name,
        image_token=-200,
        counts=_counts(plan, selected.rows),
        tokens=tokens,
        views=views,
        selection=selected,
        versions={
            name: importlib.metadata.version(name)
            for name in ("lapilli", "pyarrow", "pillow", "tokenizers", "transformers", "ray")
        },
    )
    write_manifest(output, manifest)
    return read_manifest(output)


def _view_facts(plan: BuildPlan, facts: dict[str, ShardFacts]) -> dict[str, ViewFacts]:
    tasks = plan.image_tasks()
    return {
        view: ViewFacts(
            asdict(spec),
            asdict(plan.codecs[view]),
            plan.images_per_shard(view),
            [facts[task.name] for task in tasks if task.name.startswith(f"images/{view}/")],
        )
        for view, spec in plan.config.views.items()
    }


def _image_verdicts(
    output: Path, views: dict[str, ViewFacts], image_ids: list[str]
) -> dict[str, Verdict]:
    """The images that some view could not use. Pixels are not read."""
    bad: dict[str, Verdict] = {}
    for view in views.values():
        for shard in view.shards:
            table = open_table(output, shard).select(["image_id", "status", "detail"])
            status = table["status"].to_numpy()
            for row in np.flatnonzero(status != "ok"):
                image_id = table["image_id"][int(row)].as_py()
                detail = f"{image_id}: {table['detail'][int(row)].as_py()}"
                bad.setdefault(image_id, Verdict(Reason(status[row]), detail))
    return bad


def _select(
    plan: BuildPlan, output: Path, tokens: list[ShardFacts], bad_images: dict[str, Verdict]
) -> dict[str, list[Any]]:
    """Columns of the selection; an entry that falls out here gets its verdict."""
    columns: dict[str, list[Any]] = {field.name: [] for field in SELECTION_SCHEMA}
    rows = _token_rows(output, tokens)
    for entry, images in zip(plan.entries, plan.entry_images, strict=True):
        if not entry.verdict.kept:
            continue
        row = next(rows)
        if row["sample_id"] != entry.sample_id:
            raise RuntimeError(f"token row {row['sample_id']} where {entry.sample_id} was planned")
        entry.verdict = _late_verdict(row, images, bad_images)
        if entry.verdict.kept:
            row["image_slots"] = [plan.slots[image_id] for image_id in images]
            for name in columns:
                columns[name].append(row[name])
    return columns


def _token_rows(output: Path, tokens: list[ShardFacts]) -> Iterator[dict[str, Any]]:
    names = ["sample_id", "text_length", "num_trained", "llava_length"]
    for number, shard in enumerate(tokens):
        table = open_table(output, shard).select(names)
        for place, row in enumerate(table.to_pylist()):
            yield {**row, "token_shard": number, "token_row": place}


def _late_verdict(
    row: dict[str, Any], images: tuple[str, ...], bad_images: dict[str, Verdict]
) -> Verdict:
    """The verdict that needed pixels or tokens."""
    for image_id in images:
        if image_id in bad_images:
            return bad_images[image_id]
    if row["num_trained"] == 0:
        return Verdict(Reason.NO_TRAINED_TOKEN, "no token of this record is trained")
    return Verdict()


def _write_quarantine(output: Path, entries: list[Entry]) -> None:
    bad = [entry for entry in entries if not entry.verdict.kept]
    table = pa.table(
        {
            "source": pa.array([entry.source for entry in bad], pa.string()),
            "record_id": pa.array([entry.record_id for entry in bad], pa.string()),
            "sample_id": pa.array([entry.sample_id for entry in bad], pa.string()),
            "reason": pa.array([str(entry.verdict.reason) for entry in bad], pa.string()),
            "detail": pa.array([entry.verdict.detail for entry in bad], pa.string()),
            "record": pa.array([json.dumps(entry.raw) for entry in bad], pa.string()),
        }
    )
    write_atomic(output / "quarantine.parquet", lambda path: pq.write_table(table, path))


def _counts(plan: BuildPlan, kept: int) -> dict[str, Any]:
    reasons = Counter(str(e.verdict.reason) for e in plan.entries if not e.verdict.kept)
    return {
        "read": len(plan.entries),
        "kept": kept,
        "quarantined": sum(reasons.values()),
        "reasons": dict(sorted(reasons.items())),
        "images": len(plan.image_ids),
        "repairs": dict(sorted(plan.repairs.items())),
        "sources": dict(Counter(entry.source for entry in plan.entries)),
    }
