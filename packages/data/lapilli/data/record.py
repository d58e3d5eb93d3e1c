"""Record, Turn, Part and Verdict: the normalised form of every source."""

from __future__ import annotations

import hashlib
import json
import marshal
import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, NamedTuple, TypeAlias, cast

__all__ = [
    "Entry",
    "ImagePart",
    "PackedEntry",
    "Part",
    "Reason",
    "Record",
    "Role",
    "TextPart",
    "Turn",
    "Verdict",
    "element_digest",
    "element_json",
    "excerpt",
    "is_unicode",
    "pack",
    "pack_content",
    "pack_names",
    "shortened",
    "unpack",
]

LONGEST_KEPT = 1 << 20  # characters of a quarantined element's JSON text
Role: TypeAlias = Literal["system", "user", "assistant"]


class TextPart(NamedTuple):
    """A stretch of text. `<image>` inside it is text: the source has decided that already."""

    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """The place of image number `index` of the record."""

    index: int


Part: TypeAlias = TextPart | ImagePart
"""A piece of a turn: text, or the place of an image."""


class Turn(NamedTuple):
    """What one side says: text and images in their order.

    Named tuples, for 665K records have 5 million turns, and a frozen dataclass takes twice as long
    to make.

    Attributes:
        role: Who says it.
        parts: Text and images in their order.
        trains: False where the file says that this turn is not to be trained.
        thinking: The reasoning before an answer; only some chat templates can write it.
    """

    role: Role
    parts: tuple[Part, ...]
    trains: bool = True
    thinking: str = ""

    @property
    def text(self) -> str:
        """The text parts joined, images left out."""
        if len(self.parts) == 1 and isinstance(self.parts[0], TextPart):
            return self.parts[0].text  # most turns; checking 665K records asks for it often
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation with its images.

    `record_id` is the file's own id as text; `sample_id` is unique in a dataset
    (`source/record_id`, a repeated id gets `#2`, `#3`, ...). `images` are keys as the file has
    them; `mounts` resolves them.
    """

    record_id: str
    sample_id: str
    source: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()


class Reason(StrEnum):
    """Why a record is quarantined. The list is closed: a report can count on it."""

    SCHEMA = "schema"
    UNSUPPORTED_FIELD = "unsupported_field"
    NO_TURNS = "no_turns"
    TURN_ORDER = "turn_order"
    UNKNOWN_ROLE = "unknown_role"
    EMPTY_ANSWER = "empty_answer"
    IMAGE_MARKER_COUNT = "image_marker_count"
    IMAGE_MISSING = "image_missing"
    IMAGE_UNREADABLE = "image_unreadable"
    AMBIGUOUS_IMAGE = "ambiguous_image"
    IMAGE_OUTSIDE_ROOT = "image_outside_root"
    IMAGE_UNDECODABLE = "image_undecodable"
    IMAGE_TOO_LARGE = "image_too_large"
    DECODER_CRASHED = "decoder_crashed"
    TEMPLATE_REFUSES = "template_refuses"
    NO_TRAINED_TOKEN = "no_trained_token"
    EXCLUDED = "excluded"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Kept (`reason` is None) or quarantined for one reason, with a detail for the reader."""

    reason: Reason | None = None
    detail: str = ""

    @property
    def kept(self) -> bool:
        """Whether the record is in the dataset."""
        return self.reason is None


@dataclass(frozen=True, slots=True)
class Entry:
    r"""One element of an annotation file: the record, where it could be made, and its verdict.

    `raw` is the element as the file had it, for the quarantine. `record_id` and `sample_id` are
    always valid Unicode: a lone surrogate in the file's id is spelt out as `\\ud800`.
    """

    source: str
    record_id: str
    sample_id: str
    raw: Any
    record: Record | None
    verdict: Verdict = field(default_factory=Verdict)

    @property
    def raw_json(self) -> str:
        """`raw` as JSON text in ASCII."""
        return element_json(self.raw)

    def pack(self) -> PackedEntry:
        """The entry as a plan holds it."""
        text = self.raw_json
        return PackedEntry(
            source=self.source,
            record_id=self.record_id,
            sample_id=self.sample_id,
            digest=element_digest(text),
            packed=None if self.record is None else pack(self.record),
            raw_json=None if self.verdict.kept else shortened(text),
            verdict=self.verdict,
        )


@dataclass(frozen=True, slots=True)
class PackedEntry:
    """An entry as a plan holds it, all of a dataset's at once: 1.3 GB for 1 GB of JSON, not 4.5.

    The record is packed. The element of a kept entry is left in its file (`raw_json` is None) and
    read again if decoding finds something wrong; `digest` tells whether it is still the same.
    """

    source: str
    record_id: str
    sample_id: str
    digest: bytes
    packed: bytes | None
    raw_json: str | None
    verdict: Verdict = field(default_factory=Verdict)

    @property
    def record(self) -> Record | None:
        """The record, unpacked at each call."""
        return None if self.packed is None else unpack(self.packed)


# Parquet has dates and bytes. No element holds itself.
_ENCODER = json.JSONEncoder(default=str, allow_nan=False, check_circular=False)


def element_json(element: Any) -> str:
    """An element as JSON text in ASCII. NaN and Infinity, which JSON lacks, are written as text."""
    try:
        try:
            return _ENCODER.encode(element)
        except ValueError:
            return json.dumps(_without_nan(element), default=str)
    except RecursionError:
        return json.dumps("an element nested too deeply to be written")


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        fields = cast("dict[Any, Any]", value)
        return {_without_nan(name): _without_nan(item) for name, item in fields.items()}
    return [_without_nan(item) for item in value] if isinstance(value, (list, tuple)) else value


def shortened(text: str) -> str:
    """An element's JSON text as a quarantine keeps it: of a very long one the beginning."""
    if len(text) <= LONGEST_KEPT:
        return text
    return json.dumps({"begins": text[:1000], "characters": len(text)})


def element_digest(text: str) -> bytes:
    """What tells one element's JSON text from another's, in 16 bytes."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def pack(record: Record) -> bytes:
    """The record in few bytes, for `unpack`."""
    return pack_names(record.record_id, record.sample_id, record.source) + pack_content(record)


# marshal packs and unpacks a record in 3 us, json in 15; it stays inside one build's processes.
# Its format 0 has no references between values, so that pieces can be joined.


def pack_names(record_id: str, sample_id: str, source: str) -> bytes:
    """The beginning of a packed record; `pack_content` is the rest."""
    return b"(\5\0\0\0" + b"".join(
        (marshal.dumps(record_id, 0), marshal.dumps(sample_id, 0), marshal.dumps(source, 0))
    )


def pack_content(record: Record) -> bytes:
    """The rest of a packed record: what it has but for its names."""
    turns = tuple(map(_pack_turn, record.turns))
    return marshal.dumps(turns, 0) + marshal.dumps(record.images, 0)


def _pack_turn(turn: Turn) -> tuple[Any, ...]:
    """Role and parts; how a turn differs from others only where it does, so stamps stay."""
    if len(turn.parts) == 1 and isinstance(only := turn.parts[0], TextPart):
        parts = (only.text,)  # most turns
    else:
        parts = tuple(p.text if isinstance(p, TextPart) else p.index for p in turn.parts)
    if turn.trains and not turn.thinking:
        return (turn.role, parts)
    return (turn.role, parts, turn.trains, turn.thinking)


def unpack(packed: bytes) -> Record:
    """The record that `Entry.pack` has packed."""
    record_id, sample_id, source, turns, images = marshal.loads(packed)
    return Record(
        record_id=record_id,
        sample_id=sample_id,
        source=source,
        turns=tuple(
            Turn(
                role,
                tuple(TextPart(p) if isinstance(p, str) else ImagePart(p) for p in parts),
                *others,
            )
            for role, parts, *others in turns
        ),
        images=images,
    )


def is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8. JSON escapes can spell one that cannot be."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def excerpt(text: str, most: int = 120) -> str:
    """The beginning of a text from a file, for a message: one line, nothing unprintable in it."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:most])
    return shown if len(text) <= most else f"{shown}..."
