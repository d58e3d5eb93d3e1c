"""`python -m pipelines.benchmarks plan_scale`: time and memory of planning by the records.

Each size is planned in a process of its own, with a picture of its own for every record of the
published mixture's share that has one: no two share one, so images cost what they can at most. Then
the selection and the inputs of its dataset are made, of token rows that are made up. The floor
parses the same bytes by C's `json`, lists the folders and asks for each picture's size.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pipelines.benchmarks.harness import clock, provenance, publish
from pipelines.cli.command import UsageError, parse

if TYPE_CHECKING:
    from lapilli.data.planning.build_plan import BuildPlan

__all__ = ["PlanScaleConfig", "main", "make_records"]

TEXT_ONLY = 40_688 / 665_298  # of LLaVA-1.5's mixture
WORDS = ("a", "the", "of", "is", "what", "man", "red", "car", "street", "two", "image", "with")
BODIES = 4096
FOLDERS = {
    "coco/train2017": 0.58, "gqa/images": 0.115, "ocr_vqa/images": 0.13,
    "textvqa/train_images": 0.035, "vg/VG_100K": 0.08, "vg/VG_100K_2": 0.06,
}  # fmt: skip
SHOWN = {
    "records": "records", "images": "images", "s": "seconds", "driver's CPU s": "cpu_seconds",
    "floor CPU s": "floor_cpu_seconds", "MB at first": "start_mb", "peak MB": "peak_mb",
    "own MB": "own_mb", "B a record more": "slope", "MB on disk": "temporary_mb",
    "finish peak MB": "finish_peak_mb", "own MB then": "finish_own_mb",
}  # fmt: skip


@dataclass(frozen=True)
class PlanScaleConfig:
    """What is measured.

    Attributes:
        folder: Annotations and pictures, which are kept.
        records: Sizes to plan, from the least to the most.
        here: Scan in the planning process, without Ray.
        made_up: Plan without files: what tasks give back and the names in the folders are made up,
            so that millions of records show what the driver alone takes.
        measure: Plan this size in this process and print what it took; a run calls itself so.
        floor: Take the floor of this size in this process; as `measure`.
        save: Add rows to `results/plan_scale.csv`.
    """

    folder: str
    records: list[int] = field(default_factory=lambda: [100_000, 665_298, 1_000_000])
    here: bool = False
    made_up: bool = False
    measure: int = 0
    floor: int = 0
    save: bool = True


def main(argv: Sequence[str]) -> int:
    """Entry point."""
    config = parse(PlanScaleConfig, argv, "Time and memory of a build's plan by its records.")
    root = Path(config.folder)
    if config.measure or config.floor:
        figures = _planned(root, config) if config.measure else _floor(root, config.floor)
        sys.stdout.write(f"{json.dumps(figures)}\n")
        return 0
    rows: list[dict[str, Any]] = []
    for records in sorted(config.records):
        row: dict[str, Any] = {"records": records, "json_mb": "", "floor_cpu_seconds": ""}
        if not config.made_up:
            row["json_mb"] = make_records(root, records).stat().st_size // 10**6
            row |= _apart(config, f"--floor={records}")
        row |= _apart(config, f"--measure={records}")
        more = records - rows[0]["records"] if rows else 0
        grown = (row["own_mb"] - rows[0]["own_mb"]) * 1e6 if rows else 0
        row["slope"] = round(grown / more) if more else ""
        rows.append(row)
    publish(
        "plan_scale", provenance(("pyarrow", "ray"), "plan_scale", argv), rows, SHOWN,
        title="A build's plan by records", save=config.save,
    )  # fmt: skip
    return 0


def _apart(config: PlanScaleConfig, flag: str) -> dict[str, Any]:
    """What a process of its own measures.

    Raises:
        UsageError: It failed; its last line.
    """
    run = "import sys; from pipelines.benchmarks.plans.plan_scale import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", run]  # the libraries of other topics are not loaded
    command += [f"--folder={config.folder}", f"--here={json.dumps(config.here)}"]
    command += [f"--made_up={json.dumps(config.made_up)}", flag]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"{flag}: exit code {done.returncode}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.strip().rpartition("\n")[2])


# The material ----------------------------------------------------------------------------------


def make_records(root: Path, records: int) -> Path:
    """Write an array of conversations and an empty file for each picture, unless they are there.

    Args:
        root: The data's folder.
        records: How many; pictures are numbered as they are, so that larger sets share them.

    Returns:
        The annotation file.
    """
    path = root / f"mix_{records}.json"
    if path.exists():
        return path
    rng = random.Random(0)
    bodies = [_conversation(rng) for _ in range(BODIES)]
    for folder in FOLDERS:
        (root / folder).mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write("[")
        for number in range(records):
            body, image = bodies[number % BODIES], ""
            if rng.random() < TEXT_ONLY:
                body = body.replace("<image>", "this")
            else:
                key = f"{_folder(number)}/{number:012d}.jpg"
                os.close(os.open(root / key, os.O_CREAT))
                image = f'"image": "{key}", '
            comma = ",\n" if number else ""
            file.write(f'{comma}{{"id": "{number:012d}", {image}"conversations": {body}}}')
        file.write("]")
    temporary.replace(path)
    return path


def _folder(number: int) -> str:
    """The folder of a picture, in about the published shares."""
    place = (number * 0.618033988749895) % 1.0
    for folder, share in FOLDERS.items():
        if (place := place - share) < 0:
            return folder
    return "coco/train2017"


def _conversation(rng: random.Random) -> str:
    turns: list[dict[str, str]] = []
    for turn in range(rng.choice((1, 2, 3, 5, 8))):
        words = " ".join(rng.choices(WORDS, k=12))
        marker = "<image>\n" if turn == 0 else ""
        turns.append({"from": "human", "value": f"{marker}{words}?"})
        turns.append({"from": "gpt", "value": " ".join(rng.choices(WORDS, k=50))})
    return json.dumps(turns)


# One size in a process of its own --------------------------------------------------------------


def _planned(root: Path, config: PlanScaleConfig) -> dict[str, Any]:
    """Plan a size, then make what finishing its build makes of the plan."""
    from lapilli.data.config import BuildConfig, SourceConfig
    from lapilli.data.images.view import ImageSpec
    from lapilli.data.mounts import locate
    from lapilli.data.planning.parts.read_sources import Reading
    from lapilli.data.planning.parts.run_scans import scan_here
    from lapilli.data.planning.plan import plan_build
    from lapilli.data.text.encode import load_tokenizer, train_tokenizer
    from pipelines.benchmarks.plans.made_up_parts import (
        made_up_folder,
        made_up_parts,
        write_stub,
    )

    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer([" ".join(WORDS)], folder, vocab_size=280)
        load_tokenizer(folder)
        build = BuildConfig(
            root=str(root),
            output=f"{folder}/none",
            tokenizer=folder,
            template="v1",
            sources=[SourceConfig(name="mix", annotations=f"mix_{config.measure}.json")],
            views={"clip336": ImageSpec(size=336, fill=(122, 116, 104), aspect="pad")},
        )
        reading = Reading(scanner=scan_here) if config.here else Reading()
        if config.made_up:
            write_stub(root, config.measure)
            reading = Reading(1, partial(made_up_parts, config.measure))
            locate.open_folder = partial(made_up_folder, config.measure)  # of this process alone
        start, used = _memory(), resource.getrusage(resource.RUSAGE_SELF)
        began = time.perf_counter()
        with _Peak() as own:
            plan = plan_build(build, reading=reading)
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
        peak, held = _memory("VmHWM"), _memory()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
        with _Peak() as finish_own:
            finishing, _ = clock(lambda: _finish(plan, Path(folder)))
        return {
            "images": len(plan.slots),
            "scanned": "made up" if config.made_up else "here" if config.here else "by Ray",
            "seconds": round(seconds, 1),
            "cpu_seconds": round(_cpu(after) - _cpu(used), 1),
            "start_mb": start,
            "held_mb": held,
            "peak_mb": peak,
            "own_mb": own.mb,
            "temporary_mb": int(plan.entries.content_bytes.sum()) // 10**6,
            "finish_cpu_seconds": round(finishing.cpu, 1),
            "finish_peak_mb": _memory("VmHWM"),
            "finish_own_mb": finish_own.mb,
        }


class _Peak:
    """The most memory of this process's own, in MB: without files that are mapped.

    The system takes pages of mapped files back where memory is short.
    """

    def __init__(self) -> None:
        self.mb = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.mb = max(self.mb, _memory("RssAnon"))
            if self._end.wait(0.02):
                return


def _finish(plan: BuildPlan, folder: Path) -> None:
    """The selection and the inputs of a build whose every record has ten tokens."""
    import pyarrow as pa

    from lapilli.data.planning.parts.input_columns import input_columns
    from lapilli.data.planning.selection import select
    from lapilli.data.shards.files import write_shard
    from lapilli.data.shards.schemas import INPUT_SCHEMA, SELECTION_SCHEMA

    count = len(plan.entries.kept)
    names = plan.entries.names_of(plan.entries.kept)
    tens = pa.array([10], pa.int32()).take(pa.nulls(count, pa.int32()).fill_null(0))
    numbers = ("text_length", "num_trained", "llava_length", "token_shard", "token_row")
    rows = pa.table({"sample_id": names, **dict.fromkeys(numbers, tens)})
    selection = select(plan, rows, {})
    write_shard(folder, "selection.arrow", selection.columns, SELECTION_SCHEMA)
    columns = input_columns(plan.slots, [group.rows for group in plan.token_groups])
    write_shard(folder, "inputs.arrow", columns, INPUT_SCHEMA)


def _floor(root: Path, records: int) -> dict[str, Any]:
    """What nobody can avoid: the JSON parsed once, each folder listed, each file asked for."""
    from lapilli.data.sources.reading.json_ranges import cut_file

    def parse_and_ask() -> None:
        for part in cut_file(root / f"mix_{records}.json") or []:
            text = part.load().decode().rstrip().rstrip(",")
            elements = json.loads(f"[{text}" if part.is_last else f"[{text}]")
            for element in elements:
                if "image" in element:
                    (root / element["image"]).stat()
        for folder in FOLDERS:
            with os.scandir(root / folder) as found:
                for item in found:
                    item.is_file()

    taken, _ = clock(parse_and_ask)
    return {"floor_cpu_seconds": round(taken.cpu, 1)}


def _memory(name: str = "VmRSS") -> int:
    """MB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return (
        next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024 // 10**6
    )


def _cpu(used: resource.struct_rusage) -> float:
    return used.ru_utime + used.ru_stime
