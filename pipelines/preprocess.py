"""Convert annotations and images to a dataset of Arrow shards.

lapilli preprocess --config llava15/finetune_data \
    --root playground/data --output datasets/llava15 --tokenizer lmsys/vicuna-7b-v1.5

The same command again continues where it stopped; with --incremental it brings a dataset to inputs
or settings that have changed and makes only what these touch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lapilli.data.building.driver import BuildReport, build
from lapilli.data.building.runners import check_pool, run_on_ray
from lapilli.data.cluster.places import check_places, places_of
from lapilli.data.cluster.probe import JobPlaces
from lapilli.data.config import BuildConfig
from lapilli.data.images.codecs import replaced_simd
from lapilli.data.io.access import require_writable
from lapilli.data.io.addresses import plain_address
from lapilli.data.io.filesystems import is_remote
from lapilli.data.io.printable import bytes_text
from lapilli.data.planning.build_plan import BuildPlan
from lapilli.data.planning.disk import task_bytes
from lapilli.data.planning.plan import plan_build
from lapilli.data.ray_session import ray_session
from lapilli.data.sources.root_address import with_root_address
from lapilli.data.sources.tally import describe_tally
from pipelines.cli.command import parse, progress_bar, run, say
from pipelines.cli.progress import build_line
from pipelines.cli.views import filled_views
from pipelines.reports.cards import write_dataset_card
from pipelines.reports.dataset_report import IMAGE_NOTES, BuildTime, write_dataset_report


def preprocess(config: BuildConfig) -> BuildReport:
    """Plan and build a dataset, print what was made, and write its report."""
    if not is_remote(config.output):
        require_writable("output", Path(config.output))
    is_cluster = "RAY_ADDRESS" in os.environ
    # a Ray of this machine's own is started where there is a shard to make
    with ray_session() if is_cluster else nullcontext():
        if is_cluster:
            check_pool(config.build)
        check_places(build_places(config), config.build, config.output)
        return _preprocess(config)


def build_places(config: BuildConfig) -> JobPlaces:
    """What every node that builds must see as this one does."""
    root = Path(config.root)
    files = {
        "sources.annotations": [
            str(path)
            for source in config.sources
            for pattern in source.patterns
            for path in [pattern if is_remote(pattern) else root / pattern]
        ],
        "sources.images": [
            plain_address(source.images) if is_remote(source.images) else str(root / source.images)
            for source in config.sources
        ],
    }
    read = {"root": config.root, **files, "tokenizer": config.tokenizer}
    return places_of(read, {"output": config.output})


def _preprocess(config: BuildConfig) -> BuildReport:
    config = replace(config, views=filled_views(config.views))
    say(f"reading {', '.join(name for source in config.sources for name in source.patterns)}")
    with progress_bar() as bar:
        task = bar.add_task("records", total=None)
        plan = plan_build(config, lambda done: bar.update(task, completed=done))
    print_plan(plan)
    with build_line(partial(run_on_ray, pool=config.build, on_note=say)) as runner:
        report = build(plan, runner=runner)
    print_report(report)
    if not is_remote(config.output):
        time = BuildTime(report.seconds, report.shards_built, report.shards_reused)
        say(f"report: {write_dataset_report(Path(config.output), plan.config, time=time)}")
        write_dataset_card(Path(config.output))
    return report


def print_plan(plan: BuildPlan) -> None:
    """Print records, images, disk and codecs of the plan."""
    bad, images = len(plan.entries.verdicts), len(plan.slots) - plan.slots.unused
    codecs = ", ".join(f"{name}: {view.codecs.describe()}" for name, view in plan.views.items())
    say(f"{len(plan.entries)} records, {bad} quarantined so far, {images} images")
    for source, tally in plan.tallies.items():
        for line in describe_tally(tally):
            say(f"  {source}: {line}")
    print_disk(plan)
    say(codecs)
    if replaced := replaced_simd():
        say(f"warning: {replaced}")


def print_disk(plan: BuildPlan) -> None:
    """The disk that the dataset takes, part by part; what an earlier run has left is in it."""
    needed = {name: sum(map(task_bytes, view.tasks())) for name, view in plan.views.items()}
    parts = ", ".join(
        f"{name} ({view.encoding.kind}) {bytes_text(needed[name])}"
        for name, view in plan.views.items()
    )
    tokens = sum(map(task_bytes, plan.token_tasks()))
    targets = {name: sum(map(task_bytes, one.tasks())) for name, one in plan.targets.items()}
    total = sum(needed.values()) + tokens + sum(targets.values())
    parts += "".join(f", targets {name} {bytes_text(size)}" for name, size in targets.items())
    say(f"{bytes_text(total)} of shards: {parts}, tokens {bytes_text(tokens)}")


def print_report(report: BuildReport) -> None:
    """Print what was built and quarantined."""
    counts = report.manifest.counts
    reasons = ", ".join(f"{reason} {count}" for reason, count in counts["reasons"].items())
    repairs = ", ".join(f"{kind} {count}" for kind, count in counts["repairs"].items())
    say(
        f"read {counts['read']} = kept {counts['kept']} + quarantined {counts['quarantined']}"
        + (f" ({reasons})" if reasons else "")
        + (f"; repaired: {repairs}" if repairs else "")
    )
    for note, count in counts["image_notes"].items():
        say(f"{count} images {note}: {IMAGE_NOTES[note]}")
    if report.manifest.mixture["records"] != counts["kept"]:
        print_blend(report.manifest.mixture)
    for view, facts in report.manifest.views.items():
        if facts.encoding["kind"] == "jpeg":
            print_error(f"{view} as jpeg {facts.encoding['quality']}", facts.encoding["error"])
        print_error(f"{view} decoded fast", facts.fast_error)
    for name, target in report.manifest.targets.items():
        found = ", ".join(f"{status} {count}" for status, count in target.statuses.items())
        say(f"targets {name} as {target.storage}: {found}; error {target.error:.2%} of their size")
    unused = counts["unused_images"]
    if unused:
        say(f"{unused} images of an earlier build are no longer used; a new --output omits them")
    say(
        f"{report.shards_built} shards built, {report.shards_reused} reused, {report.seconds:.1f} s"
    )


def print_error(made: str, error: dict[str, float]) -> None:
    """What JPEG or fast decoding has changed of a view's pixels."""
    if error:
        say(
            f"{made}: {error['mean']:.2f} of 255 off on average, at most {error['worst']}, "
            f"PSNR {error['psnr']:.1f} dB"
        )


def print_blend(mixture: dict[str, Any]) -> None:
    """What an epoch consists of, where that is not simply every record kept."""
    held_out = f", {mixture['held_out']} held out" if mixture["held_out"] else ""
    say(f"an epoch: {mixture['records']} records, {mixture['tokens']} tokens{held_out}")
    for name, facts in mixture["sources"].items():
        say(
            f"  {name}: {facts['share']:.2%} of the {mixture['unit']}, {facts['records']} records "
            f"({facts['epochs']:.2f} epochs of {facts['kept'] - facts['held_out']})"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    config = parse(
        BuildConfig, argv, "Turn a mixture into a dataset of Arrow shards.",
        addresses=["output", "root", "tokenizer"],
    )  # fmt: skip
    preprocess(with_root_address(config))
    say(f"dataset: {config.output}")
    return 0


if __name__ == "__main__":
    run(main)
