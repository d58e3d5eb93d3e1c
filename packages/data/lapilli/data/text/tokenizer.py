"""A tokenizer's Rust backend, copied so that special tokens in texts stay text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from tokenizers import Encoding, Tokenizer, normalizers, pre_tokenizers

from lapilli.data.errors import DataError
from lapilli.data.record import excerpt
from lapilli.data.text.plain_tokenizer import PlainTokenizer
from lapilli.data.text.rendering import Eaten, Segment, SpecialToken, TextSegment
from lapilli.data.text.tokenizer_files import second_opinion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "AnyTokenizer",
    "Backend",
    "TokenizerFacts",
    "backend_for",
    "check_agreement",
    "plain_backend",
    "raw_backend",
    "role_id",
    "tokenizer_facts",
]

AnyTokenizer: TypeAlias = "PreTrainedTokenizerBase | PlainTokenizer | Tokenizer"

# A bare `tokenizers.Tokenizer` does not say which of its tokens play a role: these are looked up.
_ROLE_TOKENS = {
    "bos": ("<s>", "<|begin_of_text|>"),
    "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>"),
    "pad": ("<pad>",),
    "unk": ("<unk>",),
}

# Texts in one call into Rust: enough to make the call's own cost vanish, few enough to bound what
# its results hold, about 200 bytes a token.
_TEXTS_AT_ONCE = 1024

# What a slow and a fast tokenizer have been seen to disagree on.
_PROBES = (
    "a  b   c    d", " leading", "trailing ", "\n\n\tcode = {'x': 1}\n", "1234567890 3.14159",
    "naïve café ½", "请描述图片。", "\U0001f43b\u200d\u2744\ufe0f", "don't WON'T it's",
    "ASSISTANT: </s> <unk>", "e\u0301 \u2581 \u00a0",
)  # fmt: skip


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


@dataclass(frozen=True)
class Backend:
    """Private copies of a tokenizer's backend that see no special token in a text.

    Attributes:
        first: Tokenises a text at the start of a record or after an image.
        later: Tokenises a text after a special token; the same object as `first`, unless the
            tokenizer puts its leading space at a start only.
        roles: Ids that "bos", "bos!" and "eos" stand for. "bos" is empty where the tokenizer adds
            none by itself, "bos!" is there if the tokenizer has one.
        specials: Ids of the special tokens by their content.
        eaten: The special tokens that swallow white space.
    """

    first: Tokenizer
    later: Tokenizer
    roles: dict[str, list[int]]
    specials: dict[str, int]
    eaten: Eaten

    def encode_texts(self, pages: Sequence[list[Segment]]) -> Iterator[Encoding]:
        """The encodings of all text segments, in order."""
        texts = [(s.text, follows) for page in pages for s, follows in _texts(page)]
        if self.first is self.later:
            yield from _run(self.first, [text for text, _ in texts])
            return
        first = _run(self.first, [text for text, follows in texts if not follows])
        later = _run(self.later, [text for text, follows in texts if follows])
        for _, follows in texts:
            yield next(later if follows else first)

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

    def count(self, text: str) -> int:
        """How many ids the text adds behind a letter."""
        both, alone = (self.first.encode(t, add_special_tokens=False) for t in ("x" + text, "x"))
        return len(both) - len(alone)


def _texts(page: Iterable[Segment]) -> Iterator[tuple[TextSegment, bool]]:
    """Each text segment, and whether a special token of the text precedes it.

    The bos at the very start is none: the tokenizer puts it there, it is not read in the text.
    """
    follows = False
    for place, segment in enumerate(page):
        if isinstance(segment, TextSegment):
            yield segment, follows
        is_special = isinstance(segment, SpecialToken)
        follows = is_special and (segment.name not in ("bos", "bos!") or place > 0)


def _run(backend: Tokenizer, texts: list[str]) -> Iterator[Encoding]:
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        yield from backend.encode_batch(
            texts[start : start + _TEXTS_AT_ONCE], add_special_tokens=False
        )


def backend_for(tokenizer: AnyTokenizer) -> Backend:
    """The private copies for a tokenizer, made once."""
    # The size in the key notices tokens added to a tokenizer that was prepared before.
    return _backend_cached(tokenizer, raw_backend(tokenizer).get_vocab_size())


@lru_cache(maxsize=8)
def _backend_cached(tokenizer: AnyTokenizer, vocab_size: int) -> Backend:
    """Build the private copies; kept, as a copy of 32,000 entries takes tens of milliseconds."""
    del vocab_size
    copy = _copy_backend(tokenizer)
    # Asking the tokenizer is surer than its settings: LLaVA too adds bos where the tokenizer does.
    bos = role_id(tokenizer, "bos")
    begins = copy.encode("", add_special_tokens=True).ids[:1]
    roles = {"bos": begins if begins == [bos] else []}
    if bos is not None:
        roles["bos!"] = [bos]
    eos = role_id(tokenizer, "eos")
    if eos is not None:
        roles["eos"] = [eos]
    added = copy.get_added_tokens_decoder()
    specials = {token.content: token_id for token_id, token in added.items() if token.special}
    eaten = {
        token.content: (token.lstrip, token.rstrip)
        for token in added.values()
        if token.special and (token.lstrip or token.rstrip)
    }
    named = {role: added[ids[0]].content for role, ids in roles.items() if ids and ids[0] in added}
    eaten |= {role: eaten[content] for role, content in named.items() if content in eaten}
    # A post-processor of the byte-level family trims the space off the offsets.
    copy.post_processor = None
    copy.encode_special_tokens = True
    first, later = _with_prefix_rule(copy)
    return Backend(first=first, later=later, roles=roles, specials=specials, eaten=eaten)


def plain_backend(tokenizer: AnyTokenizer) -> Tokenizer:
    """A copy that adds no token to a text and cuts texts as `Backend` does.

    Where a leading space goes in front of the first text of several alone, it stays a step of its
    own, which no normaliser can express.
    """
    copy = _copy_backend(tokenizer)
    copy.post_processor = None
    first, later = _with_prefix_rule(copy)
    if first is not later:
        copy = _copy_backend(tokenizer)
        copy.post_processor = None
    copy.encode_special_tokens = False
    return copy


def tokenizer_facts(tokenizer: AnyTokenizer) -> TokenizerFacts:
    """The facts a manifest keeps; equal for equal tokenizers, wherever they were loaded from."""
    source = str(getattr(tokenizer, "name_or_path", ""))
    copy = _copy_backend(tokenizer)
    return TokenizerFacts(
        name=Path(source).name if Path(source).is_dir() else source,
        fingerprint=hashlib.sha256(copy.to_str().encode()).hexdigest(),
        vocab_size=copy.get_vocab_size(with_added_tokens=True),
        bos_id=role_id(tokenizer, "bos"),
        eos_id=role_id(tokenizer, "eos"),
        pad_id=role_id(tokenizer, "pad"),
    )


def check_agreement(tokenizer: AnyTokenizer, texts: Iterable[str] = ()) -> None:
    """Stop where the tokenizer's slow implementation gives other ids than the fast one.

    The slow ones are the reference: sentencepiece on a `tokenizer.model`, tiktoken on a
    `.tiktoken` file. A tokenizer without such a file has nothing to be compared with.

    Raises:
        DataError: Names the text, and both sides' first ids that differ.
    """
    slow = second_opinion(tokenizer)
    if slow is None:
        return
    name, reference = slow
    backend = backend_for(tokenizer).first
    for text in (*_PROBES, *texts):
        ours, theirs = backend.encode(text, add_special_tokens=False).ids, list(reference(text))
        if ours != theirs:
            at = next(
                (i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]),
                min(len(ours), len(theirs)),
            )
            raise DataError(
                f"tokenizer: {name} gives ids {theirs[at : at + 4]} where the fast tokenizer gives "
                f"{ours[at : at + 4]}, at token {at} of '{excerpt(text)}'; take tokenizer.json out "
                "of the folder, so that the original file is read"
            )


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
    copy = Tokenizer.from_str(raw_backend(tokenizer).to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy


def raw_backend(tokenizer: AnyTokenizer) -> Tokenizer:
    """The Rust tokenizer itself, as its owner has it set; not to be changed.

    Raises:
        DataError: It has none.
    """
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    backend: object = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise DataError(
            f"{type(tokenizer).__name__} is no fast tokenizer; load it with load_tokenizer"
        )
    return backend


def role_id(tokenizer: AnyTokenizer, role: str) -> int | None:
    """The id that plays a role ("bos", "eos", "pad"), if one does."""
    if not isinstance(tokenizer, Tokenizer):
        return getattr(tokenizer, f"{role}_token_id", None)
    found = (tokenizer.token_to_id(token) for token in _ROLE_TOKENS[role])
    return next((token_id for token_id in found if token_id is not None), None)
