"""Decode every image on all cores and report those that fail.

Memory is bounded: a few batches of places are on their way, and a worker holds one image within
`max_pixels`.
"""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TypeAlias

from lapilli.data.images.view import BadImage, ImageSpec, Note, decode
from lapilli.data.mounts import Located, read_image
from lapilli.data.record import Reason, Verdict

__all__ = ["verify_image", "verify_images"]

BATCH = 32  # images handed to a worker at once
Places: TypeAlias = tuple[Located, ...]


@dataclass
class Found:
    """What was found in some images."""

    bad: list[tuple[str, Verdict]] = field(default_factory=list[tuple[str, Verdict]])
    notes: Counter[Note] = field(default_factory=Counter[Note])


def verify_image(
    root: Path, place: Located, specs: Sequence[ImageSpec], notes: Counter[Note] | None = None
) -> Verdict:
    """Decode an image as every view would; its peculiarities are counted in `notes`."""
    found: set[Note] = set()
    try:
        data = read_image(root, place)
        for spec in specs:
            found.update(decode(data, spec).notes)
    except BadImage as bad:
        return Verdict(bad.reason, f"{place.image_id}: {bad.detail}")
    if notes is not None:
        notes.update(found)
    return Verdict()


def verify_images(
    places: Iterable[Located],
    root: Path,
    specs: Sequence[ImageSpec],
    *,
    workers: int = 0,
    notes: Counter[Note] | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Verdict]:
    """Decode images in processes of their own.

    Args:
        places: The images.
        root: The dataset's root.
        specs: The views; views that decode alike are decoded once.
        workers: Processes; 0 takes every core.
        notes: Counts the images that are used in spite of something odd.
        on_progress: Called with the number of images looked at.

    Returns:
        The verdict on each bad image, by image id. One that kills its decoder is among them.
    """
    workers = workers or len(os.sched_getaffinity(0))
    # what decoding does not look at is left out
    distinct = list(
        {
            replace(s, resizer="auto", fill=s.colour if s.alpha == "mean" else (0, 0, 0)): s
            for s in specs
        }.values()
    )
    remaining = iter(places)
    batches = iter(lambda: tuple(islice(remaining, BATCH)), ())
    bad: dict[str, Verdict] = {}
    done = 0
    for count, found in _run(batches, root, distinct, workers):
        bad.update(found.bad)
        if notes is not None:
            notes.update(found.notes)
        done += count
        on_progress(done)
    return bad


def _run(
    batches: Iterator[Places], root: Path, specs: list[ImageSpec], workers: int
) -> Iterator[tuple[int, Found]]:
    """Run batches in a pool; if one kills its worker, a new pool continues with the rest."""
    exhausted = False
    while not exhausted:
        pending: dict[Future[Found], Places] = {}
        unanswered: list[Places] = []  # a pool may break while a batch is handed to it
        with _pool(workers) as pool:
            try:
                while True:
                    for batch in islice(batches, max(0, 3 * workers - len(pending))):
                        unanswered.append(batch)
                        pending[pool.submit(_verify_batch, root, batch, specs)] = batch
                    if not pending:
                        exhausted = True
                        break
                    for future in wait(pending, return_when=FIRST_COMPLETED).done:
                        found = future.result()
                        batch = pending.pop(future)
                        unanswered.remove(batch)
                        yield len(batch), found
            except BrokenProcessPool:
                pass  # every future of the pool has failed; what they held is looked at below
        for batch in unanswered:
            for place in batch:
                yield 1, _verify_alone(root, place, specs)


def _pool(workers: int) -> ProcessPoolExecutor:
    # Not fork: pyarrow's clients have threads.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context)


def _verify_batch(root: Path, places: Places, specs: list[ImageSpec]) -> Found:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, one for each odd palette
        found = Found()
        verdicts = [(p.image_id, verify_image(root, p, specs, found.notes)) for p in places]
    found.bad = [(image_id, verdict) for image_id, verdict in verdicts if not verdict.kept]
    return found


def _verify_alone(root: Path, place: Located, specs: list[ImageSpec]) -> Found:
    """One image in a process of its own, whose end says which image it was."""
    with _pool(1) as pool:
        try:
            return pool.submit(_verify_batch, root, (place,), specs).result()
        except BrokenProcessPool:
            detail = f"{place.image_id}: ends the process that decodes it"
            return Found([(place.image_id, Verdict(Reason.IMAGE_UNDECODABLE, detail))])
