"""Decode a sample's ids into pieces of text, each trained or not.

Ids are turned back into text byte by byte, so that the pieces, put together, are the text that was
tokenised: the bytes of one letter stay together, and the space that SentencePiece puts before a
text is taken off again.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lapilli.data.text.tokenizer import AnyTokenizer

__all__ = ["Piece", "join_pieces", "transcript"]

_SPACE = "▁"  # SentencePiece's
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")


Kind: TypeAlias = Literal["text", "special", "image"]
TextOfIds: TypeAlias = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Piece:
    """One token, or several that only together make a letter, or an image's place.

    Attributes:
        text: What a reader sees; of a special token its name.
        kind: Text of the record or its template, a special token, or an image.
        trained: Whether the loss counts these tokens.
        ids: Its ids; -200 for an image.
    """

    text: str
    kind: Kind
    trained: bool
    ids: tuple[int, ...]


def transcript(
    input_ids: Sequence[int] | NDArray[np.int32],
    label_spans: Sequence[int] | NDArray[np.int32],
    tokenizer: AnyTokenizer,
    *,
    image_text: str,
) -> list[Piece]:
    """Turn a sample's ids back into text.

    Args:
        input_ids: Ids [n], -200 (any negative one) at an image's place.
        label_spans: Start and end of the trained ids, [m, 2] or flat.
        tokenizer: The tokenizer that made the ids.
        image_text: The text shown for an image, such as `<image 576 tokens>`.

    Returns:
        The pieces in order. Bytes that are no UTF-8 are shown as U+FFFD.
    """
    ids = [int(i) for i in input_ids]
    trained = [False] * len(ids)
    for start, end in np.asarray(label_spans, np.int64).reshape(-1, 2).tolist():
        trained[start:end] = [True] * (end - start)
    decoder = _decoder(getattr(tokenizer, "backend_tokenizer", tokenizer))
    kinds: list[Kind] = [decoder.kind(i) for i in ids]
    pieces: list[Piece] = []
    for (kind, is_trained), run in groupby(range(len(ids)), lambda i: (kinds[i], trained[i])):
        places = list(run)
        tokens = ids[places[0] : places[-1] + 1]
        if kind == "text":
            found = decoder.texts(tokens, is_prefixed=decoder.is_prefixed(ids[: places[0]]))
        elif kind == "image":
            found = ((image_text, (i,)) for i in tokens)
        else:
            found = ((decoder.name(i), (i,)) for i in tokens)
        pieces += [Piece(text, kind, is_trained, own) for text, own in found]
    return pieces


def join_pieces(pieces: Sequence[Piece]) -> list[Piece]:
    """The same text in as few pieces as possible: neighbouring text with one answer to `trained`.

    Special tokens and images stay by themselves.
    """
    joined: list[Piece] = []
    for (kind, is_trained), run in groupby(pieces, lambda piece: (piece.kind, piece.trained)):
        if kind != "text":
            joined += run
            continue
        parts = list(run)
        text = "".join(part.text for part in parts)
        joined.append(Piece(text, kind, is_trained, tuple(i for part in parts for i in part.ids)))
    return joined


@lru_cache(maxsize=4)
def _decoder(backend: Tokenizer) -> _Decoder:
    return _Decoder(backend)


class _Decoder:
    """Ids to bytes, for the two families of tokenizers: byte-level and SentencePiece."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        state = _state(backend.decoder)
        self._bytes_of_letter = _bytes_of_letter() if "ByteLevel" in state else None
        self._strips = '"Strip"' in state or '"Metaspace"' in state
        self._at_start_only = '"first"' in _state(backend.pre_tokenizer)
        begins = backend.encode("", add_special_tokens=True).ids
        self._bos = begins[0] if begins else None

    def kind(self, token_id: int) -> Kind:
        """The text of an id; one that the tokenizer does not know is special."""
        if token_id < 0:
            return "image"
        added = self._added.get(token_id)
        is_text = not added.special if added else self._backend.id_to_token(token_id) is not None
        return "text" if is_text else "special"

    def name(self, token_id: int) -> str:
        """A special token's content."""
        return self._backend.id_to_token(token_id) or f"<id {token_id}>"

    def is_prefixed(self, before: Sequence[int]) -> bool:
        """Whether the tokenizer put a space before the text that begins after these ids.

        Its scheme "first" does so at a start only: of a record, after bos, after an image.
        """
        if not self._strips or (before and self.kind(before[-1]) == "text"):
            return False
        return not (self._at_start_only and before and before[-1] not in (self._bos, -200))

    def texts(self, ids: Sequence[int], *, is_prefixed: bool) -> Iterator[TextOfIds]:
        """The texts of a run of ids, without the space put before it."""
        texts = self._letters(ids)
        return _without_prefix(texts) if is_prefixed else texts

    def _letters(self, ids: Sequence[int]) -> Iterator[TextOfIds]:
        """The texts of a run of ids; an id that ends inside a letter waits for the next one."""
        stream = codecs.getincrementaldecoder("utf-8")("replace")
        waiting: tuple[int, ...] = ()
        for number, token_id in enumerate(ids, 1):
            waiting += (token_id,)
            text = stream.decode(self._bytes(token_id), final=number == len(ids))
            if text:
                yield text, waiting
                waiting = ()

    def _bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) or ""
        if token_id in self._added:
            return token.encode()
        if self._bytes_of_letter is not None:
            letters = self._bytes_of_letter
            return b"".join(letters.get(letter) or letter.encode() for letter in token)
        if found := _BYTE_PIECE.fullmatch(token):
            return bytes.fromhex(found[1])
        return token.replace(_SPACE, " ").encode()


def _without_prefix(texts: Iterator[TextOfIds]) -> Iterator[TextOfIds]:
    """Take the one space off; a token that was nothing else joins the next one."""
    text, ids = next(texts)
    text = text.removeprefix(" ")
    if not text:
        text, more = next(texts, ("", ()))
        ids += more
    yield text, ids
    yield from texts


def _state(step: Any) -> str:
    """A step of a tokenizer as JSON; empty where it has none."""
    return step.__getstate__().decode() if step else ""


def _bytes_of_letter() -> dict[str, bytes]:
    """GPT-2's printable letter for each byte, turned round.

    Bytes that print stand for themselves, the others for the letters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    letters = [*map(chr, printable), *(chr(0x100 + place) for place in range(len(others)))]
    return {letter: bytes([b]) for letter, b in zip(letters, [*printable, *others], strict=True)}
