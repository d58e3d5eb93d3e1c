"""VisPer-LM's names and settings, written and read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lapilli.model.config import AuxConfig
from lapilli.model.errors import ModelError
from lapilli.model.interop.foreign import read_foreign
from lapilli.model.interop.hf import write_hf
from lapilli.model.interop.llava import load_llava, write_llava
from lapilli.model.vlm import VisionLanguageModel, build_model
from tests.model import twins
from tests.model.aux_models import AUX, SHAPES, aux_batch, aux_config, aux_inputs


def scattered(model: VisionLanguageModel) -> VisionLanguageModel:
    """The model with weights of no initialisation."""
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            draw = torch.Generator().manual_seed(number)
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return model


def expected_names() -> set[str]:
    """What VisPer-LM's modules have beside LLaVA's, of our tiny tasks."""
    block = ["proj_in.weight", "proj_in.bias", "proj_out.weight", "proj_out.bias",
             "norm_out.weight", "norm_out.bias", "layers.0.0.norm1.weight",
             "layers.0.0.norm1.bias", "layers.0.0.norm2.weight", "layers.0.0.norm2.bias",
             "layers.0.0.to_q.weight", "layers.0.0.to_kv.weight", "layers.0.0.to_out.weight",
             "layers.0.1.0.weight", "layers.0.1.0.bias", "layers.0.1.1.weight",
             "layers.0.1.3.weight"]  # fmt: skip
    heads = [("depth", 0), ("depth", 1), ("seg", 0), ("gen", 0)]
    names = {f"image_{task}_heads.{n}.projector.{one}" for task, n in heads for one in block}
    names |= {
        f"image_depth_heads.{n}.linear_{level}.{layer}.{kind}"
        for n in (0, 1) for level in (1, 2, 3) for layer in (0, 2) for kind in ("weight", "bias")
    }  # fmt: skip
    names |= {f"{task}_logit_scale" for task in ("depth", "seg", "gen")}
    return names | {f"model.special_{task}_tokens" for task in ("depth", "seg", "gen")}


@pytest.fixture
def written(tmp_path: Path) -> tuple[VisionLanguageModel, Path]:
    model = scattered(build_model(aux_config()))
    write_llava(model, tmp_path / "out", twins.llava_form(tmp_path / "out"))
    return model, tmp_path / "out"


def test_files_have_visper_lms_names_and_settings(written: Any) -> None:
    _, folder = written
    tensors = load_file(folder / "model.safetensors")
    of_llava = {n for n in tensors if n.startswith(("model.layers.", "model.mm_projector."))}
    of_llava |= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert {*tensors} - of_llava == expected_names()
    assert tensors["gen_logit_scale"].shape == ()
    assert tensors["image_depth_heads.0.linear_3.0.weight"].equal(
        tensors["image_depth_heads.0.linear_1.0.weight"]
    )
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == (
        "ola_llama", ["OlaLlavaLlamaForCausalLM"],
    )  # fmt: skip
    assert (config["aux_mode"], config["num_task_tokens"]) == ("gen-depth-seg", 4)
    assert config["image_depth"] == {
        "depth": 1, "num_heads": 4, "dim_head": 32, "ff_mult": 1, "num_tokens": 16,
        "output_dim": 8, "depth_layer_indices": "1-2", "depth_loss_weight": 0.25,
    }  # fmt: skip
    assert config["image_gen"]["img_layer_indices"] == "2"


def test_what_is_written_is_read_back_bit_for_bit(written: Any) -> None:
    model, folder = written
    again = read_foreign(folder)
    assert replace(again.config.aux, weights=AUX.weights) == AUX
    batch = aux_batch((1, 2))
    inputs = [aux_inputs(batch, 0, 4) for _ in range(2)]
    torch.testing.assert_close(
        again(**twins.inputs(batch), aux=inputs[0]),
        model.eval()(**twins.inputs(batch), aux=inputs[1]), rtol=0, atol=0,
    )  # fmt: skip


def test_a_run_starts_from_a_checkpoint_with_teachers_kept_beside(written: Any) -> None:
    model, folder = written
    tensors = load_file(folder / "model.safetensors")
    tensors["da_v2_head.depth_head.projects.0.bias"] = torch.ones(3)
    save_file(tensors, folder / "model.safetensors")
    started = build_model(replace(aux_config(), seed=9))
    assert load_llava(folder, started) == [
        "projector", "language", "vision", "task_tokens", "predictors",
    ]  # fmt: skip
    for name, value in started.state_dict().items():
        assert value.equal(model.state_dict()[name]), name
    tokens_alone = AuxConfig(mode=AUX.mode, num_task_tokens=4, shapes=SHAPES)
    second = build_model(twins.config(aux=tokens_alone, trainable=("projector", "language")))
    assert "task_tokens" in load_llava(folder, second)
    torch.testing.assert_close(
        second.state_dict()["task_tokens.special_gen_tokens"],
        model.state_dict()["task_tokens.special_gen_tokens"], rtol=0, atol=0,
    )  # fmt: skip


def test_tokens_are_never_lost_without_a_word(written: Any, tmp_path: Path) -> None:
    model, folder = written
    with pytest.raises(ModelError, match=r"has special_depth_tokens, .*; set model.aux.mode"):
        load_llava(folder, build_model(twins.config()))
    with pytest.raises(ModelError, match=r"aux.mode: gen-depth-seg has no counterpart"):
        write_hf(model, tmp_path / "hf", image_token_id=60)
    own = AuxConfig(mode="pose", shapes={"pose": (1, 4)})
    with pytest.raises(ModelError, match=r"aux.mode: pose; VisPer-LM has gen, depth, seg"):
        write_llava(
            build_model(twins.config(aux=own)), tmp_path / "own", twins.llava_form(tmp_path)
        )
    config = json.loads((folder / "config.json").read_text())
    del config["image_depth"]["num_tokens"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"aux_mode 'gen-depth-seg', and 'num_tokens' is missing"):
        read_foreign(folder)
