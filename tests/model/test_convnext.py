"""CLIP's ConvNeXt as a tower, against transformers' ConvNeXt with the same weights renamed."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import ConvNextConfig, ConvNextModel

from lapilli.model.config import AuxConfig, LanguageConfig, LoraConfig, ModelConfig, VisionConfig
from lapilli.model.errors import ModelError
from lapilli.model.flops import BatchNumbers, model_numbers, part_numbers, step_flops
from lapilli.model.interop.foreign import read_foreign
from lapilli.model.interop.hf import write_hf
from lapilli.model.interop.llava import LlavaForm, write_llava
from lapilli.model.interop.llava_config import convnext_name
from lapilli.model.interop.llava_tower import TowerImages
from lapilli.model.interop.lora_run import write_lora_run
from lapilli.model.parts.convnext import PUBLISHED, ConvNextSettings, ConvNextTrunk
from lapilli.model.parts.recomputation import recompute_all
from lapilli.model.parts.trainable import add_adapters, set_modes
from lapilli.model.parts.vision import build_tower, tower_shape
from lapilli.model.vlm import build_model, read_outline
from tests.model import twins

SIZES: dict[str, Any] = {"depths": [1, 2, 3, 1], "hidden_sizes": [8, 12, 16, 24]}
TINY: dict[str, Any] = {**SIZES, "layer_norm_eps": 1e-5, "image_size": 64}
TINY_TRUNK = ConvNextSettings((1, 2, 3, 1), (8, 12, 16, 24))
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# transformers' name of a parameter: timm's
RENAMED = (
    (r"embeddings\.patch_embeddings\.", "stem.0."),
    (r"embeddings\.layernorm\.", "stem.1."),
    (r"encoder\.stages\.(\d+)\.downsampling_layer\.(\d)\.", r"stages.\1.downsample.\2."),
    (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"dwconv\.", "conv_dw."),
    (r"\.layernorm\.", ".norm."),
    (r"pwconv(\d)\.", r"mlp.fc\1."),
    (r"layer_scale_parameter", "gamma"),
)


def reference() -> Any:
    """transformers' model, every norm with the epsilon of the published trunk, none a constant."""
    torch.manual_seed(3)
    model: Any = ConvNextModel(ConvNextConfig(**SIZES, layer_scale_init_value=0.5))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(0.3 * torch.randn(value.shape))
    return model.eval()


def timm_name(name: str) -> str:
    for pattern, there in RENAMED:
        name = re.sub(pattern, there, name)
    return name


def open_clip_state(model: Any) -> dict[str, Tensor]:
    """All that such a file holds: the trunk, the heads behind it, the text tower."""
    trunk = {
        f"visual.trunk.{timm_name(name)}": value.detach().clone()
        for name, value in model.named_parameters()
        if not name.startswith("layernorm.")
    }
    others = ("visual.trunk.head.norm.weight", "visual.head.proj.weight", "token_embedding.weight")
    return trunk | {name: torch.zeros(2) for name in others} | {"logit_scale": torch.tensor(1.0)}


def write(folder: Path, *, name: str = "convnext_xxlarge", pickled: bool = False) -> Any:
    """A folder as open_clip publishes them; the model that it was made of."""
    model, folder_state = reference(), {}
    folder.mkdir()
    folder_state = open_clip_state(model)
    config = {
        "model_cfg": {"vision_cfg": {"timm_model_name": name, "image_size": 64}},
        "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(folder_state, folder / "open_clip_pytorch_model.bin")
    else:
        save_file(folder_state, folder / "open_clip_model.safetensors")
    return model


def vision(folder: Path, **more: Any) -> VisionConfig:
    return VisionConfig(
        "clip_convnext", str(folder), settings=SIZES, vision_feature_layer=-1, **more
    )


def pixels(side: int) -> Tensor:
    torch.manual_seed(side)
    return torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8)


def model_of(tower: VisionConfig, **more: Any) -> ModelConfig:
    decoder = {**twins.DECODER, "vocab_size": 64}
    return ModelConfig(tower, LanguageConfig("llama", settings=decoder), **more)


@pytest.mark.parametrize("side", [64, 96])
@pytest.mark.parametrize("pickled", [False, True])
def test_rows_are_the_last_stage_of_transformers_model(
    side: int, pickled: bool, tmp_path: Path
) -> None:
    twin = write(tmp_path / "clip", pickled=pickled)
    config = vision(tmp_path / "clip", image_size=side, allow_pickle=pickled)
    tower = build_tower(replace(config, mean=MEAN, std=STD))
    seen = pixels(side)
    normal = ((seen / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
    with torch.no_grad():
        square = twin(normal).last_hidden_state
        found = tower(seen)
    torch.testing.assert_close(found, square.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)
    rows = (side // 32) ** 2
    assert (tower.image_size, tower.num_tokens, tower.hidden_size) == (side, rows, 24)
    shape = tower_shape(config)
    assert shape is not None
    assert (shape.image_size, shape.num_tokens) == (side, rows)


def test_gradients_are_those_of_transformers_model(tmp_path: Path) -> None:
    """Recomputed or not."""
    twin = write(tmp_path / "clip")
    tower_config = vision(tmp_path / "clip", mean=MEAN, std=STD)
    model: Any = build_model(model_of(tower_config, trainable=("vision", "projector")))
    seen = pixels(64)
    normal = ((seen / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
    twin(normal).last_hidden_state.square().sum().backward()
    wanted = {timm_name(n): p.grad for n, p in twin.named_parameters() if p.grad is not None}
    for again in (False, True):
        if again:
            assert recompute_all(model).recompute["vision"] == 7
            set_modes(model)
        model.zero_grad()
        model.vision(seen).square().sum().backward()
        found = {n: p.grad for n, p in model.vision.clip_convnext.named_parameters()}
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_the_published_trunk_at_768_px_has_576_rows_of_3072_channels(tmp_path: Path) -> None:
    write(tmp_path / "clip")
    config = VisionConfig(
        "clip_convnext", str(tmp_path / "clip"), vision_feature_layer=-1, image_size=768
    )
    shape = tower_shape(config)
    assert shape is not None
    assert shape.num_tokens == 576
    with torch.device("meta"):
        trunk = ConvNextTrunk(ConvNextSettings(image_size=768))
        rows = trunk(torch.empty(1, 3, 768, 768))
    assert rows.shape == (1, 576, 3072)
    # ConvNeXt-XXL's 846.5M parameters (timm's page) with the head that pools and classifies
    classifier = 2 * 3072 + 3072 * 1000 + 1000
    assert sum(p.numel() for p in trunk.parameters()) + classifier == 846_471_016
    assert {found.layer_norm_eps for found in PUBLISHED.values()} == {1e-5, 1e-6}


def test_images_are_normalised_as_the_folder_says(tmp_path: Path) -> None:
    write(tmp_path / "clip")
    made = build_model(model_of(vision(tmp_path / "clip")))
    assert (made.config.vision.mean, made.config.vision.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def test_flops_equal_torchs_counter(tmp_path: Path) -> None:
    """Stages of every side: forward, with adapters too, and backward."""
    write(tmp_path / "clip")
    config = model_of(vision(tmp_path / "clip"), trainable=("vision", "projector"))
    whole, adapted = build_model(config), build_model(config)
    add_adapters(adapted, LoraConfig(target="fc1|fc2", rank=2))  # not fused: torch counts them
    for model in (whole, adapted):
        with FlopCounterMode(display=False) as counter:
            model.vision(pixels(64))
        matmuls = part_numbers(model.vision).matmuls
        assert counter.get_total_flops() == sum(2 * 4 * matmul.flops for matmul in matmuls)
    overcounted: list[int] = []  # torch counts a grouped weight's gradient once a group

    def note(layer: nn.Conv2d, _: Any, made: Tensor) -> None:
        overcounted.append(2 * made.numel() * 49 * (layer.groups - 1))

    for layer in whole.vision.modules():
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            layer.register_forward_hook(note)
    with FlopCounterMode(display=False) as counter:
        whole.vision(pixels(64)).sum().backward()
    batch = BatchNumbers([16] * 2, 2, 5, 2, 16, 2, 5)
    found = step_flops(model_numbers(whole), batch).hardware.tower
    assert counter.get_total_flops() - sum(overcounted) == found


def test_a_sketch_has_the_shapes_without_weights(tmp_path: Path) -> None:
    write(tmp_path / "clip")
    config = model_of(vision(tmp_path / "clip"))
    (tmp_path / "clip" / "open_clip_model.safetensors").unlink()
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in build_model(config, weights=False).named_parameters()}
    write(tmp_path / "again")
    real = build_model(replace(config, vision=vision(tmp_path / "again")))
    assert {n: p.shape for n, p in real.named_parameters()} == shapes
    outline = read_outline(config)
    assert outline is not None
    assert outline.image_tokens == 4


def test_random_weights_come_of_settings_alone() -> None:
    config = VisionConfig("clip_convnext", settings=TINY, vision_feature_layer=-1, skip=1)
    made = build_model(model_of(config))
    assert made.image_features(pixels(64)).shape == (2 * 3, twins.DECODER["hidden_size"])


def visper(place: Path, **more: Any) -> Any:
    """A model with task tokens, and how VisPer-LM's checkpoint of it is written."""
    aux = AuxConfig(mode="gen", num_task_tokens=2, layers={"gen": (1,)}, shapes={"gen": (1, 4)})
    model: Any = build_model(model_of(vision(place, image_size=96), aux=aux, **more))
    return model, LlavaForm(TowerImages(96, "pad"), place, tower=convnext_name(model))


def test_visper_lms_checkpoint_has_the_towers_weights_and_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It loads them from there and not from what the name stands for."""
    monkeypatch.setitem(PUBLISHED, "convnext_xxlarge", TINY_TRUNK)
    place = tmp_path / "CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup"
    write(place)
    model, form = visper(place)
    with torch.no_grad():
        for value in model.vision.parameters():
            value.add_(0.1)
    write_llava(model, tmp_path / "out", form)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mm_vision_tower"] == f"{place}-res96"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    trunk = {n.partition("vision_tower.vision_tower.")[2] for n in tensors if "vision_tower" in n}
    there = {n.removeprefix("visual.trunk.") for n in open_clip_state(reference()) if "trunk" in n}
    assert trunk == {name for name in there if not name.startswith("head.")}
    again = read_foreign(tmp_path / "out")
    assert torch.equal(again.image_features(pixels(96)), model.image_features(pixels(96)))


def test_transformers_llava_has_no_such_tower(tmp_path: Path) -> None:
    config = VisionConfig("clip_convnext", settings=TINY, vision_feature_layer=-1)
    with pytest.raises(ModelError, match="clip_convnext has no counterpart in transformers' LLaVA"):
        write_hf(build_model(model_of(config)), tmp_path / "out", image_token_id=1)
    with pytest.raises(ModelError, match=r"clip_convnext; LLaVA has CLIP towers only, and VisPer"):
        write_llava(build_model(model_of(config)), tmp_path / "out", twins.llava_form(tmp_path))
    lora = model_of(config, lora=LoraConfig(rank=2))
    with pytest.raises(ModelError, match=r"clip_convnext has no place beside adapters"):
        write_lora_run(build_model(lora), tmp_path / "out")
    write(tmp_path / "mine")
    with pytest.raises(ModelError, match=r"by a name that begins with CLIP-convnext_large or CLIP"):
        visper(tmp_path / "mine")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"vision_feature_layer": -2}, "vision_feature_layer: -2 with tower .*; set -1$"),
        ({"norm": True}, "norm: True with tower clip_convnext.*; set false$"),
        ({"vision_feature_select_strategy": "full"}, "select_strategy: full .*; set default$"),
        ({"image_size": 70}, "70 is no multiple of the tower's patch, 32; set 64 or 96$"),
        ({"skip": 4}, "skip: 4 leaves none of an image's 4 rows"),
        ({"settings": {"width": 3}}, "settings: 'width' is unknown; expected depths, hidden"),
        ({"settings": {"depths": [1, 2]}}, "expected one of each a stage"),
        ({"settings": {"depths": [0, 1, 1, 1]}}, "expected whole numbers above 0"),
        ({"settings": {**TINY, "hidden_sizes": [10**7] * 4}}, "of memory are free; make it small"),
    ],
)
def test_what_cannot_be_is_one_line(given: dict[str, Any], words: str) -> None:
    config = VisionConfig("clip_convnext", settings=TINY, vision_feature_layer=-1)
    with pytest.raises(ModelError, match=words) as said:
        build_tower(replace(config, **given))
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("spoilt", "words"),
    [
        ("open_clip_config.json", "cannot be loaded; expected a hub name or a folder with open_cl"),
        ("open_clip_model.safetensors", "expected a hub name or a folder with open_clip's"),
    ],
)
def test_a_folder_without_its_files_is_one_line(spoilt: str, words: str, tmp_path: Path) -> None:
    write(tmp_path / "clip")
    (tmp_path / "clip" / spoilt).unlink()
    with pytest.raises(ModelError, match=words) as said:
        build_tower(vision(tmp_path / "clip"))
    assert "\n" not in str(said.value)


def test_another_model_than_the_weights_are_of_is_one_line(tmp_path: Path) -> None:
    write(tmp_path / "clip")
    wider = replace(vision(tmp_path / "clip"), settings={**SIZES, "depths": [1, 2, 4, 1]})
    with pytest.raises(ModelError, match=r"cannot be loaded.*Missing key"):
        build_tower(wider)
    write(tmp_path / "other", name="vit_large")
    with pytest.raises(ModelError, match=r"is a vit_large; expected convnext_base, convnext_larg"):
        build_tower(replace(vision(tmp_path / "other"), settings={}))
