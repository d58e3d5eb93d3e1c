"""`python -m pipelines.benchmarks whole`: LLaVA's 665K mixture through `preprocess`, start to end.

665,298 conversations in the published proportions over 20,000 distinct photos of 640x480. The
command runs in a process of its own, as a user would start it; its lines tell when what was done,
and the memory of all its processes is looked at twice a second.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lapilli.data.record import ImagePart, Record
from pipelines.benchmarks.harness import add_row, provenance
from pipelines.benchmarks.material.corpus import conversations
from pipelines.benchmarks.material.photos import photo_name, write_photos
from pipelines.cli.command import UsageError, say

__all__ = ["check", "main", "make_check_files"]

RECORDS = 665_298
FILES = 200_000
MISSING = 355
WORDS = ("a", "the", "of", "is", "what", "man", "red", "car", "street", "two", "image", "with")
FOLDERS = {
    "coco/train2017": ("{:012d}.jpg", 0.42),
    "gqa/images": ("{}.jpg", 0.20),
    "ocr_vqa/images": ("{:010d}.jpg", 0.14),
    "textvqa/train_images": ("{:016x}.jpg", 0.04),
    "vg/VG_100K": ("{}.jpg", 0.12),
    "vg/VG_100K_2": ("{}.jpg", 0.08),
}
SIZE = (640, 480)
TOWER = 336
PACKAGES = ("ray", "torch", "pyarrow", "simplejpeg", "pillow", "tokenizers")


@dataclass
class Watched:
    """What was seen of a command while it ran.

    Attributes:
        seconds: From its start to its end.
        lines: Each line of its output with the seconds at which it came.
        driver: Most memory of the process itself, in bytes.
        everything: Most memory of it and all it started, in bytes; shared pages count once.
    """

    seconds: float = 0.0
    lines: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    driver: int = 0
    everything: int = 0

    def when(self, text: str) -> float:
        """Seconds at which a line with `text` came."""
        return next(at for at, line in self.lines if text in line)


def make_mixture(root: Path, records: int, images: int) -> None:
    """Write photos and annotations, unless an earlier run has."""
    taken = write_photos(root / "coco" / "train2017", images, SIZE)
    say(f"{images:,} photos, {taken / images / 1000:.0f} kB each")
    path = root / f"mix_{records}_{images}.json"
    if path.exists():
        return
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write("[")
        for number, record in enumerate(conversations(records, seed=0)):
            file.write(",\n" * bool(number) + json.dumps(_element(record, number, images)))
        file.write("]")
    temporary.replace(path)


def _element(record: Record, number: int, images: int) -> dict[str, Any]:
    """A record as LLaVA's file has it."""
    turns = [
        {
            "from": {"user": "human", "assistant": "gpt"}[turn.role],
            "value": "".join(
                "<image>" if isinstance(part, ImagePart) else part.text for part in turn.parts
            ),
        }
        for turn in record.turns
    ]
    element: dict[str, Any] = {"id": str(number), "conversations": turns}
    if record.images:
        element["image"] = f"coco/train2017/{photo_name(number % images)}"
    return element


def watch(command: Sequence[str]) -> Watched:
    """Run a command to its end.

    Raises:
        UsageError: It failed; the last lines it wrote.
    """
    seen, started = Watched(), time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ended = threading.Event()
    memory = threading.Thread(target=_watch_memory, args=(process.pid, seen, ended))
    memory.start()
    assert process.stdout is not None
    for line in process.stdout:
        seen.lines.append((time.monotonic() - started, line.rstrip()))
    code = process.wait()
    seen.seconds = time.monotonic() - started
    ended.set()
    memory.join()
    if code:
        raise UsageError(f"exit code {code}: {' / '.join(line for _, line in seen.lines[-3:])}")
    return seen


def _watch_memory(pid: int, seen: Watched, ended: threading.Event) -> None:
    while not ended.wait(0.5):
        sizes = {one: _memory_of(one) for one in _descendants(pid)}
        seen.driver = max(seen.driver, sizes.get(pid, 0))
        seen.everything = max(seen.everything, sum(sizes.values()))


def _descendants(pid: int) -> list[int]:
    """A process and all that it started, over however many others."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(path.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def _memory_of(pid: int) -> int:
    """Proportional memory of a process: pages that n share count an n-th for each."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def main(argv: Sequence[str]) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.benchmarks whole")
    parser.add_argument("--folder", type=Path, required=True, help="inputs (kept) and the dataset")
    parser.add_argument("--tokenizer", required=True, help="hub name or folder")
    parser.add_argument("--records", type=int, default=665_298)
    parser.add_argument("--images", type=int, default=20_000)
    flags = parser.parse_args(argv)
    root, output = flags.folder / "root", flags.folder / "dataset"
    make_mixture(root, flags.records, flags.images)
    shutil.rmtree(output, ignore_errors=True)
    recipe = flags.folder / "recipe.json"
    recipe.write_text(json.dumps(_recipe(flags)), encoding="utf-8")
    seen = watch([
        sys.executable, "-m", "pipelines.preprocess", f"--config={recipe}", f"--root={root}",
        f"--output={output}", f"--tokenizer={flags.tokenizer}",
    ])  # fmt: skip
    for at, line in seen.lines:
        say(f"{at:7.1f} s  {line}")
    add_row("whole", {**provenance(PACKAGES, "whole", argv), **_figures(flags, seen, output)})
    return 0


def _recipe(flags: argparse.Namespace) -> dict[str, Any]:
    return {
        "template": "v1",
        "sources": [{"name": "mix665k", "annotations": f"mix_{flags.records}_{flags.images}.json"}],
        "views": {"clip336": {"size": TOWER, "fill": [122, 116, 104], "aspect": "pad"}},
    }


def _figures(flags: argparse.Namespace, seen: Watched, output: Path) -> dict[str, Any]:
    planned, built = seen.when("quarantined so far"), seen.when("read ")
    disk = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    figures = {
        "records": flags.records,
        "images": flags.images,
        "seconds": round(seen.seconds, 1),
        "plan_seconds": round(planned, 1),
        "shards_seconds": round(built - planned, 1),
        "images_per_second": round(flags.images / (built - planned), 1),
        "driver_peak_mb": seen.driver // 10**6,
        "all_peak_mb": seen.everything // 10**6,
        "disk_gb": round(disk / 1e9, 2),
    }
    say(", ".join(f"{name} {value}" for name, value in figures.items()))
    return figures


# What `check` is timed on ----------------------------------------------------------------------


def make_check_files(root: Path, records: int = RECORDS, files: int = FILES) -> None:
    """Write `llava_v1_5_mix665k.json` and the images, one small picture under every name."""
    rng = random.Random(0)
    keys: list[str] = []
    for folder, (name, share) in FOLDERS.items():
        keys += [f"{folder}/{name.format(n)}" for n in range(round(files * share))]
    picture = _picture()
    lost = {key for key in keys if key.startswith("ocr_vqa")}
    lost = set(sorted(lost)[: min(MISSING, len(lost) // 2)])
    for key in keys:
        if key not in lost:
            (root / key).parent.mkdir(parents=True, exist_ok=True)
            (root / key).write_bytes(picture)
    with (root / "llava_v1_5_mix665k.json").open("w", encoding="utf-8") as file:
        file.write("[")
        for number in range(records):
            file.write(",\n" if number else "")
            # 6 % of the published records are text alone.
            key = None if rng.random() < 0.06 else keys[number % len(keys)]
            json.dump(_record(number, key, rng), file)
        file.write("]")


def _picture() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.effect_noise((32, 24), 40).convert("RGB").save(buffer, "jpeg")
    return buffer.getvalue()


def _record(number: int, key: str | None, rng: random.Random) -> dict[str, object]:
    turns: list[dict[str, str]] = []
    for turn in range(rng.choice((1, 2, 3, 5, 8))):
        marker = "<image>\n" if turn == 0 and key else ""
        words = " ".join(rng.choices(WORDS, k=12))
        turns.append({"from": "human", "value": f"{marker}{words}?"})
        turns.append({"from": "gpt", "value": " ".join(rng.choices(WORDS, k=50))})
    record: dict[str, object] = {"id": f"{number:012d}", "conversations": turns}
    return {**record, "image": key} if key else record


def check(argv: Sequence[str]) -> int:
    """Time `check` on the published shape of LLaVA's 665K mixture, other flags given to it."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.benchmarks check")
    parser.add_argument("--folder", type=Path, required=True, help="inputs, which are kept")
    parser.add_argument("--records", type=int, default=RECORDS)
    parser.add_argument("--files", type=int, default=FILES)
    parser.add_argument("--save", action="store_true", help="add a row to results/check.csv")
    given, flags = parser.parse_known_args(argv)
    annotations = given.folder / "llava_v1_5_mix665k.json"
    if not annotations.exists():
        make_check_files(given.folder, given.records, given.files)
    command = [sys.executable, "-m", "pipelines.check", f"--root={given.folder}", *flags]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    for line in done.stdout.splitlines():
        say(line)
    if done.returncode not in (0, 1):
        raise UsageError(f"exit code {done.returncode}: {done.stderr.strip()}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    row = {
        "records": given.records, "files": given.files,
        "json_mb": annotations.stat().st_size // 10**6, "flags": " ".join(flags),
        "seconds": round(seconds, 1), "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_mb": used.ru_maxrss // 1024, "exit_code": done.returncode,
    }  # fmt: skip
    say(", ".join(f"{name} {value}" for name, value in row.items()))
    if given.save:
        add_row("check", provenance(("pyarrow", "pillow"), "check", argv) | row)
    return 0
