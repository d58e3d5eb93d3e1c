"""Tokenizers of other people, loaded once for all tests."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lapilli.data.text.encode import load_tokenizer
from tests.data.text_material import FIXTURES, sentencepiece_tokenizer, unpacked


@pytest.fixture(scope="session")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Mistral's first tokenizer, from the package that ships it, set up as LLaVA does (legacy)."""
    found = importlib.util.find_spec("mistral_common")
    if found is None or not found.origin:
        pytest.skip("mistral-common (extra `dev`) is absent: it holds Mistral's tokenizer")
    return sentencepiece_tokenizer(
        Path(found.origin).parent / "data" / "tokenizer.model.v1",
        tmp_path_factory.mktemp("mistral"),
        legacy=True,
    )


@pytest.fixture(scope="session")
def llama2() -> Any:
    return load_tokenizer(FIXTURES / "tokenizers" / "llama2-32k")


@pytest.fixture(scope="session")
def real_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """A tokenizer of the fixtures by its folder's name."""
    folder = tmp_path_factory.mktemp("tokenizers")
    loaded: dict[str, Any] = {}

    def load(name: str) -> Any:
        if not FIXTURES.is_dir():
            pytest.skip(f"{FIXTURES} is absent: other people's tokenizers")
        if name not in loaded:
            loaded[name] = load_tokenizer(unpacked(name, folder))
        return loaded[name]

    return load
