"""Folders that others publish, read as whole models: LLaVA's, transformers' LLaVA, PEFT's."""

from __future__ import annotations

import copy
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lapilli.model.config import LanguageConfig, LoraConfig
from lapilli.model.errors import ModelError
from lapilli.model.interop.foreign import kind_of, load_foreign, read_foreign
from lapilli.model.interop.hf import FACTS, read_hf, write_hf
from lapilli.model.interop.llava import write_llava, write_projector
from lapilli.model.interop.llava_tower import published_tower
from lapilli.model.interop.lora_run import write_base, write_lora_run
from lapilli.model.interop.weights import plain_weights
from lapilli.model.vlm import VisionLanguageModel, build_model
from tests.model import twins
from tests.model.test_interop_lora import LORA, trained
from tests.model.twins import llava_form

IMAGE_ID = twins.VOCABULARY  # a row of its own


def same(a: VisionLanguageModel, b: VisionLanguageModel, exact: bool = True) -> None:
    """Two models' weights, adapters merged."""
    ours, theirs = ({n: w.make() for n, w in plain_weights(m).items()} for m in (a, b))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        bound = 0 if exact else 1e-6
        torch.testing.assert_close(
            theirs[name].float(), value.float(), rtol=bound, atol=bound, msg=name
        )


# ---- adapters on transformers' LLaVA -----------------------------------------------------------


@pytest.fixture(scope="module")
def hf_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "llava-hf"
    write_hf(build_model(twins.config()), folder, image_token_id=IMAGE_ID)
    (folder / FACTS).unlink()  # as a folder of others is
    return folder


def stock(folder: Path) -> Any:
    return transformers.LlavaForConditionalGeneration.from_pretrained(folder)


def by_others(base: Path, folder: Path, **settings: Any) -> Any:
    """An adapter that PEFT trained on transformers' LLaVA, saved; PEFT's own model."""
    library: Any = peft
    values = {"r": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM", **settings}
    made = library.get_peft_model(stock(base), library.LoraConfig(**values))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for value in made.parameters():
            if value.requires_grad:
                value += 0.1 * torch.randn(value.shape, generator=generator)
    made.peft_config["default"].base_model_name_or_path = str(base)
    made.save_pretrained(folder)
    return made


def old_names(folder: Path) -> None:
    """The names that transformers before 4.52 had, and so its adapters."""
    path = folder / "adapter_model.safetensors"
    renamed: dict[str, torch.Tensor] = {}
    for name, value in load_file(path).items():
        old = name.replace("model.model.language_model.", "model.language_model.model.")
        old = old.replace("model.model.vision_tower.", "model.vision_tower.vision_model.")
        old = old.replace("model.model.multi_modal_projector.", "model.multi_modal_projector.")
        old = old.replace("base_model.model.lm_head.", "base_model.model.language_model.lm_head.")
        renamed[old] = value
    assert renamed.keys() != load_file(path).keys()
    save_file(renamed, path, metadata={"format": "pt"})


BY_OTHERS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "v_proj"]},  # TRL's, LLaMA-Factory's: towers have them too
    {"target_modules": r".*language_model.*\.(up_proj|down_proj)"},
    {"target_modules": "all-linear", "use_rslora": True},
    {"target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector", "lm_head"]},
    {"target_modules": ["q_proj"], "alpha_pattern": {"layers.1.self_attn.q_proj": 3}},
]


@pytest.mark.parametrize("settings", BY_OTHERS, ids=str)
@pytest.mark.parametrize("names", ["new", "old"])
def test_adapters_of_other_trainers_are_merged_as_peft_merges_them(
    hf_base: Path, tmp_path: Path, settings: dict[str, Any], names: str
) -> None:
    if names == "old" and "alpha_pattern" in settings:
        settings = {**settings, "alpha_pattern": {}}
    made = by_others(hf_base, tmp_path, **settings)
    if names == "old":
        old_names(tmp_path)
    made.merge_and_unload().save_pretrained(tmp_path / "merged")
    expected = read_hf(tmp_path / "merged")
    same(expected, read_foreign(tmp_path), exact=False)
    begun = build_model(replace(twins.config(seed=9), language=_with_rows(IMAGE_ID + 1)))
    assert load_foreign(tmp_path, begun) == ["projector", "language", "vision"]
    assert kind_of(tmp_path) == "adapter"


def _with_rows(rows: int) -> LanguageConfig:
    language = twins.config().language
    return replace(language, settings={**language.settings, "vocab_size": rows})


def test_an_adapter_on_an_export_has_the_image_tokens_row(tmp_path: Path) -> None:
    base = tmp_path / "ours"
    write_hf(build_model(twins.config()), base, image_token_id=IMAGE_ID)
    made = by_others(base, tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    found, begun = read_foreign(tmp_path), build_model(twins.config(seed=9))
    load_foreign(tmp_path, begun)
    head = made.merge_and_unload().lm_head.weight
    for model in (found, begun):
        assert torch.equal(model.language.lm_head.weight, head[:IMAGE_ID])


def test_a_vocabulary_that_grew_beside_an_adapter_grows_here(hf_base: Path, tmp_path: Path) -> None:
    library: Any = peft
    base = stock(hf_base)
    base.resize_token_embeddings(IMAGE_ID + 9)
    made = library.get_peft_model(
        base, library.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    made.peft_config["default"].base_model_name_or_path = str(hf_base)
    made.save_pretrained(tmp_path, save_embedding_layers=True)
    found = read_foreign(tmp_path)
    assert found.vocab_size == IMAGE_ID + 9
    expected = base.get_input_embeddings().weight
    assert torch.equal(found.language.get_input_embeddings().weight, expected)


def test_a_base_that_is_not_here_is_named(hf_base: Path, tmp_path: Path) -> None:
    by_others(hf_base, tmp_path, target_modules=["q_proj"])
    path = tmp_path / "adapter_config.json"
    settings = json.loads(path.read_text())
    for name, words in (
        ("llava-hf/llava-1.5-7b-hf", "adapter for llava-hf/llava-1.5-7b-hf, which is not on this"),
        (None, "adapter for a base model that it does not name, which is not on this machine"),
    ):
        path.write_text(json.dumps({**settings, "base_model_name_or_path": name}))
        with pytest.raises(ModelError, match=words):
            read_foreign(tmp_path)
        with pytest.raises(ModelError, match=words):
            load_foreign(tmp_path, build_model(twins.config()))


def test_an_adapter_of_a_language_model_alone_is_no_model(tmp_path: Path) -> None:
    library: Any = peft
    language = build_model(twins.config()).language
    made = library.get_peft_model(
        language, library.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    made.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="an adapter of a language model alone; expected one of"):
        read_foreign(tmp_path)


# ---- LLaVA's layout ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tower")
    torch.manual_seed(3)
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**twins.TOWER)).save_pretrained(
        folder
    )
    return folder


def published(folder: Path, tower: Path, **changes: Any) -> VisionLanguageModel:
    """A folder as LLaVA's `train.py` leaves it, on transformers 4.31: the tower is named alone."""
    config = twins.config()
    vision = replace(config.vision, pretrained=str(tower), settings={})
    model = build_model(replace(config, vision=vision)).eval()
    settings = {
        "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": str(tower), "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 16,
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad", "use_mm_proj": True, "torch_dtype": "float16",
        "rope_theta": 5000.0, "max_position_embeddings": 2048, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "freeze_mm_mlp_adapter": False,
        "transformers_version": "4.31.0", "mm_resampler_type": None, **twins.DECODER, **changes,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    state = model.language.state_dict()
    state |= {f"model.mm_projector.{n}": v for n, v in model.projector.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")
    return model


@pytest.mark.parametrize("kind", ["llava", "llava_llama"])
def test_what_llava_publishes_is_a_model(tmp_path: Path, tower: Path, kind: str) -> None:
    expected = published(tmp_path, tower, model_type=kind)
    found = read_foreign(tmp_path)
    same(expected, found)
    assert found.language.config.rope_parameters["rope_theta"] == 5000.0
    assert found.config.vision.vision_feature_layer == -2
    assert (kind_of(tmp_path), kind_of(tmp_path / "pytorch_model.bin")) == ("llava", "file")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llava_mpt"}, "model_type llava_mpt; expected llava_llama or llava_"),
        ({"mm_vision_tower": "openai/none-such"}, "'openai/none-such' is not on this machine"),
        ({"mm_projector_type": "os:system"}, "mm_projector_type os:system; expected linear, mlpNx"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio anyres with mm_patch_merge_type"),
        ({"mm_vision_select_layer": "last"}, "mm_vision_select_layer 'last'"),
        ({"rope_scaling": {"type": "linear", "factor": "x"}}, "language.settings: no llama of"),
        ({"hidden_size": 48}, r"projector 0.weight has shape \(24, 16\), the model's has"),
        ({"num_hidden_layers": 3}, r"language model.layers.2.* is missing, the model's has shape"),
        ({"vocab_size": "many"}, "config.json: no llama can be built of it"),
    ],
)
def test_a_config_that_does_not_fit_is_one_line(
    tmp_path: Path, tower: Path, changes: dict[str, Any], words: str
) -> None:
    published(tmp_path, tower, **changes)
    with pytest.raises(ModelError, match=words) as found:
        read_foreign(tmp_path)
    assert "\n" not in str(found.value)


def test_the_folder_of_llavas_first_stage_is_no_whole_model(tmp_path: Path, tower: Path) -> None:
    """`config.json` and `mm_projector.bin`, and no language model."""
    model = published(tmp_path, tower)
    (tmp_path / "pytorch_model.bin").unlink()
    write_projector(model, tmp_path)
    with pytest.raises(ModelError, match="no weights of the language; expected a whole model"):
        read_foreign(tmp_path)
    begun = build_model(twins.config(seed=3))
    assert load_foreign(tmp_path, begun) == ["projector"]


@pytest.mark.parametrize("end", ["bin", "safetensors"])
def test_a_weight_file_cut_short_is_one_line(tmp_path: Path, tower: Path, end: str) -> None:
    model = published(tmp_path, tower)
    if end == "safetensors":
        (tmp_path / "pytorch_model.bin").unlink()
        write_llava(model, tmp_path, llava_form(tmp_path))
    (file,) = tmp_path.glob(f"*.{end}")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ModelError, match=rf"{file.name}: cannot be read \("):
        read_foreign(tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "idefics3"}, "a idefics3; expected a run, an export, LLaVA's"),
        ({"model_type": "llava_next", "vision_config": {}}, "a llava_next; expected a run"),
        ({"model_type": "llama"}, "a llama; expected a run"),
        ({}, "no model; expected a run"),
        ([], "config.json: damaged; expected a JSON object"),
    ],
)
def test_another_architecture_is_one_line(tmp_path: Path, config: Any, words: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=words):
        read_foreign(tmp_path)


# ---- what we write for LLaVA and PEFT ----------------------------------------------------------


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_llavas_config_is_in_the_words_of_its_transformers(tmp_path: Path) -> None:
    language = twins.config().language
    rope = {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
    changed = replace(language, settings={**language.settings, "rope_parameters": rope})
    model = build_model(replace(twins.config(), language=changed))
    write_llava(model, tmp_path, llava_form(tmp_path))
    found = config_of(tmp_path)
    assert found["rope_theta"] == 5e5
    assert found["rope_scaling"] == {"type": "linear", "factor": 2.0}
    assert "rope_parameters" not in found
    assert found["mm_vision_tower"] == str(tmp_path / "mm_vision_tower")
    assert found["mm_vision_select_layer"] == -1
    same(model, read_foreign(tmp_path))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type yarn; LLaVA's transformers has linear and dynamic",
        ),
        ({"mlp_bias": True}, "mlp_bias; LLaVA's transformers has none"),
        ({"head_dim": 8}, "heads of 8 times 2 are not hidden_size 24"),
    ],
)
def test_what_llavas_transformers_cannot_read_is_refused(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    language = twins.config().language
    changed = replace(language, settings={**language.settings, **settings})
    with pytest.raises(ModelError, match=words):
        write_llava(
            build_model(replace(twins.config(), language=changed)), tmp_path, llava_form(tmp_path)
        )
    with pytest.raises(ModelError, match="qwen2; LLaVA's loader has llama and mistral and phi3"):
        write_llava(build_model(twins.config("clip", "qwen2")), tmp_path, llava_form(tmp_path))
    assert not any(tmp_path.iterdir())


def test_a_tower_that_did_not_learn_is_named_and_not_written(tmp_path: Path, tower: Path) -> None:
    transformers.CLIPImageProcessor(
        size={"shortest_edge": twins.SIDE},
        crop_size={"height": twins.SIDE, "width": twins.SIDE},
    ).save_pretrained(tower)
    model = published(tmp_path, tower)
    images = llava_form(tmp_path).images
    assert published_tower(model, images) == str(tower)
    assert published_tower(model, replace(images, aspect="crop")) == str(tower)
    assert published_tower(model, replace(images, aspect="stretch")) == ""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        next(moved.vision.parameters()).add_(1e-3)
    assert published_tower(moved, images) == ""


def test_the_base_below_adapters_is_a_model_that_peft_takes(tmp_path: Path) -> None:
    library: Any = peft
    config = twins.config(lora=LORA, trainable=("projector", "language"))
    model = trained(config)
    base = write_base(model, tmp_path, torch.float32)
    write_lora_run(model, tmp_path, base=str(base))
    found = library.AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(1, 9)[None]
    torch.testing.assert_close(found(ids).logits, model.language(ids).logits, rtol=1e-5, atol=1e-5)
    settings = config_of(base)
    assert settings["rope_theta"] == settings["rope_parameters"]["rope_theta"]


def test_a_frozen_projector_is_left_over_too(tmp_path: Path) -> None:
    """LLaVA takes it from nowhere else."""
    model = trained(twins.config(lora=LORA, trainable=("language",)))
    write_lora_run(model, tmp_path)
    other = build_model(twins.config(seed=7))
    load_foreign(tmp_path / "non_lora_trainables.bin", other)
    for name, value in model.projector.state_dict().items():
        assert torch.equal(value, other.projector.state_dict()[name])


needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is absent; pip install 'lapilli[qlora]'",
)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adapters_over_4_bits_merge_into_whole_weights(tmp_path: Path, kind: str) -> None:
    """The numbers that the run computed with, and what it learnt on top."""
    settings: dict[str, Any] = {**twins.DECODER, "hidden_size": 64, "intermediate_size": 128}
    if kind == "gpt2":
        settings = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 64}
    start = twins.config("clip", kind, trainable=("projector", "language"))
    plain = build_model(replace(start, language=replace(start.language, settings=settings))).eval()
    plain.language.save_pretrained(tmp_path / "base")
    language = LanguageConfig(pretrained=str(tmp_path / "base"), attention="eager", quantize="nf4")
    lora = LoraConfig(rank=4, alpha=8, dropout=0.0)
    model = trained(replace(start, language=language, lora=lora))
    merged = copy.deepcopy(plain.language)
    merged.load_state_dict({n: w.make() for n, w in plain_weights(model.language).items()})
    ids = torch.arange(1, 12)[None]
    ours = model.language(ids).logits
    torch.testing.assert_close(merged(ids).logits, ours, rtol=1e-4, atol=1e-4)
    assert (plain.language(ids).logits - ours).abs().max() > 1e-2
    below = write_base(model, tmp_path / "out", torch.float32)
    write_lora_run(model, tmp_path / "out", base=str(below))
    library: Any = peft
    found = library.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(found(ids).logits, ours, rtol=1e-4, atol=1e-4)


def test_a_projectors_file_is_a_start_and_no_model(tmp_path: Path) -> None:
    path = write_projector(build_model(twins.config()), tmp_path)
    assert load_foreign(path, build_model(twins.config(seed=3))) == ["projector"]
    with pytest.raises(ModelError, match="no model; expected a run"):
        read_foreign(tmp_path)
