"""Open a folder of tokenizer files, with an error that explains what it lacks."""

from __future__ import annotations

import gzip
import json
import lzma
import tempfile
import zlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from lapilli.data.errors import DataError
from lapilli.data.io.file_kinds import SNIFFED, what_it_is_instead
from lapilli.data.io.whole_file import MOST_VOCABULARY, read_whole, require_plain
from lapilli.data.record import excerpt

__all__ = [
    "PACKED",
    "VOCABULARIES",
    "check_files",
    "sentencepiece_defect",
    "unpacked",
    "what_is_wrong",
]

# Files that hold a vocabulary; a tokenizer's folder has one of them.
VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model",
    "sentencepiece.bpe.model", "tiktoken.model", "qwen.tiktoken",
)  # fmt: skip
OTHERS = (
    "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "config.json", "chat_template.jinja",
)  # fmt: skip
SENTENCEPIECE = "tokenizer.model"
PACKED = (".gz", ".xz", ".zst")


def _open_zstd(path: Path) -> Any:
    return pa.input_stream(str(path), compression="zstd")


OPEN: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


@contextmanager
def unpacked(folder: Path) -> Generator[Path]:
    """The folder itself, or for a while a copy with `tokenizer.json.gz` and the like unpacked.

    Files that are there unpacked come before packed ones.

    Raises:
        DataError: A packed file is damaged or cut short.
    """
    packed = {
        name: path
        for name in (*VOCABULARIES, *OTHERS)
        for suffix in OPEN
        if (path := folder / f"{name}{suffix}").is_file() and not (folder / name).exists()
    }
    if not packed:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="lapilli-tokenizer-") as made:
        for path in folder.iterdir():
            if path.is_file() and path.suffix not in OPEN:
                (Path(made) / path.name).symlink_to(path.resolve())
        for name, path in packed.items():
            _unpack(path, Path(made) / name)
        yield Path(made)


def _unpack(path: Path, target: Path) -> None:
    try:
        with OPEN[path.suffix](path) as source, target.open("wb") as file:
            _copy(source, file)
    except (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError) as error:
        with path.open("rb") as file:
            instead = what_it_is_instead(file.read(SNIFFED), "annotations")
        why = instead or f"damaged or cut short ({excerpt(str(error))}); get it again"
        raise DataError(f"tokenizer {path}: {why}") from None


def _copy(source: BinaryIO, target: BinaryIO) -> None:
    """Unpack a file of bounded size: a few MB of zeros may stand for all of a disk."""
    left = MOST_VOCABULARY
    while part := source.read(1 << 20):
        if (left := left - len(part)) < 0:
            raise ValueError(f"it unpacks to more than {MOST_VOCABULARY} bytes")
        target.write(part)


def check_files(folder: Path) -> None:
    """Refuse a folder with a file that obviously is something else.

    A foreign `tokenizer.model` beside a `tokenizer.json` is not needed, and left aside.

    Raises:
        DataError: Names the file, what it is, and what to do.
    """
    has_json = any((folder / f"tokenizer.json{suffix}").exists() for suffix in ("", *OPEN))
    for name in (*VOCABULARIES, *OTHERS):
        path = folder / name
        is_needed = path.is_file() and not (name == SENTENCEPIECE and has_json)
        if not is_needed:
            continue
        require_plain(path, MOST_VOCABULARY)
        if instead := _instead(path):
            raise DataError(f"tokenizer {path}: {instead}")


def _instead(path: Path) -> str:
    with path.open("rb") as file:
        expected = "ranks" if path.suffix == ".tiktoken" else "tokenizer"
        return what_it_is_instead(file.read(SNIFFED), expected)


def what_is_wrong(folder: Path) -> str:
    """Which file of a folder that could not be loaded is cut short or no tokenizer's; or ""."""
    for name in (*VOCABULARIES, *OTHERS):
        path = folder / name
        if path.is_file() and path.suffix == ".json" and (defect := _json_defect(path)):
            return f"{path} {defect}"
    path = folder / SENTENCEPIECE
    if path.is_file() and not (folder / "tokenizer.json").exists():
        defect = sentencepiece_defect(path)
        return f"{path}: {defect}" if defect else ""
    return ""


def _json_defect(path: Path) -> str:
    try:
        found = json.loads(read_whole(path, MOST_VOCABULARY))
    except (ValueError, RecursionError, OSError) as error:
        return f"is cut short or damaged ({excerpt(str(error))}); get it again"
    fields = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    if path.name == "tokenizer.json" and "model" not in fields:
        return "holds no `model`: it is no tokenizer's file; get the model's own tokenizer.json"
    return ""


def sentencepiece_defect(path: Path) -> str:
    """Why a file is no SentencePiece model, with what to do; "" for one that is."""
    stat = path.stat()
    return _sentencepiece_defect(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=16)
def _sentencepiece_defect(path: Path, size: int, mtime_ns: int) -> str:
    del size, mtime_ns
    if instead := _instead(path):
        return instead
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError, ValueError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"no whole SentencePiece model ({excerpt(first_line)}): get it again"
    return ""
