"""Encode records into token ids and trained spans.

Every text between two special tokens or images is tokenised by itself, as LLaVA's slow tokenizer
does it, all texts of a batch in one call. Labels come from the template's trained characters;
nothing is tokenised twice, no length is subtracted, and no Python runs for each token.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial

from tokenizers import Encoding

from lapilli.data.errors import DataError
from lapilli.data.record import Record, TextPart
from lapilli.data.text.chat_template.rendering import ChatWriter
from lapilli.data.text.rendering import (
    ImageSlot,
    Segment,
    TextSegment,
    frame_pieces,
    render,
)
from lapilli.data.text.templates import TOKENIZERS_OWN, Template, get_template
from lapilli.data.text.tokenizer import (
    AnyTokenizer,
    Backend,
    TokenizerFacts,
    backend_for,
    raw_backend,
    tokenizer_facts,
)
from lapilli.data.text.tokenizer_files import load_tokenizer, train_tokenizer

__all__ = [
    "IGNORE_INDEX",
    "IMAGE_TOKEN_INDEX",
    "Encoded",
    "TokenizerFacts",
    "bind_template",
    "encode",
    "encode_batch",
    "labels_of",
    "llava_length",
    "load_tokenizer",
    "segments_of",
    "template_refusal",
    "tokenizer_facts",
    "train_tokenizer",
    "truncate",
]

IMAGE_TOKEN_INDEX = -200
"""Stands for one image in `input_ids`."""

IGNORE_INDEX = -100
"""Stands for an untrained position in `labels`."""

# The template's fields that name special tokens in braces.
_FRAMES = frozenset(
    {
        "opening", "before_system", "after_system", "before_user", "after_user", "before_answer",
        "answer_start", "answer_end", "after_answer", "image_start", "image_end",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Encoded:
    """A record as ids.

    Attributes:
        input_ids: Ids, -200 for each image.
        label_spans: Flat `[start, end, start, end, ...]` of trained positions, ascending, apart.
        num_trained: Ids inside the spans.
        text_length: Ids that are not images.
    """

    input_ids: list[int]
    label_spans: list[int]
    num_trained: int
    text_length: int


def encode(
    record: Record, tokenizer: AnyTokenizer, template: Template | str
) -> tuple[list[int], list[int]]:
    """Ids and labels of one record, in LLaVA's convention.

    Args:
        record: A record that `sources.validation.check_record` has kept.
        tokenizer: A fast transformers tokenizer or its backend; it is not changed.
        template: A template, its name or the path of its YAML file.

    Returns:
        `input_ids` with -200 for each image, `labels` with -100 where nothing is trained; equally
        long. Nothing is truncated.

    Raises:
        DataError: If the tokenizer lacks a beginning or an end that the template names, or its
            chat template does not fit the record.

    Warns:
        UserWarning: Once, if the template's end marker is not one token of this tokenizer.
    """
    encoded = encode_batch([record], tokenizer, template)[0]
    return encoded.input_ids, labels_of(encoded)


def labels_of(encoded: Encoded) -> list[int]:
    """The ids at trained positions, -100 elsewhere."""
    labels = [IGNORE_INDEX] * len(encoded.input_ids)
    spans = encoded.label_spans
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        labels[start:end] = encoded.input_ids[start:end]
    return labels


def encode_batch(
    records: Sequence[Record],
    tokenizer: AnyTokenizer,
    template: Template | str,
    *,
    warn: bool = True,
) -> list[Encoded]:
    """Ids and trained spans of many records, with few calls into the Rust tokenizer.

    Arguments, errors and, with `warn`, warnings are those of `encode`. Text never becomes a special
    token: a literal `</s>` in a record is tokenised letter by letter.
    """
    backend = backend_for(tokenizer)
    writer = _writer(tokenizer, get_template(template))
    if warn and (line := writer.warning()):
        warnings.warn(line, stacklevel=2)
    pages = [writer.write(record) for record in records]
    encodings = backend.encode_texts(pages)
    return [_assemble(page, encodings, backend) for page in pages]


def segments_of(record: Record, tokenizer: AnyTokenizer, template: Template) -> list[Segment]:
    """The record written down for a tokenizer, before any text of it is tokenised.

    Raises:
        DataError: As `encode`.
    """
    return _writer(tokenizer, template).write(record)


def truncate(encoded: Encoded, most: int) -> Encoded:
    """Cut a row to at most `most` ids, an image counted as one; 0 keeps it whole.

    An image's place is never cut: a row with an image behind the cut keeps its ids and loses its
    spans, so that a build quarantines it like any other record with nothing left to train.
    """
    if most == 0 or len(encoded.input_ids) <= most:
        return encoded
    if IMAGE_TOKEN_INDEX in encoded.input_ids[most:]:
        return replace(encoded, label_spans=[], num_trained=0)
    spans: list[int] = []
    for start, end in zip(encoded.label_spans[::2], encoded.label_spans[1::2], strict=True):
        _add_span(spans, min(start, most), min(end, most))
    cut = len(encoded.input_ids) - most
    return Encoded(encoded.input_ids[:most], spans, _count(spans), encoded.text_length - cut)


def llava_length(record: Record) -> int:
    """Words between white space over all turns, an image marker written out as `<image>`.

    This is the (positive) number LLaVA's sampler sorts by: no tokens, no image rows.
    """
    return sum(
        len(
            "".join(
                part.text if isinstance(part, TextPart) else "<image>" for part in turn.parts
            ).split()
        )
        for turn in record.turns
    )


def bind_template(template: Template, tokenizer: AnyTokenizer) -> Template:
    """The template with the tokenizer's own chat template in it, where it refers to that.

    So a plan holds the template's text, and a tokenizer whose chat template changed is noticed.

    Raises:
        DataError: The tokenizer brings no chat template.
    """
    if template.chat != TOKENIZERS_OWN:
        return template
    chat: object = getattr(tokenizer, "chat_template", None)
    if isinstance(chat, dict):
        chat = chat.get("default")
    if not isinstance(chat, str):
        raise DataError(
            f"template {template.name}: the tokenizer brings no chat template; name another "
            "template, or add chat_template to its tokenizer_config.json"
        )
    return replace(template, chat=chat)


def _assemble(page: Iterable[Segment], encodings: Iterator[Encoding], backend: Backend) -> Encoded:
    """Join the segments' ids; turn trained characters into trained positions."""
    ids: list[int] = []
    spans: list[int] = []
    images = 0
    for segment in page:
        start = len(ids)
        if isinstance(segment, TextSegment):
            encoding = next(encodings)
            ids += encoding.ids
            for first, last in _trained_tokens(segment, encoding):
                _add_span(spans, start + first, start + last)
        elif isinstance(segment, ImageSlot):
            ids.append(IMAGE_TOKEN_INDEX)
            images += 1
        else:
            ids += backend.special_ids(segment.name)
            if segment.trained:
                _add_span(spans, start, len(ids))
    return Encoded(ids, spans, _count(spans), len(ids) - images)


def _count(spans: list[int]) -> int:
    return sum(spans[1::2]) - sum(spans[::2])


def _add_span(spans: list[int], start: int, end: int) -> None:
    """Append a span, joining it with one that ends where it starts; an empty one is left out."""
    if start == end:
        return
    if spans and spans[-1] == start:
        spans[-1] = end
    else:
        spans += (start, end)


def _trained_tokens(segment: TextSegment, encoding: Encoding) -> Iterator[tuple[int, int]]:
    """Token ranges that share a character with a trained character range.

    Offsets ascend, but neighbours may share a character (the bytes of one letter, or the space put
    before a text, which gets the offset of its first letter) and may be empty, which then counts
    as belonging to the character that follows.
    """
    length = len(segment.text)
    if segment.trained == ((0, length),):
        yield 0, len(encoding)
        return
    for start, end in segment.trained:
        first = 0 if start == 0 else _token_at(encoding, start)
        last = len(encoding) if end == length else _token_at(encoding, end)
        if first is None or last is None or _starts_before(encoding, last, end):
            yield _by_offsets(encoding.offsets, start, end)
        else:
            yield first, max(first, last)


def _token_at(encoding: Encoding, char: int) -> int | None:
    """The first token on a character; Rust finds it, where a list of all offsets would cost more.

    None where no token is on it.
    """
    found = encoding.char_to_token(char)
    while found and encoding.token_to_chars(found - 1) == (char, char):
        found -= 1
    return found


def _starts_before(encoding: Encoding, token: int, char: int) -> bool:
    chars = encoding.token_to_chars(token) if token < len(encoding) else None
    return chars is not None and chars[0] < char


def _by_offsets(offsets: list[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    first = bisect_right(offsets, start, key=lambda offset: max(offset[1], offset[0] + 1))
    return first, max(first, bisect_left(offsets, end, key=lambda offset: offset[0]))


class _Writer:
    """How a template encodes records for a tokenizer, with its warnings."""

    def __init__(self, write: Callable[[Record], list[Segment]], warning: str) -> None:
        self.write = write
        self._warning = warning

    def warning(self) -> str:
        """What to warn of the first time; empty afterwards, or where there is nothing."""
        line, self._warning = self._warning, ""
        return line


def _writer(tokenizer: AnyTokenizer, template: Template) -> _Writer:
    vocab_size = raw_backend(tokenizer).get_vocab_size()
    return _writer_cached(tokenizer, vocab_size, bind_template(template, tokenizer))


def template_refusal(tokenizer: AnyTokenizer, template: Template) -> Callable[[Record], str]:
    """A function that returns why a chat template cannot render a record, or "".

    A template made of frames writes every well-formed record.

    Raises:
        DataError: An invalid chat template, or a tokenizer without one.

    Warns:
        UserWarning: As `encode`.
    """
    if not template.chat:
        return lambda record: ""
    if line := _writer(tokenizer, template).warning():
        warnings.warn(line, stacklevel=2)
    vocab_size = raw_backend(tokenizer).get_vocab_size()
    return _chat_writer(tokenizer, vocab_size, bind_template(template, tokenizer)).refusal


@lru_cache(maxsize=32)
def _writer_cached(tokenizer: AnyTokenizer, vocab_size: int, template: Template) -> _Writer:
    backend = backend_for(tokenizer)
    if template.chat:
        chat = _chat_writer(tokenizer, vocab_size, template)
        return _Writer(chat.render, _warning_of_end(template.name, chat.answer_end, backend))
    spelt = _spell_unknown(template, backend)
    write = partial(render, template=spelt, eaten=backend.eaten)
    return _Writer(write, _warning_of_end(template.name, spelt.answer_end, backend))


@lru_cache(maxsize=32)
def _chat_writer(tokenizer: AnyTokenizer, vocab_size: int, template: Template) -> ChatWriter:
    """The writer of a chat template, which has compared and found things already."""
    del vocab_size
    backend = backend_for(tokenizer)
    all_trained = template.trains == "all"
    return ChatWriter(tokenizer, template.chat, backend.eaten, train_all=all_trained)


def _spell_unknown(template: Template, backend: Backend) -> Template:
    """The template with those special tokens as text that the tokenizer does not have."""
    spelt: dict[str, str] = {}
    for field in fields(template):
        frame = getattr(template, field.name)
        if field.name in _FRAMES:
            for is_special, name in frame_pieces(frame):
                if is_special and name not in ("bos", "bos!", "eos") and not _has(backend, name):
                    frame = frame.replace(f"{{{name}}}", name)
            spelt[field.name] = frame
    return replace(template, **spelt)


def _has(backend: Backend, name: str) -> bool:
    return backend.first.token_to_id(name) is not None


def _warning_of_end(name: str, end: str, backend: Backend) -> str:
    """What there is to say of an end marker that a model has to write as several tokens."""
    pieces = frame_pieces(end)
    if not pieces or any(is_special for is_special, _ in pieces):
        return ""
    marker = end.strip() or end
    # Counted in place: the text before it may change how it is tokenized.
    count = backend.count(end) - backend.count(end[: end.index(marker)])
    if count == 1:
        return ""
    return (
        f"template {name}: its end marker {marker!r} is {count} tokens of this tokenizer, "
        "expected one; take a template whose marker the tokenizer has, or add the marker to "
        "the tokenizer's special tokens"
    )
