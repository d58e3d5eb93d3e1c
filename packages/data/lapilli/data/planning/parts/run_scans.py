"""Scan a source part by part: its byte ranges by Ray's tasks, or its elements in this process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from lapilli.data.io.remote_path import RemotePath
from lapilli.data.planning.parts.scan_part import (
    PART_BYTES,
    Part,
    ScanSettings,
    scan_elements,
    scan_range,
)
from lapilli.data.ray_session import ray_session, watched
from lapilli.data.sources import get_source
from lapilli.data.sources.reading.json_ranges import BadCut, JsonRange
from lapilli.data.sources.tally import Tally
from lapilli.data.sources.validation import elements_of

__all__ = ["Scanner", "scan_here", "scan_on_ray", "scan_streamed"]

Scanner: TypeAlias = Callable[[Sequence[JsonRange], ScanSettings], Iterator[Part]]
FEWEST = 32  # ranges that are worth starting Ray for: 128 MB of JSON
AHEAD = 2  # times the tasks that run at once, that many are waiting


def scan_here(ranges: Sequence[JsonRange], settings: ScanSettings) -> Iterator[Part]:
    """Scan ranges one after the other in this process.

    Raises:
        BadCut: One is not whole elements.
    """
    for part in ranges:
        yield _whole(scan_range(None, part, settings), part)


def scan_on_ray(ranges: Sequence[JsonRange], settings: ScanSettings) -> Iterator[Part]:
    """Scan ranges by Ray's tasks, the parts in order; a few are scanned in this process.

    A task reads an address itself. The bytes of a file are read here and given to it: other nodes
    may not have the file.

    Raises:
        BadCut: One is not whole elements.
        DataError: Ray does not come up, or has died.
    """
    if len(ranges) < FEWEST:
        yield from scan_here(ranges, settings)
        return
    with ray_session():
        yield from watched(lambda: _scanned(ranges, settings))


def _scanned(ranges: Sequence[JsonRange], settings: ScanSettings) -> Iterator[Part]:
    import ray

    task: Any = ray.remote(num_cpus=1)(scan_range)
    given = ray.put(settings)
    waiting: deque[tuple[JsonRange, Any]] = deque()
    most = max(2, AHEAD * int(ray.cluster_resources().get("CPU", 1)))

    def first() -> Part:
        part, reference = waiting.popleft()
        return _whole(ray.get(reference), part)

    for part in ranges:
        data = None if isinstance(part.place, RemotePath) else part.load()
        waiting.append((part, task.remote(data, part, given)))
        if len(waiting) >= most:
            yield first()
    while waiting:
        yield first()


def _whole(found: Part | None, part: JsonRange) -> Part:
    if found is None:
        raise BadCut(f"{part.place}: no whole elements from byte {part.start} on")
    return found


def scan_streamed(
    root: Path,
    settings: ScanSettings,
    tally: Tally,
    told: Callable[[int], None] = lambda count: None,
    part_bytes: int = PART_BYTES,
) -> Iterator[Part]:
    """Scan a source of any format in this process, from its start.

    Args:
        root: The dataset's root.
        settings: The source and what it is scanned with.
        tally: Takes the members of archives at the end.
        told: Called with the number of elements read, at each one.
        part_bytes: Bytes of a part, about.

    Raises:
        DataError: As the format's reader does.
    """
    reading = get_source(settings.source.format).read(settings.source, root)
    elements = _counted(elements_of(reading, tally), told)
    while len((part := scan_elements(elements, settings, part_bytes)).table):
        yield part


def _counted(elements: Iterator[Any], told: Callable[[int], None]) -> Iterator[Any]:
    for number, element in enumerate(elements, 1):
        told(number)
        yield element
