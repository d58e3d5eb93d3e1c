"""Decode every image on all cores and keep nothing but what is wrong; no image ends the run.

Memory is bounded: a few batches of places are on their way, and a worker holds one image within
`max_pixels`.
"""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import TypeAlias

from lapilli.data.images import BadImage, ImageSpec, decode
from lapilli.data.mounts import Located, read_image
from lapilli.data.record import Reason, Verdict

__all__ = ["verify_image", "verify_images"]

BATCH = 32  # images handed to a worker at once
Places: TypeAlias = tuple[Located, ...]
Found: TypeAlias = list[tuple[str, Verdict]]


def verify_image(root: Path, place: Located, specs: Sequence[ImageSpec]) -> Verdict:
    """Decode an image as every view would."""
    try:
        data = read_image(root, place)
        for spec in specs:
            decode(data, spec)
    except BadImage as bad:
        return Verdict(bad.reason, f"{place.image_id}: {bad.detail}")
    return Verdict()


def verify_images(
    places: Iterable[Located],
    root: Path,
    specs: Sequence[ImageSpec],
    *,
    workers: int = 0,
    on_progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Verdict]:
    """Decode images in processes of their own.

    Args:
        places: The images.
        root: The dataset's root.
        specs: The views; views that decode alike are decoded once.
        workers: Processes; 0 takes every core.
        on_progress: Called with the number of images looked at.

    Returns:
        The verdict on each bad image, by image id. One that kills its decoder is among them.
    """
    workers = workers or len(os.sched_getaffinity(0))
    distinct = list({(s.mode, s.orient, s.max_pixels, s.aspect, s.size): s for s in specs}.values())
    remaining = iter(places)
    batches = iter(lambda: tuple(islice(remaining, BATCH)), ())
    bad: dict[str, Verdict] = {}
    done = 0
    for count, found in _run(batches, root, distinct, workers):
        bad.update(found)
        done += count
        on_progress(done)
    return bad


def _run(
    batches: Iterator[Places], root: Path, specs: list[ImageSpec], workers: int
) -> Iterator[tuple[int, Found]]:
    """Batches through a pool; where one kills its worker, a new pool goes on with the rest."""
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
            yield len(batch), [f for place in batch for f in _verify_alone(root, place, specs)]


def _pool(workers: int) -> ProcessPoolExecutor:
    # Not fork: pyarrow's clients have threads.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context)


def _verify_batch(root: Path, places: Places, specs: list[ImageSpec]) -> Found:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, one for each odd palette
        verdicts = [(place.image_id, verify_image(root, place, specs)) for place in places]
    return [(image_id, verdict) for image_id, verdict in verdicts if not verdict.kept]


def _verify_alone(root: Path, place: Located, specs: list[ImageSpec]) -> Found:
    """One image in a process of its own, whose end says which image it was."""
    with _pool(1) as pool:
        try:
            return pool.submit(_verify_batch, root, (place,), specs).result()
        except BrokenProcessPool:
            detail = f"{place.image_id}: ends the process that decodes it"
            return [(place.image_id, Verdict(Reason.IMAGE_UNDECODABLE, detail))]
