"""Opening a dataset of LLaVA-1.5's size, in a fresh process each time: seconds, and memory it adds.

The floor maps the selection and reads the columns that a run needs with pyarrow alone: nothing is
checked, no image shard is looked at.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from pipelines.benchmarks.harness import (
    Bar,
    Spread,
    by_turns,
    draw_bars,
    provenance,
    publish,
)
from pipelines.benchmarks.material.large import RECORDS, write_large
from pipelines.cli.command import UsageError, parse

__all__ = ["OpenConfig", "main"]

SHOWN = {
    "side": "side", "seconds": "seconds", "least": "low", "most": "high", "MB added": "megabytes",
}  # fmt: skip
COLUMNS = ("token_shard", "token_row", "text_length", "num_trained", "repeats")


@dataclass(frozen=True)
class OpenConfig:
    """What is measured.

    Attributes:
        records: Records of the dataset.
        shards: Image shards it has; all but four hold nothing, which opening does not look at.
        rounds: Turns that count.
        warm: A round before them that does not count.
        plot: A PNG, SVG or PDF file for the picture.
        save: Add rows to `results/open.csv`.
    """

    records: int = RECORDS
    shards: int = 3400
    rounds: int = 5
    warm: bool = True
    plot: str = ""
    save: bool = True


def main(argv: Sequence[str]) -> int:
    """Measure, tell, and add a row for each side."""
    config = parse(OpenConfig, argv, "Opening a dataset of 665,298 records.")
    head = provenance(("pyarrow", "numpy"), "open", argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "large"
        write_large(folder, records=config.records, stubs=max(0, config.shards - 4))
        rows = measure(config, folder)
    title = f"{config.records:,} records, {config.shards:,} image shards"
    publish("open", head, rows, SHOWN, title=title, save=config.save)
    if config.plot:
        _draw(Path(config.plot), title, rows, str(head["processor"]))
    return 0


def measure(config: OpenConfig, folder: Path) -> list[dict[str, Any]]:
    """Ours and the floor by turns, a process each time."""
    memory: dict[str, list[float]] = {side: [] for side in SIDES}
    clocks: dict[str, Callable[[], float]] = {
        side: partial(_apart, side, folder, memory[side]) for side in SIDES
    }
    spreads = by_turns(clocks, config.rounds, warm=config.warm)
    return [
        {
            "side": side, "records": config.records, "shards": config.shards,
            "rounds": config.rounds, "seconds": round(spread.median, 4),
            "low": round(spread.low, 4), "high": round(spread.high, 4),
            "megabytes": round(Spread.of(memory[side]).median / 1e6, 1),
        }
        for side, spread in spreads.items()
    ]  # fmt: skip


def _draw(path: Path, title: str, rows: Sequence[dict[str, Any]], processor: str) -> None:
    labels = {"lapilli": "lapilli, checked", "bare": "pyarrow's bare columns"}
    bars = [
        Bar.of(
            row | {"side": labels[row["side"]]}, "seconds",
            "ours" if row["side"] == "lapilli" else "floor", f"s, {row['megabytes']:.0f} MB",
        )
        for row in rows
    ]  # fmt: skip
    draw_bars(
        path, f"Opening {title}", "seconds in a fresh process", bars,
        f"{processor}. MB: memory added that no file stands behind. Line: least and most of "
        f"{rows[0]['rounds']} rounds.",
    )  # fmt: skip


def _apart(side: str, folder: Path, memory: list[float]) -> float:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.benchmarks.opening", side, str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UsageError(f"{side}: {done.stderr.strip().splitlines()[-1]}")
    seconds, added = json.loads(done.stdout)
    memory.append(added)
    return float(seconds)


def _open(folder: Path) -> object:
    from lapilli.data.dataset.dataset import open_dataset

    dataset = open_dataset(folder, view="wide", image_tokens=576)
    return dataset, dataset.lengths, dataset.has_images, dataset.num_trained


def _bare(folder: Path) -> object:
    import pyarrow as pa

    with pa.memory_map(str(folder / "selection.arrow"), "r") as file:
        table = pa.ipc.open_file(file).read_all()
    return [table[name].to_numpy().copy() for name in COLUMNS]


SIDES: dict[str, Callable[[Path], object]] = {"lapilli": _open, "bare": _bare}


def _resident() -> int:
    """Bytes of this process that no file stands behind: mapped shards are everybody's."""
    with Path("/proc/self/smaps_rollup").open(encoding="utf-8") as file:
        lines = dict(line.split(":", 1) for line in file if ":" in line)
    return int(lines["Anonymous"].split()[0]) * 1024


def _serve(side: str, folder: Path) -> None:
    for name in ("pyarrow.compute", "lapilli.data.dataset.dataset"):  # importing is not opening
        import_module(name)
    before = _resident()
    started = time.perf_counter()
    held = SIDES[side](folder)
    print(json.dumps([time.perf_counter() - started, _resident() - before]))
    del held


if __name__ == "__main__":
    _serve(sys.argv[1], Path(sys.argv[2]))
