"""A folder of LLaVA's as the base of a model: language model and projector from it, once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lapilli.model.config import LanguageConfig, ModelConfig
from lapilli.model.errors import ModelError
from lapilli.model.interop.llava import write_llava
from lapilli.model.parts.language import language_settings
from lapilli.model.parts.weight_files import read_tensors, save_tensors
from lapilli.model.vlm import VisionLanguageModel, build_model, read_outline
from tests.model.test_vlm import CONFIG
from tests.model.twins import llava_form


@pytest.fixture(scope="module")
def source() -> VisionLanguageModel:
    return build_model(replace(CONFIG, seed=9))


@pytest.fixture(scope="module")
def folder(source: VisionLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llava")
    write_llava(source, path, llava_form(path))
    return path


def based(folder: Path) -> ModelConfig:
    language = LanguageConfig(pretrained=str(folder), allow_pickle=True)
    return replace(CONFIG, language=language, seed=3)


def test_language_and_projector_are_read_from_it(folder: Path, source: VisionLanguageModel) -> None:
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llava_llama"
    found = build_model(based(folder))
    for part in ("language", "projector"):
        ours, theirs = getattr(found, part).state_dict(), getattr(source, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items()), part
    outline = read_outline(based(folder))
    assert outline is not None
    assert outline.vocab_size == source.vocab_size
    assert language_settings(based(folder).language).model_type == "llama"


def test_pickles_are_read_as_llava_publishes_them(
    folder: Path, source: VisionLanguageModel, tmp_path: Path
) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    torch.save(read_tensors(folder), tmp_path / "pytorch_model.bin")
    found = build_model(based(tmp_path))
    weight = source.projector.state_dict()["0.weight"]
    assert torch.equal(found.projector.state_dict()["0.weight"], weight)


def test_the_language_model_is_read_where_processes_share_it(folder: Path) -> None:
    """`loading` stands around its weights, as around those of any other folder."""
    inside: list[bool] = []

    @contextmanager
    def loading() -> Generator[None]:
        inside.append(True)
        yield

    build_model(based(folder), loading)
    assert inside == [True]


def test_weights_that_are_put_in_later_win(folder: Path) -> None:
    def prepare(model: VisionLanguageModel) -> None:
        with torch.no_grad():
            next(model.projector.parameters()).fill_(7.0)

    found = build_model(based(folder), prepare=prepare)
    assert (next(found.projector.parameters()) == 7.0).all()


def test_a_folder_of_another_projector_or_without_one_is_one_line(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"projector: linear, and .* has one of 0\.bias") as said:
        build_model(replace(based(folder), projector="linear"))
    assert "\n" not in str(said.value)
    shutil.copy(folder / "config.json", tmp_path)
    tensors = {n: v for n, v in read_tensors(folder).items() if "mm_projector" not in n}
    save_tensors(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="no weights of the projector"):
        build_model(based(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "llava_mpt"}))
    with pytest.raises(ModelError, match="model_type llava_mpt; expected llava_llama"):
        build_model(based(tmp_path))
