"""LLaVA's files: read as LLaVA writes them, written as LLaVA reads them, the same bits back."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from lapilli.model.errors import ModelError
from lapilli.model.interop.foreign import load_foreign
from lapilli.model.interop.llava import load_llava, write_llava, write_projector
from lapilli.model.parts.weight_files import read_tensors
from lapilli.model.vlm import VisionLanguageModel, build_model
from tests.model.test_vlm import CLIP, CONFIG, LLAMA
from tests.model.twins import llava_form


def other() -> VisionLanguageModel:
    return build_model(replace(CONFIG, seed=9))


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(v, theirs[n]) for n, v in ours.items())


@pytest.mark.parametrize(
    "prefix",
    ["model.mm_projector.", "base_model.model.model.mm_projector.", "mm_projector.", "projector.",
     "module.model.mm_projector.", "base_model.model.projector.", ""],
)  # fmt: skip
def test_a_projector_is_read_whoever_wrapped_it(tmp_path: Path, prefix: str) -> None:
    source, target = build_model(CONFIG), other()
    named = {f"{prefix}{n}": v for n, v in source.projector.state_dict().items()}
    torch.save(named, tmp_path / "non_lora_trainables.bin")
    assert load_llava(tmp_path / "non_lora_trainables.bin", target) == ["projector"]
    assert same(source.projector, target.projector)
    assert not same(source.language, target.language)


def test_basic_vlms_folder_is_read(tmp_path: Path) -> None:
    """An adapter as a pickle, the projector's tensors by bare names, and a pickle of settings."""
    library: Any = peft
    base, target = build_model(CONFIG), build_model(CONFIG)
    wanted = other()
    adapted = library.get_peft_model(
        base.language, library.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    )
    for value in adapted.parameters():
        if value.requires_grad:
            torch.nn.init.normal_(value)
    state = library.get_peft_model_state_dict(adapted)
    torch.save(state, tmp_path / "adapter_model.bin")
    torch.save(wanted.projector.state_dict(), tmp_path / "other_params.bin")
    torch.save(Hostile(), tmp_path / "training_args.bin")
    adapted.peft_config["default"].save_pretrained(tmp_path)
    assert load_foreign(tmp_path, target) == ["projector", "language"]
    assert same(target.projector, wanted.projector)
    assert same(target.language, adapted.merge_and_unload())


def test_what_llava_does_not_write_is_no_start(tmp_path: Path) -> None:
    assert load_foreign(tmp_path, other()) == []
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    assert load_foreign(tmp_path, other()) == []
    (tmp_path / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ModelError, match=r"config\.json: damaged; expected a JSON object"):
        load_foreign(tmp_path, other())


def test_the_projectors_file_has_llavas_names(tmp_path: Path) -> None:
    model, target = build_model(CONFIG), other()
    path = write_projector(model, tmp_path)
    assert path.name == "mm_projector.bin"
    assert set(torch.load(path, weights_only=True)) == {
        f"model.mm_projector.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")
    }
    load_llava(path, target)
    assert same(model.projector, target.projector)


@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_checkpoint_comes_back_bit_for_bit(tmp_path: Path, tied: bool) -> None:
    language = replace(CONFIG.language, settings={**LLAMA, "tie_word_embeddings": tied})
    config = replace(CONFIG, language=language)
    model, target = build_model(config), build_model(replace(config, seed=9))
    write_llava(model, tmp_path, replace(llava_form(tmp_path), shard_size="20KB"))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert set(load_llava(tmp_path, target)) == {"projector", "language", "vision"}
    assert same(model, target)


def test_a_published_layout_with_layers_behind_the_taken_one(tmp_path: Path) -> None:
    """llava-v1.5-7b: pickled shards, and a tower with all its layers, or none at all."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    model, target = build_model(CONFIG), other()
    tower: Any = CLIPVisionModel(CLIPVisionConfig(**CLIP))
    whole = {f"vision_model.{n}": v for n, v in tower.state_dict().items()}
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # transformers 4.31
    torch.save(
        {**model.language.state_dict(), **old}, tmp_path / "pytorch_model-00001-of-00002.bin"
    )
    rest = {f"model.mm_projector.{n}": v for n, v in model.projector.state_dict().items()}
    rest |= {f"model.vision_tower.vision_tower.{n}": v for n, v in whole.items()}
    torch.save(rest, tmp_path / "pytorch_model-00002-of-00002.bin")
    load_llava(tmp_path, target)
    assert same(model.language, target.language)
    ours: Any = target
    for name, value in ours.vision.clip.state_dict().items():
        assert torch.equal(value, tower.state_dict()[name]), name


def test_another_size_is_named(tmp_path: Path) -> None:
    path = write_projector(build_model(CONFIG), tmp_path)
    small = replace(CONFIG.vision, settings={**CLIP, "hidden_size": 8})
    with pytest.raises(ModelError, match=r"projector 0.weight has shape \(24, 16\), the model's"):
        load_llava(path, build_model(replace(CONFIG, vision=small)))


class Hostile:
    """Runs code where a pickle is trusted."""

    def __reduce__(self) -> Any:
        return print, ("executed",)


def test_a_pickle_is_never_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mm_projector.bin"
    path.write_bytes(pickle.dumps({"model.mm_projector.0.weight": Hostile()}, protocol=2))
    with pytest.raises(ModelError, match=r"mm_projector\.bin: "):
        read_tensors(path)
    torch.save({"model.mm_projector.0.weight": Hostile()}, path)
    with pytest.raises(ModelError, match="holds more than tensors"):
        read_tensors(path)
    assert "executed" not in capsys.readouterr().out


def test_a_file_cut_short_or_of_something_else_is_one_line(tmp_path: Path) -> None:
    path = write_projector(build_model(CONFIG), tmp_path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ModelError, match=r"mm_projector\.bin: "):
        read_tensors(path)
    torch.save({"x": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match="no projector in it"):
        load_llava(path, other())
