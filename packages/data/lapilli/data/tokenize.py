"""From records to ids and trained spans, at the speed of the Rust tokenizer.

Every text between two special tokens or images is tokenised by itself, as LLaVA's slow tokenizer
does it, all texts of a batch in one call. Labels come from the template's trained characters and
the tokenizer's offsets; nothing is tokenised twice and no length is subtracted.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tokenizers import (
    Encoding,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from lapilli.data.errors import DataError
from lapilli.data.record import Record, TextPart
from lapilli.data.templates import (
    ImageSlot,
    Segment,
    SpecialToken,
    Template,
    TextSegment,
    get_template,
    render,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORE_INDEX",
    "IMAGE_TOKEN_INDEX",
    "Encoded",
    "TokenizerFacts",
    "encode",
    "encode_batch",
    "llava_length",
    "load_tokenizer",
    "tokenizer_facts",
    "train_tokenizer",
]

AnyTokenizer: TypeAlias = "PreTrainedTokenizerBase | Tokenizer"

IMAGE_TOKEN_INDEX = -200
"""Stands for one image in `input_ids`."""

IGNORE_INDEX = -100
"""Stands for an untrained position in `labels`."""

# A bare `tokenizers.Tokenizer` does not say which of its tokens play a role: these are looked up.
_ROLE_TOKENS = {
    "bos": ("<s>", "<|begin_of_text|>"),
    "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>"),
    "pad": ("<pad>",),
}


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


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What a manifest keeps of a tokenizer.

    Attributes:
        name: Name on the hub, or the last part of its folder's path ("" for a bare backend).
        fingerprint: SHA-256 of the serialised backend, padding and truncation left out.
        vocab_size: Entries, added tokens included.
        bos_id: Id that begins a text, if there is one.
        eos_id: Id that ends a text, if there is one.
        pad_id: Id that fills a batch, if there is one.
    """

    name: str
    fingerprint: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None


def encode(
    record: Record, tokenizer: AnyTokenizer, template: Template | str
) -> tuple[list[int], list[int]]:
    """Ids and labels of one record, in LLaVA's convention.

    Args:
        record: A well-formed record (see `checks`).
        tokenizer: A fast transformers tokenizer or its backend; it is not changed.
        template: A template, its name or the path of its YAML file.

    Returns:
        `input_ids` with -200 for each image, `labels` with -100 where nothing is trained; equally
        long. Nothing is truncated.

    Raises:
        DataError: If the tokenizer lacks a special token the template names.
    """
    encoded = encode_batch([record], tokenizer, template)[0]
    labels = [IGNORE_INDEX] * len(encoded.input_ids)
    spans = encoded.label_spans
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        labels[start:end] = encoded.input_ids[start:end]
    return encoded.input_ids, labels


def encode_batch(
    records: Sequence[Record], tokenizer: AnyTokenizer, template: Template | str
) -> list[Encoded]:
    """Ids and trained spans of many records, with one call into the Rust tokenizer.

    Arguments and errors are those of `encode`. Text never becomes a special token: a literal
    `</s>` in a record is tokenised letter by letter.
    """
    resolved = get_template(template)
    backend = _prepare(tokenizer)
    pages = [render(record, resolved) for record in records]
    encodings = backend.encode_texts(pages)
    return [_assemble(page, encodings, backend) for page in pages]


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


def tokenizer_facts(tokenizer: AnyTokenizer) -> TokenizerFacts:
    """The facts a manifest keeps; equal for equal tokenizers, wherever they were loaded from."""
    source = str(getattr(tokenizer, "name_or_path", ""))
    copy = _copy_backend(tokenizer)
    return TokenizerFacts(
        name=Path(source).name if Path(source).is_dir() else source,
        fingerprint=hashlib.sha256(copy.to_str().encode()).hexdigest(),
        vocab_size=copy.get_vocab_size(with_added_tokens=True),
        bos_id=_role_id(tokenizer, "bos"),
        eos_id=_role_id(tokenizer, "eos"),
        pad_id=_role_id(tokenizer, "pad"),
    )


def load_tokenizer(name_or_dir: str | Path) -> PreTrainedTokenizerBase:
    """A fast tokenizer from a folder or, by its name, from the hub; never with code of its own.

    A folder with a SentencePiece `tokenizer.model` and no `tokenizer.json` gets its merges in the
    order of the model's scores: transformers 5 converts it without the scores, which changes the
    ids of runs of spaces.

    Raises:
        DataError: If there is no such tokenizer, or it has no Rust backend.
    """
    import transformers

    _check_folder(name_or_dir)
    loader: Any = transformers.AutoTokenizer
    try:
        tokenizer: Any = loader.from_pretrained(str(name_or_dir), trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"tokenizer {str(name_or_dir)!r} could not be loaded ({first_line}); give a folder "
            "with tokenizer.json or tokenizer.model, or a name on the hub (tokenizer.model needs "
            "the packages sentencepiece and protobuf)"
        ) from error
    if not isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
        raise DataError(
            f"tokenizer {str(name_or_dir)!r} has no fast (Rust) backend; "
            "convert it to a tokenizer.json"
        )
    model_file = Path(getattr(tokenizer, "vocab_file", None) or "")
    is_converted = model_file.suffix == ".model" and not (
        model_file.with_name("tokenizer.json").exists()
    )
    if is_converted and isinstance(tokenizer.backend_tokenizer.model, models.BPE):
        tokenizer.backend_tokenizer.model = _scored_model(
            model_file, tokenizer.backend_tokenizer.model
        )
    return tokenizer


def train_tokenizer(texts: Iterable[str], directory: str | Path, *, vocab_size: int) -> None:
    """Train a small byte-level BPE tokenizer and write a folder that `load_tokenizer` reads.

    Words are pre-tokenised with their leading space, so a frequent word is one token. Beginning
    `<s>`, end `</s>`, padding and unknown `<pad>` (ids 1, 2, 0). The same texts give the same
    files.

    Raises:
        DataError: If `vocab_size` leaves no room for the 256 bytes and 3 special tokens.
    """
    specials = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(specials)
    if vocab_size < smallest:
        raise DataError(f"vocab_size {vocab_size} is too small: a byte-level one needs {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<pad>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
    }
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


@dataclass(frozen=True)
class _Backend:
    """Private copies of a tokenizer's backend that see no special token in a text.

    Attributes:
        first: Tokenises a text at the start of a record or after an image.
        later: Tokenises a text after a special token; the same object as `first`, unless the
            tokenizer puts its leading space at a start only.
        roles: Ids that "bos" and "eos" stand for; empty where the tokenizer adds none.
    """

    first: Tokenizer
    later: Tokenizer
    roles: dict[str, list[int]]

    def encode_texts(self, pages: Sequence[list[Segment]]) -> Iterator[Encoding]:
        """The encodings of all text segments, in order."""
        texts = [(s.text, follows) for page in pages for s, follows in _texts(page)]
        if self.first is self.later:
            return iter(_run(self.first, [text for text, _ in texts]))
        first = iter(_run(self.first, [text for text, follows in texts if not follows]))
        later = iter(_run(self.later, [text for text, follows in texts if follows]))
        return (next(later if follows else first) for _, follows in texts)

    def special_ids(self, name: str) -> list[int]:
        """The ids (one, or none for a tokenizer without bos) of a special token."""
        if name in self.roles:
            return self.roles[name]
        found = self.first.token_to_id(name)
        if found is None:
            raise DataError(
                f"the template needs the special token {name!r}, which the tokenizer lacks; "
                "take another template or another tokenizer"
            )
        return [found]


def _texts(page: Iterable[Segment]) -> Iterator[tuple[TextSegment, bool]]:
    """Each text segment, and whether a special token other than bos stands before it."""
    follows = False
    for segment in page:
        if isinstance(segment, TextSegment):
            yield segment, follows
        follows = isinstance(segment, SpecialToken) and segment.name != "bos"


def _run(backend: Tokenizer, texts: list[str]) -> list[Encoding]:
    return backend.encode_batch(texts, add_special_tokens=False)


def _assemble(page: Iterable[Segment], encodings: Iterator[Encoding], backend: _Backend) -> Encoded:
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
    trained = sum(spans[1::2]) - sum(spans[::2])
    return Encoded(ids, spans, trained, len(ids) - images)


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
    as lying on the character it stands before.
    """
    if segment.trained == ((0, len(segment.text)),):
        yield 0, len(encoding.ids)
        return
    offsets = encoding.offsets if segment.trained else []
    for start, end in segment.trained:
        first = bisect_right(offsets, start, key=lambda offset: max(offset[1], offset[0] + 1))
        yield first, max(first, bisect_left(offsets, end, key=lambda offset: offset[0]))


def _prepare(tokenizer: AnyTokenizer) -> _Backend:
    # The size in the key notices tokens added to a tokenizer that was prepared before.
    return _prepare_cached(tokenizer, _backend_of(tokenizer).get_vocab_size())


@lru_cache(maxsize=8)
def _prepare_cached(tokenizer: AnyTokenizer, vocab_size: int) -> _Backend:
    """Build the private copies; kept, as a copy of 32,000 entries takes tens of milliseconds."""
    del vocab_size
    copy = _copy_backend(tokenizer)
    # Asking the tokenizer is surer than its settings: LLaVA too adds bos where the tokenizer does.
    bos = _role_id(tokenizer, "bos")
    begins = copy.encode("", add_special_tokens=True).ids[:1]
    roles = {"bos": begins if begins == [bos] else []}
    eos = _role_id(tokenizer, "eos")
    if eos is not None:
        roles["eos"] = [eos]
    # A post-processor of the byte-level family trims the space off the offsets.
    copy.post_processor = None
    copy.encode_special_tokens = True
    first, later = _with_prefix_rule(copy)
    return _Backend(first, later, roles)


def _with_prefix_rule(backend: Tokenizer) -> tuple[Tokenizer, Tokenizer]:
    """Tokenizers for a first and a later text, with SentencePiece's rule for the leading space.

    SentencePiece puts a space before any text. The Metaspace step of transformers 5 does not where
    the text itself begins with one, so it is replaced by the normaliser pair that does. Its scheme
    "always" is Llama's legacy behaviour (every text between special tokens gets the space),
    "first" the later one (only a text at the start).
    """
    step = backend.pre_tokenizer
    is_sentencepiece = isinstance(step, pre_tokenizers.Metaspace) and not step.split
    if not is_sentencepiece or backend.normalizer is not None:
        return backend, backend
    assert isinstance(step, pre_tokenizers.Metaspace)
    if step.prepend_scheme == "never":
        return backend, backend
    mark = step.replacement
    spaces = normalizers.Replace(" ", mark)
    later = Tokenizer.from_str(backend.to_str()) if step.prepend_scheme == "first" else backend
    for copy, rule in (
        (later, spaces),
        (backend, normalizers.Sequence([normalizers.Prepend(mark), spaces])),
    ):
        copy.normalizer = rule
        copy.pre_tokenizer = None
        copy.encode_special_tokens = True  # not part of the serialised form
    return backend, later


def _copy_backend(tokenizer: AnyTokenizer) -> Tokenizer:
    """A copy that neither pads nor truncates, whatever the user's object was last asked to do."""
    copy = Tokenizer.from_str(_backend_of(tokenizer).to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy


def _backend_of(tokenizer: AnyTokenizer) -> Tokenizer:
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    backend: object = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise DataError(
            f"{type(tokenizer).__name__} is no fast tokenizer; load it with load_tokenizer"
        )
    return backend


def _role_id(tokenizer: AnyTokenizer, role: str) -> int | None:
    """The id that plays a role ("bos", "eos", "pad"), if one does."""
    if not isinstance(tokenizer, Tokenizer):
        return getattr(tokenizer, f"{role}_token_id", None)
    found = (tokenizer.token_to_id(token) for token in _ROLE_TOKENS[role])
    return next((token_id for token_id in found if token_id is not None), None)


def _check_folder(name_or_dir: str | Path) -> None:
    """Refuse a path that is no tokenizer's folder before the hub is asked about it."""
    path = Path(name_or_dir)
    # A name on the hub has one slash at most.
    starts_like_path = path.is_absolute() or str(name_or_dir).startswith((".", "~"))
    looks_like_path = starts_like_path or len(path.parts) > 2
    if looks_like_path and not path.is_dir():
        raise DataError(f"tokenizer folder {path} does not exist; check --tokenizer")
    # Its settings alone are not enough: transformers 5 would make an empty tokenizer of them.
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
    if path.is_dir() and not any((path / name).exists() for name in files):
        raise DataError(
            f"tokenizer folder {path} holds no tokenizer (none of {', '.join(files)}); "
            "copy the model's tokenizer files there"
        )


def _scored_model(model_file: Path, converted: models.BPE) -> models.BPE:
    """The BPE model of a SentencePiece file, its merges in the order SentencePiece takes them.

    SentencePiece joins the neighbours whose piece has the best score, the leftmost at a tie. Ties
    occur among runs of spaces only, which thus grow from the left: longer left parts first.
    """
    from sentencepiece import SentencePieceProcessor

    pieces: Any = SentencePieceProcessor(model_file=str(model_file))
    size: int = pieces.get_piece_size()
    vocab: dict[str, int] = {pieces.id_to_piece(i): i for i in range(size)}
    # Control, unknown and byte pieces are never the result of a merge: `</s>` in a text is text.
    scores: dict[str, float] = {
        pieces.id_to_piece(i): pieces.get_score(i)
        for i in range(size)
        if not (pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i))
    }
    merges = [
        (piece[:cut], piece[cut:])
        for piece in scores
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    merges.sort(key=lambda pair: (-scores[pair[0] + pair[1]], -len(pair[0])))
    return models.BPE(
        vocab=vocab,
        merges=merges,
        unk_token=converted.unk_token,
        fuse_unk=converted.fuse_unk,
        byte_fallback=converted.byte_fallback,
    )
