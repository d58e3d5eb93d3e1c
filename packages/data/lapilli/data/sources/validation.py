"""Turn an element of an annotation file into an entry with a verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from lapilli.data.config import SourceConfig
from lapilli.data.record import (
    Entry,
    ImagePart,
    Reason,
    Record,
    Role,
    TextPart,
    Turn,
    Verdict,
    is_unicode,
)
from lapilli.data.sources import Source, get_source
from lapilli.data.sources.fields import NOTHING
from lapilli.data.sources.reading.bounds import TOO_DEEP, Unreadable
from lapilli.data.sources.rows import with_roles
from lapilli.data.sources.tally import Members, Tally

__all__ = [
    "Rules", "check_record", "elements_of", "judge", "plain_rules", "read_entries", "record_id_of",
    "unique_id",
]  # fmt: skip

Rules: TypeAlias = Callable[[Record], tuple[Record, Verdict]]
"""The record as it is to be used, and the verdict on it, its images unseen."""

_ORDER: list[Role] = ["user", "assistant"]


def plain_rules(record: Record) -> tuple[Record, Verdict]:
    """The record as its source made it; see `check_record`."""
    return record, check_record(record)


def check_record(record: Record, *, writes_thinking: bool = False) -> Verdict:
    """The verdict on a record by itself, its images unseen.

    `writes_thinking` says that the template can write the thinking text before an answer; the
    templates made of frames cannot.

    Turns: an optional system turn, an optional leading answer (templates leave it out, as LLaVA
    does), then user and assistant in turns, ending on an answer. Each image is marked just once,
    in the order of the list, in a turn that templates keep. All text is valid Unicode.
    """
    roles = [turn.role for turn in record.turns]
    first = int(roles[:1] == ["system"])
    first += roles[first : first + 1] == ["assistant"]
    turns, roles = record.turns[first:], roles[first:]
    said, illustrated = _texts(turns)
    marked = [turn for turn in record.turns if not turn.trains or turn.thinking]
    thoughts = [turn.thinking for turn in marked]
    leading = [turn.text for turn in record.turns[:first]]
    if not is_unicode("".join((*record.images, *leading, *said, *thoughts))):
        return Verdict(Reason.SCHEMA, "a text holds a lone surrogate, which is no valid Unicode")
    if any(thoughts) and not writes_thinking:
        detail = "`reasoning_content`: only a tokenizer's chat template that reads it can write it"
        return Verdict(Reason.UNSUPPORTED_FIELD, detail)
    if not turns:
        return Verdict(Reason.NO_TURNS, "no question with an answer")
    expected = (_ORDER * len(roles))[: len(roles)]
    if roles != expected:  # lists are compared at once: 5 million turns in 665K records
        place = next(n for n, role in enumerate(roles) if role != expected[n])
        detail = f"turn {place}: {roles[place]}; expected {expected[place]}"
        return Verdict(Reason.TURN_ORDER, detail)
    if roles[-1] != "assistant":
        return Verdict(Reason.TURN_ORDER, "ends on a question; expected an answer")
    for place, answer in enumerate(said[1::2]):
        if not answer.strip():
            return Verdict(Reason.EMPTY_ANSWER, f"turn {2 * place + 1} is empty")
    if marked and not any(turn.trains for turn in turns[1::2]):
        return Verdict(Reason.NO_TRAINED_TOKEN, "no answer is to be trained: each has weight 0")
    return _check_markers(illustrated, len(record.images))


def _texts(turns: Sequence[Turn]) -> tuple[list[str], list[Turn]]:
    """The text of each turn, and the turns that are more than one text: few of them."""
    said: list[str] = []
    others: list[Turn] = []
    for turn in turns:
        parts = turn.parts
        if len(parts) == 1 and isinstance(part := parts[0], TextPart):
            said.append(part.text)
        else:
            said.append(turn.text)
            others.append(turn)
    return said, others


def _check_markers(turns: Sequence[Turn], images: int) -> Verdict:
    marked = [part.index for turn in turns for part in turn.parts if isinstance(part, ImagePart)]
    if len(marked) != images:
        return Verdict(Reason.IMAGE_MARKER_COUNT, f"{len(marked)} markers for {images} images")
    if marked != list(range(images)):
        detail = f"markers stand for images {marked}; expected each once, in order"
        return Verdict(Reason.IMAGE_MARKER_COUNT, detail)
    return Verdict()


def read_entries(
    config: SourceConfig, root: Path, rules: Rules = plain_rules, tally: Tally | None = None
) -> Iterator[Entry]:
    """Every element of a source as an entry, in file order, none left out.

    `tally` takes the names of fields that nothing reads and, at the end, the members of archives.
    """
    source = get_source(config.format)
    tally = tally or Tally()
    seen: Counter[str] = Counter()
    for place, element in enumerate(elements_of(source.read(config, root), tally)):
        record_id = record_id_of(element)
        record_id = f"@{place}" if record_id is None else record_id
        sample_id = f"{config.name}/{unique_id(record_id, seen)}"
        yield judge(element, (record_id, sample_id), config, source, rules, tally)


def elements_of(reading: Iterator[Any], tally: Tally) -> Iterator[Any]:
    """A reader's elements; what it returns in the end is the members of its archives."""
    members = yield from reading
    if isinstance(members, Members):
        tally.members = members


def judge(
    element: Any, ids: tuple[str, str], config: SourceConfig, source: Source, rules: Rules,
    tally: Tally,
) -> Entry:  # fmt: skip
    """One element as an entry with its verdict, its images unseen.

    Args:
        element: The element.
        ids: Its record id and its sample id; no verdict depends on them.
        config: Its source.
        source: The format.
        rules: The build's.
        tally: Takes the names of fields that nothing reads.
    """
    name, (record_id, sample_id) = config.name, ids
    entry = partial(Entry, source=name, record_id=record_id, sample_id=sample_id)
    if isinstance(element, Unreadable):
        verdict = Verdict(Reason.SCHEMA, element.detail)
        return entry(raw={"begins": element.begin}, record=None, verdict=verdict)
    try:
        spelt = with_roles(element, config.roles)
        found = source.inspect(spelt)
        normalised = Verdict() if found.unsupported else source.normalise(spelt)
    except RecursionError:
        found, normalised = NOTHING, Verdict(Reason.SCHEMA, TOO_DEEP)
    if found.unread:
        tally.count(found.unread)
    if found.unsupported:
        verdict = Verdict(Reason.UNSUPPORTED_FIELD, found.unsupported)
        return entry(raw=element, record=None, verdict=verdict)
    if isinstance(normalised, Verdict):
        return entry(raw=element, record=None, verdict=normalised)
    turns, images = normalised
    if images and not any(images) and not any(_is_marked(turn) for turn in turns):
        images = ()  # an empty key means no image
    if config.drop_newlines:
        turns = tuple(map(_on_one_line, turns))
    if config.path_prefix:
        images = tuple(_below(config.path_prefix, key) for key in images)
    record, verdict = rules(
        Record(record_id=record_id, sample_id=sample_id, source=name, turns=turns, images=images)
    )
    return entry(raw=element, record=record, verdict=verdict)


def _on_one_line(turn: Turn) -> Turn:
    """A user's turn without its line breaks; what stood beside them is joined."""
    if turn.role != "user":
        return turn
    parts = (
        part._replace(text=part.text.replace("\n", "")) if isinstance(part, TextPart) else part
        for part in turn.parts
    )
    return turn._replace(
        parts=tuple(part for part in parts if not isinstance(part, TextPart) or part.text)
    )


def _is_marked(turn: Turn) -> bool:
    return any(isinstance(part, ImagePart) for part in turn.parts)


def _below(prefix: str, key: str) -> str:
    """A key without the folder it began with where the file was written: whole folders only."""
    if not key.startswith(prefix):
        return key
    rest = key.removeprefix(prefix)
    is_whole = prefix.endswith(("/", "\\")) or not rest or rest[0] in "/\\"
    return rest.lstrip("/\\") if is_whole else key


def unique_id(record_id: str, seen: Counter[str]) -> str:
    """A repeated id gets `#2`, `#3`, ...; one that the file itself spells so is stepped over."""
    candidate = record_id
    while candidate in seen:
        seen[record_id] += 1
        candidate = f"{record_id}#{seen[record_id]}"
    seen[candidate] = 1
    return candidate


def record_id_of(element: Any) -> str | None:
    """The file's own id as text; None for an element without one, which its place stands for."""
    found = element.get("id") if isinstance(element, dict) else None
    if not isinstance(found, (str, int, float)) or found == "":
        return None
    return str(found).encode("utf-8", "backslashreplace").decode()
