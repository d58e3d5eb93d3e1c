"""Get the published files that a recipe needs: annotations, archives of images, lists of images.

lapilli download --config llava15/finetune_data --root playground/data [--dry_run]
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import zipfile
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, cast

from lapilli.data.errors import DataError
from lapilli.data.io.atomic import write_atomic, write_text
from lapilli.data.io.printable import bytes_text
from lapilli.data.io.whole_file import MOST_LINES, read_whole
from lapilli.data.io.writer_lock import only_writer
from lapilli.data.mounts.keys import is_inside
from lapilli.data.mounts.published import OCR_VQA
from lapilli.data.record import excerpt
from pipelines.check import CheckConfig, check
from pipelines.cli.command import parse, progress_bar, run, say, say_title
from pipelines.downloads.catalog import HUGGING_FACE, Needed, needed
from pipelines.downloads.transfer import ATTEMPTS, Stopped, Unreachable, fetch, part_of

__all__ = ["DownloadConfig", "download", "main"]

DEAD = f"{PurePosixPath(OCR_VQA).parent}/dead_addresses.jsonl"
MEGABYTE = 10**6
LIST_ATTEMPTS = 3  # for an image of a list: many of its addresses are dead
SPARE = 0.02  # of the disk that stays free


@dataclass(frozen=True)
class DownloadConfig(CheckConfig):
    """A recipe for `preprocess`, of which only the sources are looked at.

    Attributes:
        root: Folder that the files go to; nothing is written outside of it.
        dry_run: Say what is there, what would be got and what is got by hand, without a network.
        parallel: Files at once.
        ocr_vqa_list: OCR-VQA's dataset.json, whose images are got one by one instead of the archive
            that others have published. Dead addresses go to ocr_vqa/dead_addresses.jsonl.
        check_after: Check the recipe's records and images when all is there.
    """

    dry_run: bool = False
    parallel: int = 4
    ocr_vqa_list: str = ""
    check_after: bool = True


@dataclass(frozen=True)
class Failure:
    """A file that was not got, and why."""

    name: str
    address: str
    why: str


def download(config: DownloadConfig) -> int:
    """Get what is missing; 1 if something is missing still, or a record cannot be used.

    Raises:
        DataError: The root cannot be written, a place leads out of it, or the disk is too small.
    """
    root = Path(config.root)
    if config.parallel < 1:
        raise DataError(f"parallel: {config.parallel}; expected at least 1")
    if not config.sources:
        raise DataError("sources: none; name a recipe with --config, e.g. llava15/finetune_data")
    images = _listed(Path(config.ocr_vqa_list)) if config.ocr_vqa_list else {}
    hub = os.environ.get("HF_ENDPOINT", HUGGING_FACE).rstrip("/")
    wanted = needed(config.sources, hub, with_ocr_vqa=not images)
    missing = [one for one in wanted if not one.is_there(root)]
    _say_plan(root, wanted, missing, images)
    if config.dry_run:
        return 0
    if root.exists() and not root.is_dir():
        raise DataError(f"root: {root} is a file; expected a folder")
    with only_writer(root, "downloaded"):
        failures = _get(root, [one for one in missing if one.address], images, config.parallel)
        for one in missing:
            _unpack(root, one)
    by_hand = [one for one in missing if one.how and (one.address or not one.is_there(root))]
    for failure in failures:
        say(f"not got: {failure.name}: {failure.why}")
    for one in by_hand:
        say(f"by hand: {one.place}: {one.how}")
    dead = [failure for failure in failures if failure.name.startswith(f"{OCR_VQA}/")]
    if images:
        say(f"{len(dead):,} of {len(images):,} addresses of OCR-VQA's list are dead: {root / DEAD}")
    if len(dead) < len(failures) or any(not one.address for one in by_hand):
        return 1
    return _checked(config) if config.check_after else 0


def _checked(config: DownloadConfig) -> int:
    say_title("check")
    settings = {one.name: getattr(config, one.name) for one in fields(CheckConfig)}
    found = check(CheckConfig(**settings))
    return 0 if found.clean else 1


def _say_plan(
    root: Path, wanted: Sequence[Needed], missing: Sequence[Needed], images: dict[str, str]
) -> None:
    for one in wanted:
        size = f", {one.gigabytes:g} GB" if one.gigabytes else ""
        terms = f"; licence: {one.licence}" if one.licence else ""
        if one not in missing:
            say(f"there: {one.place}")
        elif one.address:
            say(f"get: {one.place}{size} from {one.address}{terms}")
        if one in missing and one.how:
            say(f"by hand: {one.place}: {one.how}")
    if images:
        say(f"get: {len(images):,} images of OCR-VQA's list to {OCR_VQA}")
    gigabytes = sum(one.gigabytes for one in missing if one.address)
    say(f"about {gigabytes:.1f} GB to get into {root}, of the sizes that are known")


def _get(
    root: Path, missing: Sequence[Needed], images: dict[str, str], parallel: int
) -> list[Failure]:
    """Get the files, some at once; those that were not got."""
    root.mkdir(parents=True, exist_ok=True)
    jobs = [(one.place, one.address, one) for one in missing]
    targets = {place: _target(root, place) for place, _, _ in jobs}
    _require_space(root, missing)
    rest = {f"{OCR_VQA}/{name}.jpg": address for name, address in images.items()}
    targets |= {place: _target(root, place) for place in rest}
    rest = {place: address for place, address in rest.items() if not targets[place].exists()}
    stop = threading.Event()
    failures: list[Failure] = []
    with progress_bar() as bar, _pool(parallel, stop) as pool:
        bars = {place: bar.add_task(f"{PurePosixPath(place).name} MB") for place, _, _ in jobs}
        listed = bar.add_task("images of the list", total=len(rest)) if rest else None

        def get(place: str, address: str, one: Needed | None) -> Failure | None:
            def show(done: int, total: int | None) -> None:
                if place in bars:
                    whole = None if total is None else total // MEGABYTE
                    bar.update(bars[place], completed=done // MEGABYTE, total=whole)

            target = targets[place]
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                fetch(
                    address, target, one.kind if one else "image", on_bytes=show, stop=stop,
                    attempts=ATTEMPTS if one else LIST_ATTEMPTS,
                )  # fmt: skip
            except Unreachable as error:
                return Failure(place, address, str(error))
            finally:
                if one is None and listed is not None:
                    bar.advance(listed)
            return None

        todo = iter([*jobs, *((place, address, None) for place, address in rest.items())])
        failures += _run(pool, get, todo, parallel)
    if images:
        dead = [one for one in failures if one.name.startswith(f"{OCR_VQA}/")]
        lines = (
            json.dumps({"id": Path(o.name).stem, "address": o.address, "why": o.why}) for o in dead
        )
        write_text(root / DEAD, "".join(f"{line}\n" for line in lines))
    return failures


def _run(pool: ThreadPoolExecutor, get: Any, todo: Iterator[Any], parallel: int) -> list[Failure]:
    """Keep a few files on their way: a list may have a million."""
    found: list[Failure] = []
    running: set[Future[Failure | None]] = set()
    is_over = False
    while running or not is_over:
        while not is_over and len(running) < 2 * parallel:
            job = next(todo, None)
            is_over = job is None
            if job is not None:
                running.add(pool.submit(get, *job))
        done, running = wait(running, return_when=FIRST_COMPLETED)
        found += [failure for one in done if (failure := one.result()) is not None]
    return found


@contextmanager
def _pool(parallel: int, stop: threading.Event) -> Generator[ThreadPoolExecutor]:
    """Threads that end soon when this one is interrupted."""
    pool = ThreadPoolExecutor(parallel)
    try:
        yield pool
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _target(root: Path, place: str) -> Path:
    """The path of a place, which links may not lead out of the root.

    Raises:
        DataError: They do, or the place does.
    """
    target = root / place
    if not is_inside(place) or not target.parent.resolve().is_relative_to(root.resolve()):
        raise DataError(
            f"root: {excerpt(place)} leads out of {root}; expected a place below it; take the link "
            "away, or name the folder it leads to as the root"
        )
    return target


def _require_space(root: Path, missing: Sequence[Needed]) -> None:
    want = sum(one.gigabytes for one in missing) * 10**9
    parts = [part_of(root / one.place) for one in missing]
    there = sum(part.stat().st_size for part in parts if part.exists())
    usage = shutil.disk_usage(root)
    free = usage.free - SPARE * usage.total
    if want - there > free:
        raise DataError(
            f"root: {root} has {bytes_text(int(max(0, free)))} to spare, {bytes_text(int(want))} "
            "are needed; free space, or choose another --root"
        )


def _unpack(root: Path, one: Needed) -> None:
    """Write the files of an archive that are wanted beside it."""
    archive = root / one.place
    wanted = [name for name in one.members if not (root / name).exists()]
    if not wanted or not archive.is_file():
        return
    with zipfile.ZipFile(archive) as opened:
        for name in wanted:
            found = [member for member in opened.infolist() if Path(member.filename).name == name]
            if len(found) != 1:
                say(f"{archive} has {len(found)} files called {name}; expected one")
                continue

            def write(temporary: Path, member: zipfile.ZipInfo = found[0]) -> None:
                with opened.open(member) as source, temporary.open("wb") as target:
                    shutil.copyfileobj(source, target)

            write_atomic(_target(root, name), write)


def _listed(path: Path) -> dict[str, str]:
    """Addresses by image of OCR-VQA's `dataset.json`.

    Raises:
        DataError: It cannot be read, or is of another form.
    """
    try:
        found: object = json.loads(read_whole(path, MOST_LINES))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"ocr_vqa_list: {path} cannot be read ({excerpt(str(error))}); expected dataset.json "
            "of OCR-VQA, which its page links to"
        ) from None
    rows = cast("dict[str, object]", found) if isinstance(found, dict) else {}
    addresses: dict[str, str] = {}
    for name, row in rows.items():
        address = cast("dict[str, object]", row).get("imageURL") if isinstance(row, dict) else None
        if not isinstance(address, str) or not address.startswith(("http://", "https://")):
            raise DataError(
                f"ocr_vqa_list: {path}: {excerpt(name)} has no imageURL; expected dataset.json of "
                "OCR-VQA"
            )
        if not is_inside(name) or "/" in name or name in ("", "."):
            raise DataError(f"ocr_vqa_list: {path}: {excerpt(name)} is no name of an image")
        addresses[name] = address
    if not addresses:
        raise DataError(f"ocr_vqa_list: {path} has no addresses; expected dataset.json of OCR-VQA")
    return addresses


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    config = parse(DownloadConfig, argv, "Get the published files that a recipe needs.")
    if not config.root:
        raise DataError("root: left out; expected --root FOLDER that the files go to")
    try:
        return download(config)
    except Stopped:
        raise KeyboardInterrupt from None


if __name__ == "__main__":
    run(main)
