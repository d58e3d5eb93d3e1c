"""`compat: llava`: reproduce LLaVA's preprocessing exactly, mistakes included.

LLaVA tokenises a conversation as a whole, then counts its way through it by tokenising its pieces
once more, and unmasks by those counts. Where the counts do not meet the whole, nothing of the
sample is trained. Text that spells a special token becomes that token. This module counts as LLaVA
c121f043 does (`llava/train/train.py`), with a SentencePiece tokenizer of Llama's kind; it is for
reproducing a published run, never the default.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

from lapilli.data.errors import DataError
from lapilli.data.record import (
    ImagePart,
    Part,
    Reason,
    Record,
    TextPart,
    Turn,
    Verdict,
    is_unicode,
)
from lapilli.data.text.encode import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Encoded
from lapilli.data.text.templates import TEMPLATES, Template, get_template
from lapilli.data.text.tokenizer import AnyTokenizer, Backend, backend_for, role_id

__all__ = ["LLAVA_MAX_LENGTH", "LLAVA_TEMPLATES", "check_as_llava", "encode_as_llava"]

LLAVA_MAX_LENGTH = 2048
"""`--model_max_length` of LLaVA-1.5's training scripts."""

MARKER = "<image>"

Ids: TypeAlias = list[int]
Said: TypeAlias = list[tuple[str, str]]  # role and text, `<image>` spelt out


def encode_as_llava(
    records: Sequence[Record],
    tokenizer: AnyTokenizer,
    template: Template | str,
    *,
    max_length: int = LLAVA_MAX_LENGTH,
) -> list[Encoded]:
    """Ids and trained spans as LLaVA has them.

    Args:
        records: Records as their source made them, malformed ones too.
        tokenizer: A SentencePiece tokenizer of Llama's kind; its unknown token is the padding, as
            LLaVA's training script sets it.
        template: One of `LLAVA_TEMPLATES`, unchanged.
        max_length: LLaVA's `model_max_length`: ids after which a text-only sample is cut.

    Raises:
        DataError: Another template or tokenizer, or a record at which LLaVA's training stops.
    """
    resolved = get_template(template)
    encoder = LLAVA_TEMPLATES.get(resolved.name)
    if encoder is None or resolved != TEMPLATES[resolved.name]:
        known = ", ".join(sorted(LLAVA_TEMPLATES))
        raise DataError(
            f"compat: llava knows the templates {known}, found {resolved.name!r}; "
            "take one of them as it is, or leave compat out"
        )
    words = _Words(tokenizer, max_length)
    return [_encode(record, words, resolved, encoder) for record in records]


def check_as_llava(record: Record, template: Template) -> tuple[Record, Verdict]:
    """The record with the image places LLaVA gives it, and whether LLaVA would train on it.

    Several markers in a turn are one; a marker in an answer counts, in a record that has an image;
    without an image a marker is text, without a marker the image is not used. Kept is whatever
    LLaVA does not stop at, if its image places and its image agree.
    """
    said = _said(record)
    if any(turn.thinking or not turn.trains for turn in record.turns):
        detail = "LLaVA knows neither thinking text nor turns that are not trained; see `compat`"
        return record, Verdict(Reason.UNSUPPORTED_FIELD, detail)
    try:
        _refuse(said, record, template)
    except _Stops as stop:
        return record, Verdict(stop.reason, f"LLaVA stops here: {stop}")
    if not all(is_unicode(text) for _, text in said):
        return record, Verdict(Reason.SCHEMA, "a text holds a lone surrogate: no valid Unicode")
    turns: list[Turn] = []
    places = 0
    for turn, (_, text) in zip(record.turns, said, strict=True):
        pieces = text.split(MARKER) if record.images else [text]
        parts: list[Part] = [TextPart(pieces[0])] if pieces[0] else []
        for piece in pieces[1:]:
            parts.append(ImagePart(places))
            parts += [TextPart(piece)] if piece else []
            places += 1
        turns.append(Turn(turn.role, tuple(parts)))
    if places > 1 or len(record.images) > 1:
        detail = f"{places} places, {len(record.images)} images: LLaVA takes one image a record"
        return record, Verdict(Reason.IMAGE_MARKER_COUNT, detail)
    return replace(record, turns=tuple(turns), images=record.images[:places]), Verdict()


class _Stops(Exception):
    """An assertion or a key error of LLaVA's."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class _Words:
    """The slow tokenizer that LLaVA trains with, on the fast one's private copies."""

    def __init__(self, tokenizer: AnyTokenizer, max_length: int) -> None:
        self.max_length = max_length
        self._backend: Backend = backend_for(tokenizer)
        unk = role_id(tokenizer, "unk")
        if not self._backend.roles["bos"] or unk is None:
            raise DataError(
                "compat: llava needs a tokenizer that begins a text with bos and has an unknown "
                "token, as Llama's does; leave compat out"
            )
        self.pad_id = unk
        self.has_legacy_spaces = self._backend.first is self._backend.later
        names = sorted(self._backend.specials, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, names))})")

    def ids(self, text: str) -> Ids:
        """Bos and the text's ids; a special token's name becomes that token."""
        found = list(self._backend.roles["bos"])
        # Splitting on one group alternates: text, special, text, ..., text.
        for number, piece in enumerate(self._special.split(text)):
            if number % 2:
                found.append(self._backend.specials[piece])
            elif piece:
                backend = self._backend.later if number else self._backend.first
                found += backend.encode(piece, add_special_tokens=False).ids
        return found

    def ids_with_image(self, text: str) -> Ids:
        """The same around -200 for each `<image>`, with one bos for all."""
        first, *others = (self.ids(piece) for piece in text.split(MARKER))
        for ids in others:
            first += [IMAGE_TOKEN_INDEX, *ids[1:]]
        return first

    def cut(self, ids: Ids) -> Ids:
        """What is left of a text-only sample."""
        return ids[: self.max_length]

    def real(self, ids: Ids) -> int:
        """Ids that are not padding; a literal `<unk>` counts as padding."""
        return sum(token != self.pad_id for token in ids)


def _said(record: Record) -> Said:
    """The turns as text; in a record with an image the marker comes first in its turn, once."""
    said: Said = []
    for turn in record.turns:
        text = "".join(p.text if isinstance(p, TextPart) else MARKER for p in turn.parts)
        if record.images and MARKER in text:
            text = f"{MARKER}\n{text.replace(MARKER, '').strip()}".strip()
        said.append((turn.role, text))
    return said


def _encode(record: Record, words: _Words, template: Template, encoder: _Encoder) -> Encoded:
    said = _said(record)
    try:
        _refuse(said, record, template)
    except _Stops as stop:
        raise DataError(f"record {record.sample_id}: LLaVA stops here: {stop}") from None
    ids, labels = encoder(said, bool(record.images), words, template)
    return _as_spans(ids, labels)


def _as_spans(ids: Ids, labels: Ids) -> Encoded:
    spans: list[int] = []
    for place, label in enumerate(labels):
        if label == IGNORE_INDEX:
            continue
        if spans and spans[-1] == place:
            spans[-1] = place + 1
        else:
            spans += (place, place + 1)
    trained = sum(spans[1::2]) - sum(spans[::2])
    return Encoded(ids, spans, trained, len(ids) - ids.count(IMAGE_TOKEN_INDEX))


def _refuse(said: Said, record: Record, template: Template) -> None:
    """Raise where LLaVA's own assertions do."""
    if not said:
        raise _Stops(Reason.NO_TURNS, "no turns")
    if template.name == "plain":
        if len(said) != 2:
            raise _Stops(Reason.TURN_ORDER, f"{len(said)} turns; plain takes two")
        if MARKER not in said[0][1]:
            raise _Stops(Reason.IMAGE_MARKER_COUNT, "plain needs <image> in the first turn")
        return
    if template.name == "v0":
        return
    if any(role == "system" for role, _ in said):
        raise _Stops(Reason.UNKNOWN_ROLE, "a system turn")
    turns = said if said[0][0] == "user" else said[1:]
    for place, (role, _) in enumerate(turns):
        if role != ("user", "assistant")[place % 2]:
            raise _Stops(Reason.TURN_ORDER, f"turn {place} is {role}'s")
    if template.name == "llava_llama_2" and turns and not turns[0][1]:
        raise _Stops(Reason.TURN_ORDER, "the first message is empty")


# --- the four ways of counting ------------------------------------------------------------------

_Encoder: TypeAlias = Callable[[Said, bool, _Words, Template], tuple[Ids, Ids]]


def _plain(said: Said, has_image: bool, words: _Words, template: Template) -> tuple[Ids, Ids]:
    """The image and the answer; the question is dropped."""
    del has_image
    ids = words.ids_with_image(f"{MARKER}{said[1][1]}{template.answer_end}")
    prompt = len(words.ids_with_image(MARKER))
    return ids, [IGNORE_INDEX] * prompt + ids[prompt:]


def _v0(said: Said, has_image: bool, words: _Words, template: Template) -> tuple[Ids, Ids]:
    """Each turn's own length counts a bos that the whole does not have, so the mask drifts.

    Of a user's turn the first two ids stay trained.
    """
    names = {"user": "Human", "assistant": "Assistant"}
    header = f"{template.system}\n\n"
    pieces = [f"### {names.get(role, 'unknown')}: {text}\n" for role, text in said]
    whole = header + "".join(pieces) + "### "
    if has_image:
        ids = words.ids_with_image(whole)
        lengths = [len(words.ids_with_image(piece)) for piece in (header, *pieces)]
    else:
        ids = words.cut(words.ids(whole))
        lengths = [words.real(words.cut(words.ids(piece))) for piece in (header, *pieces)]
    labels = list(ids)
    at = lengths[0]
    _mask(labels, 0, at)
    for (role, _), length in zip(said, lengths[1:], strict=True):
        if role == "user":
            _mask(labels, at + 2, at + length)
        at += length
    return ids, labels


def _by_rounds(write: Callable[[Said, str], str], answer_mark: str) -> _Encoder:
    """The counting of v1 and llama_2: a round's own bos replaces the `</s>` it was cut at.

    Args:
        write: Turns and system text to the prompt.
        answer_mark: What LLaVA cuts a round at, into question and answer.
    """

    def encode(said: Said, has_image: bool, words: _Words, template: Template) -> tuple[Ids, Ids]:
        turns = said if said[0][0] == "user" else said[1:]
        prompt = write(turns, template.system)
        count = words.ids_with_image if has_image else words.ids
        ids = count(prompt) if has_image else words.cut(count(prompt))
        labels = list(ids)
        _mask(labels, 0, 1)
        at = 1
        for number, piece in enumerate(prompt.split("</s>")):
            parts = piece.split(answer_mark)
            if piece == "" or len(parts) != 2:
                break
            # Without legacy spaces the piece gets a leading space here that the whole has not.
            extra = int(number > 0 and not words.has_legacy_spaces)
            asked = len(count(parts[0] + answer_mark)) - 2 - extra
            _mask(labels, at, at + asked)
            at += len(count(piece)) - extra
        _mask(labels, at, len(labels))
        if at < words.max_length and at != words.real(ids):
            _mask(labels, 0, len(labels))
        return ids, labels

    return encode


def _mask(labels: Ids, start: int, end: int) -> None:
    """Untrain a range, as a slice of a tensor would: what lies outside is not there."""
    for place in range(min(start, len(labels)), min(end, len(labels))):
        labels[place] = IGNORE_INDEX


def _v1_prompt(turns: Said, system: str) -> str:
    """An empty message loses its space and its separator."""
    names = {"user": ("USER", " "), "assistant": ("ASSISTANT", "</s>")}
    prompt = f"{system} "
    for role, text in turns:
        name, separator = names[role]
        prompt += f"{name}: {text}{separator}" if text else f"{name}:"
    return prompt


def _llama_2_prompt(turns: Said, system: str) -> str:
    """An empty message is left out."""
    prompt = ""
    for place, (role, text) in enumerate(turns):
        said = f"<<SYS>>\n{system}\n<</SYS>>\n\n{text}" if place == 0 else text
        if said:
            prompt += f"<s>[INST] {said} [/INST]" if role == "user" else f" {said} </s>"
    return prompt.lstrip("<s>")


_V1 = _by_rounds(_v1_prompt, " ASSISTANT: ")
LLAVA_TEMPLATES: dict[str, _Encoder] = {
    "plain": _plain,
    "v0": _v0,
    "v1": _V1,
    "llava_v1": _V1,
    "llava_llama_2": _by_rounds(_llama_2_prompt, "[/INST] "),
}
"""The templates whose counting is known, and was compared with LLaVA's own results."""
