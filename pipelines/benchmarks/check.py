"""How long `check` takes on the published shape of LLaVA's 665K mixture, and in how much memory.

python -m pipelines.benchmarks.check --folder /tmp/check665k

Makes 665,298 records (1 GB of JSON) over 200,000 image files in LLaVA's folders, 355 of them
missing, in `--folder` (kept for the next run), runs the command in a process of its own and prints
a row of `results/check.csv`.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

__all__ = ["main", "make_mixture"]

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


def make_mixture(root: Path, records: int = RECORDS, files: int = FILES) -> None:
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


def measure(root: Path, *flags: str) -> dict[str, object]:
    """One run of the command: seconds by the clock and of work, the process's largest memory."""
    command = [sys.executable, "-m", "pipelines.check", f"--root={root}", *flags]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode not in (0, 1):
        raise SystemExit(done.stderr)
    print(done.stdout, file=sys.stderr)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),  # what a busy machine does not add
        "peak_mb": used.ru_maxrss // 1024,
        "exit_code": done.returncode,
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--records", type=int, default=RECORDS)
    parser.add_argument("--files", type=int, default=FILES)
    arguments, flags = parser.parse_known_args()
    annotations = arguments.folder / "llava_v1_5_mix665k.json"
    if not annotations.exists():
        make_mixture(arguments.folder, arguments.records, arguments.files)
    row = {
        "records": arguments.records,
        "files": arguments.files,
        "json_mb": annotations.stat().st_size // 10**6,
        "cores": len(os.sched_getaffinity(0)),
        "flags": " ".join(flags),
        **measure(arguments.folder, *flags),
    }
    writer = csv.DictWriter(sys.stdout, list(row))
    writer.writeheader()
    writer.writerow(row)


if __name__ == "__main__":
    main()
