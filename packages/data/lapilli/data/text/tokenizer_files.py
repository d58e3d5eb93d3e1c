"""Read, convert, compare and train tokenizer files.

Public names are re-exported by `encode`.
"""

from __future__ import annotations

import base64
import binascii
import fnmatch
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from lapilli.data.errors import DataError
from lapilli.data.io.access import is_folder, require_readable, subpaths
from lapilli.data.io.filesystems import is_remote
from lapilli.data.io.local_copy import local_copy
from lapilli.data.io.whole_file import MOST_VOCABULARY, read_whole
from lapilli.data.text.plain_tokenizer import read_plain_tokenizer
from lapilli.data.text.tokenizer_folder import (
    PACKED,
    VOCABULARIES,
    check_files,
    sentencepiece_defect,
    unpacked,
    what_is_wrong,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "has_vocabulary", "is_kept", "load_tokenizer", "second_opinion", "tokenizer_folder",
    "train_tokenizer",
]  # fmt: skip

TIKTOKEN = "qwen.tiktoken"
CONFIG = "config.json"  # the model's; its `model_type` takes part in choosing a tokenizer's class
SETTINGS = "tokenizer_config.json"
# All that decides which tokenizer a folder is; patterns of `fnmatch`.
KEPT_FILES = (
    *VOCABULARIES, CONFIG, "tokenizer*.json", "tokenizer*.model", "special_tokens_map.json",
    "added_tokens.json", "merges.txt", "chat_template.*", "*.tiktoken",
)  # fmt: skip
# Qwen-7B's own tokenizer code, as data: how it cuts a text, and its tokens behind the ranks.
QWEN_CUTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How the names of files begin that transformers reads a tokenizer from, and passes over unread.
BEGINNINGS = (
    "tokenizer", "vocab", "merges", "added_tokens", "special_tokens", "chat_template",
    "config.json", "tekken", "spiece", TIKTOKEN,
)  # fmt: skip
QWEN_SPECIALS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205)),
]  # fmt: skip


def load_tokenizer(name_or_dir: str | Path) -> PreTrainedTokenizerBase:
    """A fast tokenizer from a folder or, by its name, from the hub; never with code of its own.

    Of an address its own files are copied to this node. A folder with a SentencePiece
    `tokenizer.model` and no `tokenizer.json` gets its merges in the
    order of the model's scores: transformers 5 converts it without the scores, which changes the
    ids of runs of spaces. Such a folder is read by the class that its `tokenizer_config.json`
    names, whatever model lies beside it, and as Llama's where it names none. `legacy` and
    `add_bos_token` are true where it does not say, as in transformers 4. A folder with Qwen-7B's
    `qwen.tiktoken` is converted too, without the package tiktoken. Files that are packed
    (`tokenizer.json.gz`, `.xz`, `.zst`) are unpacked. Without transformers, a folder whose
    `tokenizer.json` says everything is read to a `PlainTokenizer`.

    Raises:
        DataError: If there is no such tokenizer, it has no Rust backend, one of its files is
            something else or cut short, or it needs transformers, which is not installed.
    """
    if is_remote(str(name_or_dir)):
        tokenizer = load_tokenizer(tokenizer_folder(name_or_dir))
        tokenizer.name_or_path = str(name_or_dir)
        return tokenizer
    _check_folder(name_or_dir)
    if not Path(name_or_dir).is_dir():
        return _load(name_or_dir)
    check_files(Path(name_or_dir))
    with unpacked(Path(name_or_dir)) as folder:
        tokenizer: Any = _load(folder)
    if str(folder) != str(name_or_dir):
        tokenizer.name_or_path = str(name_or_dir)
    return tokenizer


def _load(name_or_dir: str | Path) -> Any:
    folder = Path(name_or_dir)
    if importlib.util.find_spec("transformers") is None:
        return read_plain_tokenizer(tokenizer_folder(name_or_dir))
    if (folder / TIKTOKEN).is_file() and not (folder / "tokenizer.json").exists():
        return _qwen_tokenizer(folder)
    loader, settings = _reader(name_or_dir)
    try:
        tokenizer: Any = loader.from_pretrained(
            str(name_or_dir), trust_remote_code=False, **settings
        )
    except Exception as error:  # a damaged file raises whatever its parser does
        if folder.is_dir() and (wrong := what_is_wrong(folder)):
            raise DataError(f"tokenizer {wrong}") from error
        raise DataError(
            f"tokenizer {str(name_or_dir)!r} could not be loaded ({_first_line(error)}); give "
            f"a folder with tokenizer.json, tokenizer.model or {TIKTOKEN}, or a name on the hub "
            "(tokenizer.model needs the packages sentencepiece and protobuf)"
        ) from error
    if not isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
        raise DataError(
            f"tokenizer {str(name_or_dir)!r} has no fast (Rust) backend; "
            "convert it to a tokenizer.json"
        )
    model_file = _sentencepiece_file(tokenizer)
    if model_file is not None and not model_file.with_name("tokenizer.json").exists():
        converted = tokenizer.backend_tokenizer.model
        if isinstance(converted, models.BPE) and _is_sentencepiece(model_file):
            tokenizer.backend_tokenizer.model = _scored_model(model_file, converted)
    if hasattr(tokenizer, "legacy"):  # which `save_pretrained` leaves out, and then reads as false
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    return tokenizer


def tokenizer_folder(name_or_dir: str | Path) -> Path:
    """The folder that a tokenizer's own files lie in: a local one, or this node's copy of them.

    Raises:
        DataError: There is no such folder, and no such name that can be reached.
    """
    if is_remote(str(name_or_dir)):
        return local_copy(name_or_dir, "tokenizer", is_kept)
    _check_folder_exists(name_or_dir)
    if Path(name_or_dir).is_dir():
        return Path(name_or_dir)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name_or_dir), allow_patterns=list(KEPT_FILES)))
    except Exception as error:  # of the network, the name or the right to read it
        raise DataError(
            f"tokenizer {str(name_or_dir)!r} is no folder here and cannot be read from the hub "
            f"({_first_line(error)}); give a folder, or a name on the hub that can be reached"
        ) from None


def is_kept(name: str) -> bool:
    """Whether a file of a folder, which may hold a whole model, is its tokenizer's."""
    for suffix in PACKED:
        name = name.removesuffix(suffix)
    return any(fnmatch.fnmatchcase(name, kept) for kept in KEPT_FILES)


def has_vocabulary(folder: Path) -> bool:
    """Whether a folder holds a tokenizer, in whatever state, and not only weights."""
    names = {f.name.removesuffix(s) for f in subpaths(folder) for s in ("", *PACKED)}
    return not names.isdisjoint(VOCABULARIES)


def _reader(name_or_dir: str | Path) -> tuple[Any, dict[str, bool]]:
    """The class that reads a tokenizer's files, and settings that they leave open.

    transformers 5 chooses by the model's type too, and reads `tokenizer.model` beside a Mistral's
    or LLaVA's `config.json` with a class that puts no space before a text.
    """
    import transformers

    auto: Any = transformers.AutoTokenizer
    try:
        folder = tokenizer_folder(name_or_dir)
    except DataError:
        return auto, {}  # its error names the problem
    others = (folder / name for name in VOCABULARIES if name != "tokenizer.model")
    if any(path.exists() for path in others) or not _is_bpe(folder / "tokenizer.model"):
        return auto, {}
    settings, config = _read_json(folder / SETTINGS), _read_json(folder / CONFIG)
    named = settings.get("tokenizer_class") or config.get("tokenizer_class") or ""
    if "auto_map" in settings or not _is_llamas(str(named), str(config.get("model_type"))):
        return auto, {}
    left_open = ("legacy", "add_bos_token")
    return transformers.LlamaTokenizer, {
        name: True for name in left_open if settings.get(name) is None
    }


def _is_llamas(named: str, model_type: str) -> bool:
    """Whether a SentencePiece model is read as Llama's: it says so, or nothing says otherwise."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    generic = {"", "TokenizersBackend", "PythonBackend", "MistralCommonBackend"}
    generic |= {"PreTrainedTokenizer", "LlamaTokenizer"}
    kind = named.removesuffix("Fast")
    by_type = str(TOKENIZER_MAPPING_NAMES.get(model_type) or "").removesuffix("Fast")
    return kind == "LlamaTokenizer" or (kind in generic and by_type in generic)


def _read_json(path: Path) -> dict[str, Any]:
    """A mapping of a JSON file; empty where there is none, or nothing that can be read."""
    try:
        found: object = json.loads(read_whole(path, MOST_VOCABULARY))
    except (OSError, ValueError, RecursionError):
        return {}  # transformers' error names the problem
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def _is_bpe(path: Path) -> bool:
    """Whether a file is a SentencePiece model that merges pairs, as Llama's does."""
    if not path.is_file() or not _is_sentencepiece(path):
        return False
    from sentencepiece import sentencepiece_model_pb2 as pb2

    proto: Any = pb2
    spec = proto.ModelProto.FromString(read_whole(path, MOST_VOCABULARY)).trainer_spec
    return spec.model_type == proto.TrainerSpec.BPE


def _is_sentencepiece(path: Path) -> bool:
    """Whether the library reads a `.model` file; some are tiktoken's."""
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError):
        return False
    return True


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def second_opinion(tokenizer: Any) -> tuple[str, Callable[[str], Sequence[int]]] | None:
    """The slow implementation that reads the tokenizer's original file, if there is one.

    Returns:
        Its name and a function from text to ids without special tokens: sentencepiece for a
        `tokenizer.model`, the package tiktoken, where it is installed, for a `.tiktoken` file.
    """
    model_file = _sentencepiece_file(tokenizer)
    if model_file is not None and (defect := sentencepiece_defect(model_file)):
        warnings.warn(f"{model_file} is left aside, no id is compared: {defect}", stacklevel=2)
    elif model_file is not None:
        from sentencepiece import SentencePieceProcessor

        pieces: Any = SentencePieceProcessor(model_file=str(model_file))
        return f"sentencepiece on {model_file.name}", pieces.encode
    ranks_file = Path(str(getattr(tokenizer, "name_or_path", ""))) / TIKTOKEN
    if not ranks_file.is_file():
        return None
    try:
        import tiktoken
    except ImportError:
        return None
    import unicodedata

    encoding: Any = tiktoken.Encoding(
        "qwen", pat_str=QWEN_CUTS, mergeable_ranks=_read_ranks(ranks_file), special_tokens={}
    )
    return (
        f"tiktoken on {TIKTOKEN}",
        lambda text: encoding.encode_ordinary(unicodedata.normalize("NFC", text)),
    )


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


def _check_folder(name_or_dir: str | Path) -> None:
    """Reject a path that is not a tokenizer's folder before the hub is asked about it."""
    _check_folder_exists(name_or_dir)
    path = Path(name_or_dir)
    if not is_folder(path):
        return
    if not has_vocabulary(path):
        raise DataError(
            f"tokenizer folder {path} holds no tokenizer (none of {', '.join(VOCABULARIES)}); "
            "copy the model's tokenizer files there"
        )
    for file in subpaths(path):
        if file.name.startswith(BEGINNINGS):
            require_readable(file)


def _check_folder_exists(name_or_dir: str | Path) -> None:
    path = Path(name_or_dir)
    # A name on the hub has one slash at most.
    starts_like_path = path.is_absolute() or str(name_or_dir).startswith((".", "~"))
    looks_like_path = starts_like_path or len(path.parts) > 2
    if looks_like_path and not is_folder(path):
        raise DataError(f"tokenizer folder {path} does not exist; check --tokenizer")


def _sentencepiece_file(tokenizer: Any) -> Path | None:
    """The SentencePiece model a tokenizer was made from, or that lies beside its files."""
    named = Path(str(getattr(tokenizer, "vocab_file", None) or ""))
    beside = Path(str(getattr(tokenizer, "name_or_path", "") or "")) / "tokenizer.model"
    return next((f for f in (named, beside) if f.suffix == ".model" and f.is_file()), None)


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
    return models.BPE(
        vocab=vocab,
        merges=_merges({piece: -score for piece, score in scores.items()}),
        unk_token=converted.unk_token,
        fuse_unk=converted.fuse_unk,
        byte_fallback=converted.byte_fallback,
    )


def _merges(ranks: dict[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, the best-ranked piece first."""
    merges = [
        (piece[:cut], piece[cut:])
        for piece in ranks
        for cut in range(1, len(piece))
        if piece[:cut] in ranks and piece[cut:] in ranks
    ]
    merges.sort(key=lambda pair: (ranks[pair[0] + pair[1]], -len(pair[0])))
    return merges


def _qwen_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Qwen-7B's tokenizer from its ranks: the same ids, on the Rust backend."""
    import transformers

    letters = _letters_of_bytes()
    ranks = {
        "".join(letters[byte] for byte in token): rank
        for token, rank in _read_ranks(folder / TIKTOKEN).items()
    }
    merges = _merges({piece: float(rank) for piece, rank in ranks.items()})
    backend = Tokenizer(models.BPE(vocab=ranks, merges=merges, ignore_merges=True))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_CUTS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in QWEN_SPECIALS])
    fast: Any = transformers.PreTrainedTokenizerFast
    return fast(
        tokenizer_object=backend,
        name_or_path=str(folder),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def _read_ranks(path: Path) -> dict[bytes, int]:
    """A `.tiktoken` file: a line a token, its bytes in base64 and its rank."""
    try:
        lines = read_whole(path, MOST_VOCABULARY).decode("ascii").split("\n")
        pairs = [line.split() for line in lines if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError("a rank is missing: it is cut short or damaged")
        return ranks
    except (OSError, ValueError, binascii.Error) as error:
        raise DataError(
            f"tokenizer {path} is no list of base64 tokens and ranks ({error}); download it again"
        ) from None


def _letters_of_bytes() -> dict[int, str]:
    """The printable letter that the byte-level family writes for each byte (GPT-2's table)."""
    letters = {byte: chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}
    rest = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + place) for place, byte in enumerate(rest)}
