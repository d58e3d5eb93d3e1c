"""A model of fake tensors is the model that a run builds: names, shapes, types, what learns."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
import transformers
from torch import nn

from lapilli.data.batches.collate import Batch, BatchShape, collate
from lapilli.model.config import KEEP_ALL, LanguageConfig, LoraConfig, ModelConfig, VisionConfig
from lapilli.model.errors import ModelError
from lapilli.model.flops import model_numbers
from lapilli.model.parts.language import build_language
from lapilli.model.parts.quantized import Quantization, packed_numbers
from lapilli.model.parts.trainable import parameter_counts, set_modes
from lapilli.model.parts.vision import FAMILIES, Tower
from lapilli.model.vlm import build_model
from lapilli.train.config import RunConfig
from lapilli.train.driver.activation_memory import leanest
from lapilli.train.driver.fake_model import sketch_model
from lapilli.train.driver.memory_estimate import RowSizes, estimate_run, sketch_run, state_bytes
from lapilli.train.driver.memory_policy import choose_memory
from lapilli.train.errors import TrainError
from lapilli.train.steps.step import to_device
from tests.model import twins

DECODERS = [
    "llama", "mistral", "phi", "phi3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text",
    "cohere", "granite", "gpt2",
]  # fmt: skip
EVERYTHING: Any = ("vision", "projector", "language")
LORA = LoraConfig(rank=4, alpha=8, dropout=0.1)
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is absent; pip install 'lapilli[qlora]'",
)


def decoder_settings(kind: str) -> dict[str, Any]:
    if kind == "gpt2":
        return {"n_embd": 24, "n_layer": 2, "n_head": 2, "vocab_size": 64}
    return {**twins.DECODER, **twins.MORE.get(kind, {})}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of weights for each tower and for a few language models."""
    folder = tmp_path_factory.mktemp("weights")
    for name, family in FAMILIES.items():
        config: Any = getattr(transformers, f"{family.prefix}Config")(**twins.TOWERS[name])
        getattr(transformers, f"{family.prefix}Model")(config).save_pretrained(folder / name)
    for kind in ("llama", "gemma2"):
        language = LanguageConfig(kind, settings=decoder_settings(kind))
        build_language(language).save_pretrained(folder / kind)
    tied = {**decoder_settings("qwen2"), "tie_word_embeddings": True}
    build_language(LanguageConfig("qwen2", settings=tied)).save_pretrained(folder / "qwen2")
    wide = {**twins.DECODER, "hidden_size": 64, "intermediate_size": 128}
    build_language(LanguageConfig("llama", settings=wide)).save_pretrained(folder / "wide")
    return folder


def facts_of(model: nn.Module) -> list[tuple[str, tuple[int, ...], torch.dtype, bool]]:
    return [(n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in model.named_parameters()]


def shapes_of_a_batch(tokens: int, side: int = twins.SIDE) -> Batch:
    return collate([], BatchShape(2, (48,), tokens, 4), side, with_images=True)


def assert_same(config: ModelConfig) -> None:
    """Fake and real have the same parameters, modes, sizes and operations; the fake one runs."""
    fake, real = sketch_model(config), build_model(config)
    set_modes(real)
    assert facts_of(fake.model) == facts_of(real)
    assert fake.parameters() == parameter_counts(real)
    modes = [{n: m.training for n, m in model.named_modules()} for model in (fake.model, real)]
    assert modes[0] == modes[1]
    assert fake.model.vocab_size == real.vocab_size
    assert (fake.model.vision.image_size, fake.model.vision.num_tokens) == (
        real.vision.image_size,
        real.vision.num_tokens,
    )
    assert model_numbers(fake.model) == model_numbers(real)
    batch = shapes_of_a_batch(real.vision.num_tokens, real.vision.image_size)
    assert fake.activations(batch).held(KEEP_ALL) > 0


@pytest.mark.parametrize("tower", list(twins.TOWERS))
@pytest.mark.parametrize("source", ["pretrained", "settings"])
@pytest.mark.parametrize("size", [0, 40])
def test_of_every_tower(tower: str, source: str, size: int, folders: Path) -> None:
    given: dict[str, Any] = {
        "pretrained": {"pretrained": str(folders / tower)},
        "settings": {"settings": twins.TOWERS[tower]},
    }[source]
    vision = VisionConfig(tower, image_size=size, **given)
    language = LanguageConfig(settings=twins.DECODER)
    assert_same(ModelConfig(vision, language, trainable=EVERYTHING, head_chunk=4))


@pytest.mark.parametrize("kind", DECODERS)
def test_of_every_decoder_with_the_default_attention(kind: str) -> None:
    vision = VisionConfig(settings=twins.TOWER)
    config = ModelConfig(vision, LanguageConfig(kind, settings=decoder_settings(kind)))
    assert_same(replace(config, head_chunk=4))
    assert_same(replace(config, head_chunk=4, lora=LORA, dtype="bf16"))


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_of_experts(kind: str, dtype: Literal["fp32", "bf16"]) -> None:
    language = LanguageConfig(kind, settings=twins.DECODER)
    config = ModelConfig(VisionConfig(settings=twins.TOWER), language, head_chunk=4, dtype=dtype)
    fake, real = sketch_model(config), build_model(config)
    assert facts_of(fake.model) == facts_of(real)
    assert fake.activations(shapes_of_a_batch(9)).held(KEEP_ALL) > 0


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen2"])
def test_of_a_folder_with_ids_added(kind: str, folders: Path) -> None:
    language = LanguageConfig(pretrained=str(folders / kind), vocab_size=70)
    vision = VisionConfig("siglip", str(folders / "siglip"), vision_feature_layer=-1)
    for lora in (None, replace(LORA, bias="all")):
        assert_same(ModelConfig(vision, language, trainable=EVERYTHING, lora=lora, head_chunk=4))


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("dtype", "kind"), [("fp32", "nf4"), ("bf16", "nf4"), ("fp32", "fp4"), ("bf16", "int8")]
)
def test_of_few_bits(dtype: Literal["fp32", "bf16"], kind: Any, folders: Path) -> None:
    language = LanguageConfig(pretrained=str(folders / "wide"), quantize=kind)
    vision = VisionConfig(settings=twins.TOWER)
    config = ModelConfig(vision, language, lora=LORA, dtype=dtype, head_chunk=4)
    assert_same(config)
    projector_alone = replace(config, lora=None, trainable=("projector",))
    assert_same(projector_alone)
    plain = replace(projector_alone, language=replace(language, quantize="none"))
    assert sketch_model(projector_alone).parameters() == sketch_model(plain).parameters()


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("kind", "is_double"), [("nf4", True), ("fp4", True), ("nf4", False), ("int8", True)]
)
def test_what_few_bits_take_is_what_bitsandbytes_holds(
    kind: Any, is_double: bool, folders: Path
) -> None:
    language = LanguageConfig(
        pretrained=str(folders / "wide"), quantize=kind, double_quant=is_double
    )
    how = Quantization.of(language)
    config = ModelConfig(VisionConfig(settings=twins.TOWER), language, lora=LORA)
    model = build_model(config)
    held = 0
    for parameter in model.parameters():
        if state := getattr(parameter, "quant_state", None):
            scales = (state.absmax, state.state2.absmax) if is_double else (state.absmax,)
            held += parameter.nbytes + sum(scale.nbytes for scale in scales)
        elif parameter.dtype is torch.int8:
            held += parameter.nbytes + cast("Any", parameter).SCB.nbytes
    close = 0.05 if kind == "int8" else 0.02  # these rows are short, and each has a scale
    assert packed_numbers(model) * how.number_bytes == pytest.approx(held, rel=close)
    total, trained = parameter_counts(model)["language"]
    packed = packed_numbers(model.language)
    found = state_bytes(
        total, trained, stage=2, workers=1, precision="fp32", packed=packed, how=how
    ).weights
    whole = sum(p.nbytes for p in model.language.parameters() if p.is_floating_point())
    assert found == pytest.approx(held + whole, rel=close)


def really_kept(config: ModelConfig, batch: Batch) -> int:
    """Bytes that autograd keeps in a forward with real tensors, the weights left out."""
    model = build_model(config)
    set_modes(model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(saved: torch.Tensor) -> torch.Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        model(**to_device(batch, torch.device("cpu")).inputs)
    return sum(storage.nbytes() for place, storage in kept.items() if place not in weights)


@pytest.mark.parametrize(
    ("language", "lora"),
    [
        ("llama", LORA),
        ("gemma2", None),
        ("gpt2", None),
        pytest.param("wide", LORA, marks=needs_bitsandbytes),
    ],
)
def test_what_it_keeps_for_backward_is_what_autograd_keeps(
    language: str, lora: LoraConfig | None, folders: Path
) -> None:
    """With adapters, with eager attention, with a frozen decoder's dropout, and in 4 bits."""
    made = LanguageConfig(language, settings=decoder_settings(language))
    if language == "wide":
        made = LanguageConfig(pretrained=str(folders / "wide"), quantize="nf4")
    trainable: Any = ("projector",) if language == "gpt2" else ("projector", "language")
    vision = VisionConfig(settings=twins.TOWER)
    config = ModelConfig(vision, made, lora=lora, trainable=trainable, head_chunk=4)
    batch = shapes_of_a_batch(9)
    found = sketch_model(config).activations(batch).held(KEEP_ALL)
    assert found == pytest.approx(really_kept(config, batch), rel=0.01)


def test_what_a_gpu_alone_can_run_is_estimated_without_one() -> None:
    language = LanguageConfig(settings=twins.DECODER)
    config = ModelConfig(VisionConfig(settings=twins.TOWER), language, head_chunk=4)
    batch = shapes_of_a_batch(9)
    plain = sketch_model(config).activations(batch)
    assert (
        sketch_model(replace(config, merge="triton", kernels="liger")).activations(batch) == plain
    )


@pytest.mark.parametrize("rope", ["longrope", "dynamic", "yarn", "linear"])
def test_frequencies_that_follow_the_length(rope: str) -> None:
    """Some look at the positions' values, which fake tensors do not have."""
    half = 6 if rope == "longrope" else 0
    parameters: dict[str, Any] = {
        "rope_type": rope,
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    } | ({"short_factor": [1.0] * half, "long_factor": [2.0] * half} if half else {})
    settings = {**twins.DECODER, "max_position_embeddings": 64, "rope_parameters": parameters}
    language = LanguageConfig("phi3" if half else "llama", settings=settings)
    assert_same(ModelConfig(VisionConfig(settings=twins.TOWER), language, head_chunk=4))


class OwnTower(Tower):
    """A tower of one's own whose code looks at numbers, and reads weights where it is told to."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.image_size, self.num_tokens, self.hidden_size = twins.SIDE, 10, 16
        self.rates = torch.linspace(0, 0.1, 3).tolist()
        self.scale = torch.tensor(255.0)
        self.mean = nn.Buffer(torch.tensor([0.5, 0.5, 0.5]))
        model: Any = transformers.CLIPVisionModel
        self.clip: Any = (
            model.from_pretrained(config.pretrained)
            if config.pretrained
            else model(transformers.CLIPVisionConfig(**twins.TOWER))
        )

    def forward(self, pixels_NHW3: torch.Tensor) -> torch.Tensor:
        normal = (pixels_NHW3 / self.scale - self.mean).permute(0, 3, 1, 2)
        return self.clip(normal.to(self.clip.dtype)).last_hidden_state


def own_projector(inputs: int, outputs: int) -> nn.Module:
    """Its initialisation takes numbers."""
    made = nn.Linear(inputs, outputs)
    made.weight.data *= 1 / float(made.weight.detach().norm())
    return made


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_of_parts_of_ones_own(reads: bool, dtype: Literal["fp32", "bf16"], folders: Path) -> None:
    vision = VisionConfig(f"{__name__}:OwnTower", str(folders / "clip") if reads else "")
    config = ModelConfig(
        vision,
        LanguageConfig(settings=twins.DECODER),
        projector=f"{__name__}:own_projector",
        trainable=EVERYTHING,
        dtype=dtype,
        head_chunk=4,
    )
    assert_same(config)
    assert_same(replace(config, lora=replace(LORA, target="q_proj|v_proj")))


def test_a_forward_that_cannot_be_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    settings = {**twins.DECODER, "num_attention_heads": 4, "num_key_value_heads": 3}
    config = ModelConfig(VisionConfig(settings=twins.TOWER), LanguageConfig(settings=settings))
    sketch = sketch_model(config)
    capfd.readouterr()
    with pytest.raises(ModelError, match=r"^model: a batch cannot be computed with these settings"):
        sketch.activations(shapes_of_a_batch(9))
    assert capfd.readouterr() == ("", "")


@needs_bitsandbytes
def test_4_bits_that_do_not_fit_are_told_what_would(folders: Path) -> None:
    language = LanguageConfig(pretrained=str(folders / "wide"), quantize="nf4")
    model = ModelConfig(VisionConfig(settings=twins.TOWER), language, lora=LORA, head_chunk=4)
    config = RunConfig("in", "out", "view", model, global_batch_size=4, zero_stage=2)
    estimate = estimate_run(config, sketch_run(config), RowSizes(48))
    lean = leanest(estimate.one, offload=False)
    chosen, _ = choose_memory(config, "cuda", estimate.worker_bytes(2, 2, lean), lambda _: estimate)
    assert chosen.micro_batch_size == 2
    with pytest.raises(TrainError, match=r"a micro-batch of 1 x 48 tokens") as refused:
        choose_memory(config, "cuda", 1000, lambda _: estimate)
    assert "ZeRO-3" not in str(refused.value)
