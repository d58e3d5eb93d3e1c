"""Store a tokenizer's files in a dataset and compare them with their origin.

`save_pretrained` writes down what transformers holds, and not all that it read (`legacy` is left
out), so a tokenizer's own files are kept byte for byte and what is read from them is compared.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lapilli.data.errors import DataError
from lapilli.data.io.atomic import ShardFacts, sha256_file, write_atomic
from lapilli.data.io.remote_path import Output, RemotePath
from lapilli.data.shards.manifest import TOKENIZER
from lapilli.data.text.tokenizer import TokenizerFacts, raw_backend, tokenizer_facts
from lapilli.data.text.tokenizer_files import is_kept, load_tokenizer, tokenizer_folder

__all__ = [
    "TOKENIZER", "check_copy", "check_copy_files", "kept_files", "open_copy", "place_copy",
    "write_copy",
]  # fmt: skip

COMPARED = ("fingerprint", "vocab_size", "bos_id", "eos_id", "pad_id")
REMEDY = "run the same preprocess again, to rewrite the copy"


def write_copy(tokenizer: Any, folder: Path) -> None:
    """Fill a folder from which `load_tokenizer` reads this tokenizer again, ids and all.

    Its own files are taken where it was loaded from some and is still what they say. A tokenizer
    made in memory, or changed there, is saved.

    Args:
        tokenizer: transformers' tokenizer.
        folder: Made anew.

    Raises:
        DataError: What is read from the copy is another tokenizer.
    """
    expected = asdict(tokenizer_facts(tokenizer))
    differs = ""
    for write in (_copy_files, _save, _save_backend):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write(tokenizer, folder)
        differs = _difference(folder, expected)
        if not differs:
            return
    raise DataError(
        f"tokenizer: a copy of {expected['name'] or type(tokenizer).__name__} reads otherwise "
        f"({differs}); give a tokenizer with a tokenizer.json that transformers reads as it is"
    )


def _copy_files(tokenizer: Any, folder: Path) -> None:
    try:
        source = tokenizer_folder(str(getattr(tokenizer, "name_or_path", "")))
    except DataError:
        return  # made in memory: there are no files
    for path in kept_files(source):
        shutil.copyfile(path, folder / path.name)


def kept_files(folder: Path) -> Iterator[Path]:
    """A tokenizer's own files in a folder that may hold a whole model; no code is among them."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and is_kept(path.name):
            yield path


def _save(tokenizer: Any, folder: Path) -> None:
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(str(folder))


def _save_backend(tokenizer: Any, folder: Path) -> None:
    """As a class that takes `tokenizer.json` as it is."""
    raw_backend(tokenizer).save(str(folder / "tokenizer.json"))
    roles = {f"{role}_token" for role in ("bos", "eos", "pad", "unk")}
    named = {role: str(getattr(tokenizer, role)) for role in roles if getattr(tokenizer, role, "")}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _difference(folder: Path, expected: Mapping[str, Any]) -> str:
    """How the tokenizer of a folder differs from the one expected; empty where it does not."""
    try:
        found = tokenizer_facts(load_tokenizer(folder))
    except DataError as error:
        return str(error)
    return _differing(found, expected)


def _differing(found: TokenizerFacts, expected: Mapping[str, Any]) -> str:
    here = asdict(found)
    for name in COMPARED:
        if here[name] != expected[name]:
            was, now = (str(value)[:12] for value in (expected[name], here[name]))
            return f"{name} was {was}, is {now}"
    return ""


def check_copy(folder: Path, tokenizer: Any, expected: Mapping[str, Any], remedy: str) -> None:
    """Compare what was loaded from a folder with the facts of the tokenizer it should be.

    Raises:
        DataError: Names the folder, both values and the remedy.
    """
    if differs := _differing(tokenizer_facts(tokenizer), expected):
        raise DataError(
            f"tokenizer: {folder} is another than the ids were made with ({differs}); {remedy}"
        )


def open_copy(folder: Path, expected: Mapping[str, Any], remedy: str = REMEDY) -> Any:
    """Load the tokenizer kept in a folder and compare it with what it was.

    Args:
        folder: The copy.
        expected: `TokenizerFacts` as a mapping.
        remedy: What to do about one that differs.

    Raises:
        DataError: It is gone, cannot be read, or is another.
    """
    if not folder.is_dir():
        raise DataError(f"tokenizer: {folder} is missing; {remedy}")
    tokenizer = load_tokenizer(folder)
    check_copy(folder, tokenizer, expected, remedy)
    return tokenizer


def check_copy_files(path: Path, files: list[ShardFacts]) -> None:
    """Compare the files of a dataset's copy with what the manifest says: milliseconds.

    Raises:
        DataError: Names the first that is missing or changed.
    """
    for facts in files:
        file = path / facts.path
        try:
            found = sha256_file(file)
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror}); {REMEDY}") from None
        if found != facts.sha256:
            raise DataError(
                f"{file}: not the tokenizer that the dataset was made with (SHA-256 was "
                f"{facts.sha256[:12]}, is {found[:12]}); {REMEDY}"
            )
    known = {Path(facts.path).name for facts in files}
    if files and (added := [f for f in kept_files(path / TOKENIZER) if f.name not in known]):
        raise DataError(
            f"{added[0]}: put beside the tokenizer that the dataset was made with; remove it, or "
            f"{REMEDY}"
        )


def place_copy(folder: Path, target: Output) -> list[ShardFacts]:
    """Replace a dataset's tokenizer folder by a filled one, atomically.

    Returns:
        Facts of the files, by their path in the dataset.
    """
    files = sorted(folder.iterdir())
    facts = [
        ShardFacts(f"{target.name}/{f.name}", 0, f.stat().st_size, sha256_file(f)) for f in files
    ]
    if isinstance(target, RemotePath):
        for path in files:
            (target / path.name).put(path)
        for other in list(target.files()):
            if other.name not in {path.name for path in files}:
                other.unlink(missing_ok=True)
        return facts
    there = {path.name: path for path in target.iterdir()} if target.is_dir() else {}
    now = {Path(one.path).name: one.sha256 for one in facts}
    if there.keys() == now.keys() and all(sha256_file(there[n]) == now[n] for n in now):
        return facts
    temporary, old = (target.with_name(f".{target.name}.{end}") for end in ("part", "old"))
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    for path in files:
        write_atomic(temporary / path.name, lambda part, path=path: _copy_bytes(path, part))
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return facts


def _copy_bytes(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
