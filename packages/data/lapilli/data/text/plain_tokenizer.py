"""Read a `tokenizer.json` without transformers, where both read it alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lapilli.data.errors import DataError
from lapilli.data.io.whole_file import MOST_VOCABULARY, read_whole

__all__ = ["PlainTokenizer", "read_plain_tokenizer"]

# Classes that take `tokenizer.json` as it is.
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
ROLES = ("bos", "eos", "unk", "pad")
ROLE_KEYS = frozenset(f"{role}_token" for role in ROLES)
# Settings that do not change the ids of a text.
HARMLESS = frozenset(
    (
        "backend",
        "chat_template",
        "clean_up_tokenization_spaces",
        "is_local",
        "local_files_only",
        "model_input_names",
        "model_max_length",
        "name_or_path",
        "padding_side",
        "tokenizer_class",
        "truncation_side",
    )
)
# Files that take part in choosing the class or add tokens.
DECIDING = ("config.json", "added_tokens.json", "special_tokens_map.json")
REMEDY = "run pip install 'lapilli[text]'"


class PlainTokenizer:
    """The part of transformers' interface that building a dataset uses.

    Attributes:
        backend_tokenizer: The Rust tokenizer.
        name_or_path: The folder.
        chat_template: Jinja source, if the folder has one.
    """

    def __init__(self, backend: Tokenizer, folder: Path, settings: Mapping[str, Any]) -> None:
        """For a backend with the settings of its `tokenizer_config.json`."""
        self.backend_tokenizer = backend
        self.name_or_path = str(folder)
        self.chat_template: object = settings.get("chat_template")
        for role in ROLES:
            content = settings.get(f"{role}_token")
            setattr(self, f"{role}_token", content)
            setattr(
                self, f"{role}_token_id", None if content is None else backend.token_to_id(content)
            )

    def apply_chat_template(self, *given: object, **settings: object) -> str:
        """Chat templates run in transformers' environment.

        Raises:
            DataError: Always.
        """
        del given, settings
        raise DataError(f"template: a chat template needs the package transformers; {REMEDY}")


def read_plain_tokenizer(folder: Path) -> PlainTokenizer:
    """Read a folder whose `tokenizer.json` holds everything, with the ids transformers gives.

    Raises:
        DataError: Reading it takes transformers; says why.
    """
    if not (folder / "tokenizer.json").is_file():
        raise _needs_transformers(folder, "it has no tokenizer.json")
    try:
        text = read_whole(folder / "tokenizer.json", MOST_VOCABULARY).decode()
        content: dict[str, Any] = json.loads(text)
        settings = _settings(folder)
        if why := _obstacle(folder, content, settings):
            raise _needs_transformers(folder, why)
        backend = Tokenizer.from_str(text)
    except DataError:
        raise
    except Exception as error:  # of JSON, or of the Rust code that reads it
        raise DataError(
            f"tokenizer {str(folder)!r} could not be read ({str(error)[:200]}); download it again"
        ) from None
    return PlainTokenizer(backend, folder, settings)


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    settings = json.loads(read_whole(path, MOST_VOCABULARY)) if path.is_file() else {}
    template = folder / "chat_template.jinja"
    if template.is_file():
        settings["chat_template"] = read_whole(template, MOST_VOCABULARY).decode()
    return settings


def _obstacle(folder: Path, content: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Why transformers may read the folder differently from its `tokenizer.json`; "" if not."""
    if beside := [name for name in DECIDING if (folder / name).exists()]:
        return f"{beside[0]} lies beside its tokenizer.json"
    if settings.get("tokenizer_class") not in GENERIC:
        return f"its tokenizer_class is {settings.get('tokenizer_class')}"
    if unknown := sorted(settings.keys() - HARMLESS - ROLE_KEYS):
        return f"its tokenizer_config.json sets {unknown[0]}"
    special = {token["content"] for token in content["added_tokens"] if token["special"]}
    named = {key: settings[key] for key in sorted(ROLE_KEYS & settings.keys())}
    if added := [key for key, value in named.items() if value not in special]:
        return f"its {added[0]} is no special token of tokenizer.json"
    for part in ("post_processor", "truncation", "padding"):
        if (content.get(part) is None) is (part == "post_processor"):
            return f"its tokenizer.json {'lacks' if content.get(part) is None else 'sets'} {part}"
    return ""


def _needs_transformers(folder: Path, why: str) -> DataError:
    return DataError(
        f"tokenizer {str(folder)!r} needs the package transformers, as {why}; {REMEDY}"
    )
