"""Adapters on a Qwen-1's own layers, and Basic-VLM's folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lapilli.model.config import LanguageConfig, LoraConfig, ModelConfig, VisionConfig
from lapilli.model.errors import ModelError
from lapilli.model.interop.basic_vlm import as_qwen1, from_qwen1, write_basic_vlm
from lapilli.model.interop.foreign import load_foreign, read_foreign
from lapilli.model.interop.peft import adapter_of, read_adapter, write_adapter
from lapilli.model.parts.qwen1 import qwen1_names
from lapilli.model.parts.trainable import parameter_counts, trainable_parameters
from lapilli.model.vlm import VisionLanguageModel, build_model
from tests.model import twins
from tests.model.test_qwen1 import HIDDEN, INNER, LAYERS, plain_logits, tensors, write_qwen1

RANK, ALPHA = 4, 8
SIZES = {
    "attn.c_attn": (HIDDEN, 3 * HIDDEN), "mlp.w1": (HIDDEN, INNER), "mlp.w2": (HIDDEN, INNER),
}  # fmt: skip
LORA = LoraConfig(target="c_attn|w1|w2", rank=RANK, alpha=ALPHA, dropout=0.0)


def adapters() -> dict[str, Tensor]:
    """Tensors as Basic-VLM's `adapter_model.bin` has them."""
    made = torch.Generator().manual_seed(5)
    return {
        f"base_model.model.transformer.h.{layer}.{name}.lora_{side}.weight": 0.1
        * torch.randn(*((RANK, rows) if side == "A" else (columns, RANK)), generator=made)
        for layer in range(LAYERS)
        for name, (rows, columns) in SIZES.items()
        for side in "AB"
    }


def projector(inputs: int = 16) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(6)
    return {
        "0.weight": torch.randn(HIDDEN, inputs, generator=made), "0.bias": torch.zeros(HIDDEN),
        "2.weight": torch.randn(HIDDEN, HIDDEN, generator=made), "2.bias": torch.zeros(HIDDEN),
    }  # fmt: skip


def write_published(folder: Path, base: Path) -> Path:
    """A folder as its training script leaves it."""
    folder.mkdir()
    torch.save(adapters(), folder / "adapter_model.bin")
    torch.save(projector(), folder / "other_params.bin")
    settings = {
        "base_model_name_or_path": str(base), "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "lora_alpha": ALPHA, "lora_dropout": 0.1, "peft_type": "LORA",
        "r": RANK, "target_modules": ["c_attn", "w1", "w2"], "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def config(base: Path, **values: Any) -> ModelConfig:
    given: dict[str, Any] = {"lora": LORA, **values}
    tower = VisionConfig("siglip", settings=twins.TOWER, vision_feature_layer=-1, norm=True, skip=1)
    language = LanguageConfig(pretrained=str(base))
    return ModelConfig(vision=tower, language=language, head_chunk=8, **given)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_qwen1(tmp_path / "Qwen-7B-Chat")


def adapted_logits(ids: Tensor) -> Tensor:
    """Qwen-1's equations with every adapter added to its fused layer."""
    weights, added = tensors(), adapters()
    for layer in range(LAYERS):
        for name in SIZES:
            place = f"transformer.h.{layer}.{name}"
            first, second = (added[f"base_model.model.{place}.lora_{s}.weight"] for s in "AB")
            weights[f"{place}.weight"] = weights[f"{place}.weight"] + second @ first * ALPHA / RANK
    return plain_logits(weights, ids)


def logits(model: VisionLanguageModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.language.eval()(input_ids=ids[None], use_cache=False).logits[0]


IDS = torch.randint(90, (40,), generator=torch.Generator().manual_seed(2))


def test_a_published_folder_is_read_and_computes_its_equations(base: Path, tmp_path: Path) -> None:
    folder = write_published(tmp_path / "published", base)
    model = build_model(config(base, lora=None))
    assert load_foreign(folder, model) == ["projector", "language"]
    torch.testing.assert_close(logits(model, IDS), adapted_logits(IDS), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(model, IDS), plain_logits(tensors(), IDS), atol=1e-2)
    for name, value in projector().items():
        assert torch.equal(model.projector.state_dict()[name], value)


def test_a_folder_is_a_model_with_its_tower(base: Path, tmp_path: Path) -> None:
    folder = write_published(tmp_path / "published", base)
    with pytest.raises(ModelError, match=r"siglip-so400m-patch14-384, is not on this machine"):
        read_foreign(folder)
    tower: Any = build_model(config(base, lora=None)).vision
    tower.encoder.save_pretrained(folder / "mm_vision_tower")
    model = read_foreign(folder)
    torch.testing.assert_close(logits(model, IDS), adapted_logits(IDS), atol=1e-5, rtol=1e-5)
    assert model.vision.num_tokens == twins.TOKENS - 1
    assert model.config.vision.norm


def test_queries_keys_and_values_share_one_a(base: Path) -> None:
    model = build_model(config(base))
    learnt = [n for n in trainable_parameters(model) if ".lora_" in n]
    assert len(learnt) == LAYERS * (1 + 3 + 2 * 2)  # A and B of c_attn, of up and gate
    theirs = sum(value.numel() for value in adapters().values())
    counted = sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
    assert counted == theirs
    assert parameter_counts(model)["language"][1] == theirs
    separate = build_model(config(base, lora=replace(LORA, target="q_proj|k_proj|v_proj|up_proj")))
    names = [n for n in trainable_parameters(separate) if "k_proj.lora_A" in n]
    assert len(names) == LAYERS


def test_gradients_are_those_of_the_fused_layer(base: Path, tmp_path: Path) -> None:
    """Autograd through the fused equations, adapters added to the weights."""
    model = build_model(config(base))
    ours = put(model, adapters())
    model.language.eval()
    model.language(input_ids=IDS[None], use_cache=False).logits.square().mean().backward()
    added = {name: value.clone().requires_grad_() for name, value in adapters().items()}
    weights = tensors()
    for layer in range(LAYERS):
        for name in SIZES:
            place = f"transformer.h.{layer}.{name}"
            first, second = (added[f"base_model.model.{place}.lora_{s}.weight"] for s in "AB")
            weights[f"{place}.weight"] = weights[f"{place}.weight"] + second @ first * ALPHA / RANK
    plain_logits(weights, IDS).square().mean().backward()
    for name, value in added.items():
        found = torch.cat([p.grad for p in ours[name] if p.grad is not None])
        assert value.grad is not None
        torch.testing.assert_close(found, value.grad, atol=1e-5, rtol=1e-4)


def put(
    model: VisionLanguageModel, found: dict[str, Tensor]
) -> dict[str, list[torch.nn.Parameter]]:
    """Put a published adapter's numbers into a model's adapters; which parameters each is."""
    parameters = dict(model.language.named_parameters())
    places: dict[str, list[torch.nn.Parameter]] = {}
    for ours, theirs in qwen1_names(model.language).items():
        for side in "AB":
            name = f"base_model.model.{theirs}.lora_{side}.weight"
            parameter = parameters.get(f"{ours}.lora_{side}.default.weight")
            if name in found and parameter is not None:
                places.setdefault(name, []).append(parameter)
    with torch.no_grad():
        for name, held in places.items():
            parts = found[name].chunk(len(held))
            for parameter, part in zip(held, parts, strict=True):
                parameter.copy_(part)
    assert places.keys() == found.keys()
    return places


def test_files_come_out_as_they_went_in(base: Path, tmp_path: Path) -> None:
    model = build_model(config(base, trainable=("projector", "language")))
    put(model, adapters())
    model.projector.load_state_dict(projector())
    write_basic_vlm(model, tmp_path / "out", base=str(base))
    found = torch.load(tmp_path / "out" / "adapter_model.bin", weights_only=True)
    assert found.keys() == adapters().keys()
    assert all(torch.equal(found[name], value) for name, value in adapters().items())
    others = torch.load(tmp_path / "out" / "other_params.bin", weights_only=True)
    assert {n: v.tolist() for n, v in others.items()} == {
        n: v.tolist() for n, v in projector().items()
    }
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["c_attn", "w1", "w2"]
    assert (settings["r"], settings["lora_alpha"]) == (RANK, ALPHA)
    assert settings["base_model_name_or_path"] == str(base)


def test_an_adapter_renamed_twice_is_itself(base: Path, tmp_path: Path) -> None:
    folder = write_published(tmp_path / "published", base)
    read = read_adapter(folder)
    again = as_qwen1(from_qwen1(read), qwen1_names(build_model(config(base)).language))
    assert again.tensors.keys() == read.tensors.keys()
    assert all(torch.equal(again.tensors[n], value) for n, value in read.tensors.items())


def test_peft_reads_the_adapters_by_qwen2s_names(base: Path, tmp_path: Path) -> None:
    """One A three times in the file: a shared tensor would not be written."""
    import peft

    from lapilli.model.parts.language import build_language

    model = build_model(config(base))
    put(model, adapters())
    write_adapter(adapter_of(model.language, LORA, task="CAUSAL_LM"), tmp_path / "adapter")
    library: Any = peft
    plain = build_language(LanguageConfig(pretrained=str(base)))
    loaded = library.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    with torch.no_grad():
        found = loaded(input_ids=IDS[None], use_cache=False).logits[0]
    torch.testing.assert_close(found, adapted_logits(IDS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora": replace(LORA, target="q_proj|k_proj|v_proj")}, "no common A"),
        ({"lora": replace(LORA, target="q_proj")}, "no common A"),
        ({"lora": replace(LORA, bias="all")}, "biases or added tokens have learnt"),
        ({"trainable": ("vision", "projector", "language")}, "the tower has learnt"),
        ({"lora": None}, "the language model has no adapters"),
    ],
)
def test_what_its_files_cannot_hold_is_one_line(
    base: Path, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message) as said:
        write_basic_vlm(build_model(config(base, **values)), tmp_path / "out")
    assert "\n" not in str(said.value)


def test_another_decoder_has_no_such_layers(base: Path, tmp_path: Path) -> None:
    other = ModelConfig(
        vision=VisionConfig("siglip", settings=twins.TOWER),
        language=LanguageConfig("qwen2", settings={**twins.DECODER, "hidden_size": HIDDEN}),
        trainable=("language", "projector"),
        lora=LoraConfig(rank=2),
    )
    with pytest.raises(ModelError, match="Basic-VLM's files are for a Qwen-1"):
        write_basic_vlm(build_model(other), tmp_path / "out")
    with pytest.raises(ModelError, match="expected its base model"):
        load_foreign(write_published(tmp_path / "published", base), build_model(other))
    with pytest.raises(ModelError, match=r"lora.target: 'c_attn\|w1' matches no layer"):
        build_model(replace(other, lora=LoraConfig(target="c_attn|w1")))
