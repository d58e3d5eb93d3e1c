"""A folder of weights with a file that may not be read: named, and never taken for another kind."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from lapilli.model.config import LanguageConfig, VisionConfig
from lapilli.model.errors import ModelError
from lapilli.model.interop.foreign import load_foreign
from lapilli.model.parts.language import build_language
from lapilli.model.parts.normalisation import with_normalisation
from lapilli.model.parts.weight_files import read_tensors, save_tensors

Nobody = Callable[[], AbstractContextManager[None]]
NO_MODEL: Any = None  # nothing is put into one before the files are read

# What opens a folder, and the file there whose silence it took for an answer.
OPENERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "normalisation": (
        lambda folder: with_normalisation(VisionConfig("clip", pretrained=str(folder))),
        "preprocessor_config.json",
    ),
    "language": (
        lambda folder: build_language(LanguageConfig(pretrained=str(folder))),
        "generation_config.json",
    ),
    "of another project": (lambda folder: load_foreign(folder, NO_MODEL), "config.json"),
    "weights": (read_tensors, "model.safetensors"),
    "index": (read_tensors, "model.safetensors.index.json"),
}


def folder_of(parent: Path) -> Path:
    folder = parent / "weights"
    folder.mkdir()
    for name in ("preprocessor_config.json", "generation_config.json", "config.json"):
        (folder / name).write_text(json.dumps({"model_type": "clip"}), encoding="utf-8")
    save_tensors({"a": torch.zeros(2)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("opener", OPENERS)
def test_a_file_that_may_not_be_read_is_named(
    open_folder: Path, as_nobody: Nobody, opener: str
) -> None:
    look, name = OPENERS[opener]
    folder = folder_of(open_folder)
    (folder / name).touch()
    with contextlib.suppress(ModelError):
        look(folder)  # imports what it needs, which only root may be able to
    (folder / name).chmod(0)
    with as_nobody(), pytest.raises(ModelError, match=rf"{name}: cannot be read \(Permission"):
        look(folder)


def test_a_folder_that_may_not_be_listed_holds_weights_perhaps(
    open_folder: Path, as_nobody: Nobody
) -> None:
    folder = folder_of(open_folder)
    folder.chmod(0o711)
    with as_nobody(), pytest.raises(ModelError, match=r"weights: cannot be read \(Permission"):
        read_tensors(folder)


def test_a_folder_of_nothing_known_still_is_of_nobody(tmp_path: Path) -> None:
    assert load_foreign(folder_of(tmp_path), NO_MODEL) == []
