"""Scan a mixture without converting it: verdicts of records, locations of images.

Records are streamed; counts, ids and locations of distinct images stay in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lapilli.data.config import BuildConfig
from lapilli.data.io.file_kinds import EMPTY_FILE
from lapilli.data.mounts import Located, Mount
from lapilli.data.mounts.published import HOLES, Hole
from lapilli.data.planning.located_entries import entries_of, locate_images, open_mount
from lapilli.data.planning.progress import paced
from lapilli.data.record import Entry, Reason, Verdict
from lapilli.data.sources.tally import Tally
from lapilli.data.sources.validation import Rules, plain_rules

__all__ = ["Example", "Survey", "survey"]


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
        mended: The first key of each kind, with the image it is read from.
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
    mended: dict[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])
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
    rules: Rules = plain_rules,
    on_progress: Callable[[int], None] = lambda done: None,
    on_bad: Callable[[Entry], None] = lambda entry: None,
) -> Survey:
    """Check every record of every source and find every image.

    Args:
        config: Root and sources; tokenizer, template and output are not looked at.
        bad_images: Verdict by image id, of images that have been decoded.
        rules: How a build's template takes records (`rules.record_rules`), if one is given.
        on_progress: Called with the number of records read, about once a second.
        on_bad: Called with each record that has a problem.

    Raises:
        DataError: An annotation file is missing or broken, or a source has no record.
    """
    found = Survey()
    root = Path(config.root)
    bad_images = bad_images or {}
    done, told = 0, paced(on_progress)

    def note(entry: Entry) -> None:
        _note(found, entry)
        on_bad(entry)

    for source in config.sources:
        mount = open_mount(source, config, root)
        images: dict[str, Located] = {}
        unsettled: set[int] = set()
        tally = found.tallies[source.name] = Tally()
        for place, entry in enumerate(entries_of(source, root, rules, tally)):
            checked, places = locate_images(entry, mount)
            for image in places:
                images.setdefault(image.image_id, image)
            checked = _with_pixels(checked, places, bad_images)
            if not checked.verdict.kept:
                if any(image.repair for image in places):
                    unsettled.add(place)  # its image may turn out to be ambiguous
                else:
                    note(checked)
            done += 1
            told(done)
            found.read[source.name] += 1
        verdicts = mount.settle()
        found.repairs.update(mount.repairs)
        for key, image_id, kind, _ in mount.repaired():
            found.mended.setdefault(kind, (key, image_id))
        found.lost.update(mount.lost)
        if verdicts or unsettled:
            entries = entries_of(source, root, rules)
            images = _settle(entries, mount, verdicts, unsettled, bad_images, note)
        for image_id, image in images.items():
            found.images.setdefault(image_id, image)
    on_progress(done)
    return found


def _settle(
    entries: Iterable[Entry],
    mount: Mount,
    verdicts: Mapping[str, Verdict],
    unsettled: set[int],
    bad_images: Mapping[str, Verdict],
    note: Callable[[Entry], None],
) -> dict[str, Located]:
    """Note the entries whose verdict had to wait for all keys of the source; the images in use."""
    images: dict[str, Located] = {}
    for place, entry in enumerate(entries):
        if entry.record is None or not entry.verdict.kept:
            continue
        missing = [key for key in entry.record.images if isinstance(mount.locate(key), Verdict)]
        if not missing:
            checked, places = locate_images(entry, mount)
            for image in places:
                images.setdefault(image.image_id, image)
            if place in unsettled:
                note(_with_pixels(checked, places, bad_images))
        elif all(key in verdicts for key in missing):  # the others are noted
            note(replace(entry, verdict=verdicts[missing[0]]))
    return images


def _with_pixels(
    entry: Entry, places: Iterable[Located], bad_images: Mapping[str, Verdict]
) -> Entry:
    """The entry with the verdict on its first image that cannot be decoded."""
    for place in places:
        verdict = _of_image(place, bad_images)
        if not verdict.kept:
            return replace(entry, verdict=verdict)
    return entry


def _of_image(place: Located, bad_images: Mapping[str, Verdict]) -> Verdict:
    """The verdict on an image that was found: an empty file needs no decoder."""
    size = place.size if place.member is None else place.member.size
    if size == 0:
        return Verdict(Reason.IMAGE_UNDECODABLE, f"{place.image_id}: 0 bytes: {EMPTY_FILE}")
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
