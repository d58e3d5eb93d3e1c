"""Write a tokenizer's files for LLaVA's code (transformers 4.37, `use_fast=False`)."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lapilli.data.dataset.tokenizer_copy import open_copy, write_copy
from lapilli.data.errors import DataError
from lapilli.data.text.encode import tokenizer_facts
from lapilli.data.text.tokenizer import raw_backend

__all__ = ["put_tokenizer", "put_tokenizer_for_llava"]

MODEL, FAST, SETTINGS = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


def put_tokenizer(tokenizer: Any, folder: Path) -> None:
    """The tokenizer's own files beside a model's `config.json`, which stays the model's."""
    with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=folder) as made:
        write_copy(tokenizer, Path(made) / "tokenizer")
        for path in (Path(made) / "tokenizer").iterdir():
            if path.name != "config.json":
                shutil.copyfile(path, folder / path.name)


def put_tokenizer_for_llava(tokenizer: Any, folder: Path) -> str:
    """Write files that LLaVA's `AutoTokenizer.from_pretrained(use_fast=False)` reads.

    With a SentencePiece `tokenizer.model` whose pieces are the tokenizer's, LlamaTokenizer reads
    it. Any other is written as `tokenizer.json` for PreTrainedTokenizerFast, which `use_fast=False`
    takes as well where it is the class named.

    Returns:
        The class that reads it.

    Raises:
        DataError: What is written reads otherwise here.
    """
    facts = asdict(tokenizer_facts(tokenizer))
    ways: list[tuple[str, Callable[[], None]]] = []
    model = Path(str(getattr(tokenizer, "name_or_path", "") or ".")) / MODEL
    if model.is_file() and _has_pieces(model, tokenizer):
        ways.append(("LlamaTokenizer", lambda: _write_slow(tokenizer, model, folder)))
    ways.append(("PreTrainedTokenizerFast", lambda: _write_fast(tokenizer, folder)))
    wrong: DataError | None = None
    for name, write in ways:
        for file in (MODEL, FAST, SETTINGS):
            (folder / file).unlink(missing_ok=True)
        write()
        try:
            open_copy(folder, facts, "generate from the run itself")
        except DataError as error:
            wrong = error
            continue
        return name
    raise wrong or AssertionError(folder)


def _has_pieces(model: Path, tokenizer: Any) -> bool:
    """Whether a SentencePiece model's pieces have the ids that they have in the tokenizer."""
    from sentencepiece import SentencePieceProcessor

    try:
        pieces: Any = SentencePieceProcessor(model_file=str(model))
    except (OSError, RuntimeError):  # tiktoken's files have that name too
        return False
    known: dict[str, int] = tokenizer.get_vocab()
    size = int(pieces.get_piece_size())
    added = {str(token): int(i) for i, token in tokenizer.added_tokens_decoder.items()}
    is_same = all(known.get(pieces.id_to_piece(i)) == i for i in range(size))
    return is_same and all(known.get(t) == i for t, i in added.items())


def _write_slow(tokenizer: Any, model: Path, folder: Path) -> None:
    shutil.copyfile(model, folder / MODEL)
    tokens: dict[int, Any] = tokenizer.added_tokens_decoder
    settings = _settings(tokenizer) | {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": bool(getattr(tokenizer, "legacy", True)),
        "add_bos_token": bool(getattr(tokenizer, "add_bos_token", True)),
        "add_eos_token": bool(getattr(tokenizer, "add_eos_token", False)),
        "sp_model_kwargs": {},
        "added_tokens_decoder": {
            str(number): {
                "content": token.content, "special": token.special, "lstrip": token.lstrip,
                "rstrip": token.rstrip, "normalized": token.normalized,
                "single_word": token.single_word,
            }
            for number, token in sorted(tokens.items())
        },
    }  # fmt: skip
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _write_fast(tokenizer: Any, folder: Path) -> None:
    found: dict[str, Any] = json.loads(raw_backend(tokenizer).to_str())
    merges = found["model"].get("merges")
    if merges and not any(" " in part for pair in merges for part in pair if len(pair) == 2):
        # as tokenizers before 0.20 read them
        found["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in merges]
    text = json.dumps(found, ensure_ascii=False)
    (folder / FAST).write_text(text, encoding="utf-8")
    settings = _settings(tokenizer) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _settings(tokenizer: Any) -> dict[str, Any]:
    roles = {role: str(getattr(tokenizer, role)) for role in ROLES if getattr(tokenizer, role, "")}
    most = int(getattr(tokenizer, "model_max_length", 0) or 0)
    limit = {"model_max_length": most} if 0 < most < 1 << 40 else {}
    return {**roles, **limit, "clean_up_tokenization_spaces": False}
