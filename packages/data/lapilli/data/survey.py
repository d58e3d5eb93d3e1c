"""A look at a mixture before any work: every record's verdict, every image's place, no conversion.

Records pass through one at a time; what stays in memory is counts, ids and the places of the
distinct images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lapilli.data.checks import read_entries
from lapilli.data.config import BuildConfig
from lapilli.data.mounts import Located
from lapilli.data.mounts.published import HOLES, Hole
from lapilli.data.plan import locate_images, open_mount
from lapilli.data.record import Entry, Reason, Verdict
from lapilli.data.tally import Tally

__all__ = ["Example", "Survey", "survey"]

EVERY = 2000  # records between two calls of `on_progress`


@dataclass(frozen=True)
class Example:
    """The first record of a reason in a source."""

    sample_id: str
    detail: str


@dataclass
class Survey:
    """What a mixture holds.

    Attributes:
        read: Records by source.
        bad: Records with a problem, by source and reason.
        examples: The first record of each of these.
        repairs: Keys mended, by kind.
        lost: Folders that are not there, with what to do, by images asked for.
        holes: Images that are known to be bad for everybody, and are bad here.
        images: The distinct images found, by identity.
        tallies: By source, the fields that nothing reads and the members of archives.
    """

    read: Counter[str] = field(default_factory=Counter[str])
    bad: Counter[tuple[str, Reason]] = field(default_factory=Counter[tuple[str, Reason]])
    examples: dict[tuple[str, Reason], Example] = field(
        default_factory=dict[tuple[str, Reason], Example]
    )
    repairs: Counter[str] = field(default_factory=Counter[str])
    lost: Counter[str] = field(default_factory=Counter[str])
    holes: dict[Hole, set[str]] = field(default_factory=dict[Hole, set[str]])
    images: dict[str, Located] = field(default_factory=dict[str, Located])
    tallies: dict[str, Tally] = field(default_factory=dict[str, Tally])

    @property
    def clean(self) -> bool:
        """Whether every record can be trained on, as far as was looked."""
        return not self.bad


def survey(
    config: BuildConfig,
    bad_images: Mapping[str, Verdict] | None = None,
    *,
    on_progress: Callable[[int], None] = lambda done: None,
    on_bad: Callable[[Entry], None] = lambda entry: None,
) -> Survey:
    """Check every record of every source and find every image.

    Args:
        config: Root and sources; tokenizer, template and output are not looked at.
        bad_images: Verdict by image id, of images that have been decoded.
        on_progress: Called with the number of records read.
        on_bad: Called with each record that has a problem.

    Raises:
        DataError: An annotation file is missing or broken.
    """
    found = Survey()
    root = Path(config.root)
    done = 0
    for source in config.sources:
        mount = open_mount(source, config, root)
        tally = found.tallies[source.name] = Tally()
        for entry in read_entries(source, root, tally=tally):
            checked, places = locate_images(entry, mount)
            verdict = checked.verdict
            for place in places:
                found.images.setdefault(place.image_id, place)
                verdict = verdict if not verdict.kept else _of_image(place, bad_images or {})
            if not verdict.kept:
                checked = replace(checked, verdict=verdict)
                _note(found, checked)
                on_bad(checked)
            done += 1
            if done % EVERY == 0:
                on_progress(done)
            found.read[source.name] += 1
        found.repairs.update(mount.repairs)
        found.lost.update(mount.lost)
    on_progress(done)
    return found


def _of_image(place: Located, bad_images: Mapping[str, Verdict]) -> Verdict:
    """The verdict on an image that was found: an empty file needs no decoder."""
    size = place.size if place.member is None else place.member.size
    if size == 0:
        return Verdict(Reason.IMAGE_UNDECODABLE, f"{place.image_id}: an empty file")
    return bad_images.get(place.image_id, Verdict())


def _note(found: Survey, entry: Entry) -> None:
    reason = entry.verdict.reason
    if reason is None:
        return
    key = (entry.source, reason)
    found.bad[key] += 1
    found.examples.setdefault(key, Example(entry.sample_id, entry.verdict.detail))
    images = entry.record.images if entry.record is not None else ()
    for hole in HOLES:
        keys = {image for image in images if hole.holds(image, entry.verdict)}
        if keys:
            found.holes.setdefault(hole, set()).update(keys)
