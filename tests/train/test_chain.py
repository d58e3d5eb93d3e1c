"""Runs that start from runs: what learnt before lies below, whatever the adapters."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lapilli.model.config import LoraConfig, Part
from lapilli.model.interop.weights import plain_weights
from lapilli.model.parts.trainable import trainable_parameters
from lapilli.model.vlm import VisionLanguageModel, build_model
from lapilli.train.checkpoint import save_load as checkpoint
from lapilli.train.checkpoint.find import latest_checkpoint
from lapilli.train.config import RunConfig
from lapilli.train.errors import TrainError
from lapilli.train.inference.evaluate import load_trained
from lapilli.train.worker.compatibility import build_run
from tests.model.test_qwen1 import write_qwen1
from tests.train.earlier_run import write_earlier
from tests.train.made_run import configured, made_run, summed_loss
from tests.train.tiny import VOCABULARY, model_config

BOTH: tuple[Part, ...] = ("projector", "language")
ALL: tuple[Part, ...] = ("vision", "projector", "language")
FIRST = LoraConfig(rank=2, alpha=4, dropout=0.0)
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is absent; pip install 'lapilli[qlora]'",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model with weights, as transformers writes it."""
    folder = tmp_path_factory.mktemp("base")
    build_model(replace(model_config("language"), seed=11)).language.save_pretrained(folder)
    return folder


def on_base(base: Path, **values: Any) -> dict[str, Any]:
    return {"pretrained": str(base), "settings": {}, **values}


def assert_goes_on(config: RunConfig, earlier: VisionLanguageModel) -> VisionLanguageModel:
    """A run's model begins as the function that the earlier one ended as; made a run, too."""
    began = build_run(config).model
    expected = summed_loss(earlier)
    assert summed_loss(began) == pytest.approx(expected, rel=1e-6)
    made = made_run(config)
    ended = summed_loss(made)
    assert abs(ended - expected) > 1e-3  # it has learnt something
    again = load_trained(Path(config.output)).model
    assert summed_loss(again) == ended
    return made


@pytest.mark.parametrize(
    "second",
    [
        FIRST,
        replace(FIRST, alpha=64),
        replace(FIRST, rank=5),
        replace(FIRST, target="q_proj|up_proj"),
        replace(FIRST, target=r"language\..*", dropout=0.3),
        replace(FIRST, bias="all"),
        None,
    ],
)
@pytest.mark.parametrize("parts", [BOTH, ALL])
def test_adapters_lie_merged_below_what_comes_after(
    second: LoraConfig | None, parts: tuple[Part, ...], base: Path, tmp_path: Path
) -> None:
    language = on_base(base)
    first = made_run(configured(tmp_path / "a", *parts, lora=FIRST, language=language))
    after = configured(
        tmp_path / "b", *parts, lora=second, language=language, init_from=tmp_path / "a"
    )
    assert_goes_on(after, first)


def test_a_chain_of_whole_and_adapted_stages_is_followed_to_its_beginning(
    base: Path, tmp_path: Path
) -> None:
    stages: list[tuple[tuple[Part, ...], LoraConfig | None]] = [
        (("projector",), None),
        (BOTH, None),
        (ALL, replace(FIRST, bias="all")),
        (BOTH, replace(FIRST, rank=3, target="v_proj|down_proj")),
        (("vision", "projector"), None),
        (ALL, replace(FIRST, alpha=1)),
    ]
    made, before = None, ""
    for number, (parts, lora) in enumerate(stages):
        run = tmp_path / str(number)
        config = configured(run, *parts, lora=lora, language=on_base(base), init_from=before)
        made = assert_goes_on(config, made) if made else made_run(config)
        before = str(run)


@pytest.mark.parametrize("second", [replace(FIRST, projector=True, rank=3), FIRST, None])
def test_adapters_of_the_projector_lie_merged_below(
    second: LoraConfig | None, base: Path, tmp_path: Path
) -> None:
    language, lora = on_base(base), replace(FIRST, projector=True)
    first = made_run(configured(tmp_path / "a", *BOTH, lora=lora, language=language))
    after = configured(
        tmp_path / "b", *BOTH, lora=second, language=language, init_from=tmp_path / "a"
    )
    assert_goes_on(after, first)


@pytest.mark.parametrize("lora", [FIRST, None])
def test_added_rows_of_a_first_stage_lie_below_the_second(
    lora: LoraConfig | None, base: Path, tmp_path: Path
) -> None:
    language = on_base(base, vocab_size=VOCABULARY + 2)
    rows = {**language, "train_added_rows": True}
    first = made_run(configured(tmp_path / "a", "projector", language=rows))
    after = configured(
        tmp_path / "b", *BOTH, lora=lora, language=language, init_from=tmp_path / "a"
    )
    assert_goes_on(after, first)
    table: torch.Tensor = build_run(after).model.language.get_input_embeddings().weight
    assert torch.equal(table[VOCABULARY:], first.language.added_rows.embedding)


@pytest.mark.parametrize("second", [FIRST, replace(FIRST, target="c_attn|w1|w2"), None])
def test_one_a_of_three_layers_lies_merged_below_each(
    second: LoraConfig | None, tmp_path: Path
) -> None:
    """Saved once, under the first layer's name: the others' product is made of it too."""
    language = on_base(write_qwen1(tmp_path / "qwen"))
    shared = replace(FIRST, target="c_attn|w1|w2")
    first = made_run(configured(tmp_path / "a", *BOTH, lora=shared, language=language))
    after = configured(
        tmp_path / "b", *BOTH, lora=second, language=language, init_from=tmp_path / "a"
    )
    assert_goes_on(after, first)


def test_gpt2s_transposed_layers_are_merged(tmp_path: Path) -> None:
    language = {
        "model_type": "gpt2",
        "settings": {"n_embd": 24, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY,
                     "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    }  # fmt: skip
    first = made_run(configured(tmp_path / "a", *BOTH, lora=FIRST, language=language))
    after = configured(
        tmp_path / "b",
        *BOTH,
        lora=replace(FIRST, alpha=9),
        language=language,
        init_from=tmp_path / "a",
    )
    assert_goes_on(after, first)


def test_merged_weights_in_bf16_are_rounded_once(base: Path, tmp_path: Path) -> None:
    language, half = on_base(base), {"dtype": "bf16"}
    first = made_run(configured(tmp_path / "a", *BOTH, lora=FIRST, language=language))
    after = configured(
        tmp_path / "b",
        *BOTH,
        lora=FIRST,
        language=language,
        model=half,
        precision="bf16",
        init_from=tmp_path / "a",
    )
    found = dict(build_run(after).model.language.named_parameters())
    source = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).state_dict()
    layer = "model.layers.1.mlp.up_proj"
    pair: Any = first.language.get_submodule(layer)
    product = pair.lora_B["default"].weight.double() @ pair.lora_A["default"].weight.double() * 2
    expected = (source[f"{layer}.weight"].double() + product).to(torch.bfloat16)
    differs = found[f"{layer}.base_layer.weight"] != expected
    assert differs.float().mean() < 0.01  # fp32 sums, where they lie between two numbers


@pytest.mark.parametrize("tied", [False, True])
def test_added_rows_go_on_and_grow(tied: bool, tmp_path: Path) -> None:
    base = tmp_path / "base"
    build_model(replace(model_config("language", tied=tied), seed=11)).language.save_pretrained(
        base
    )

    def stage(name: str, rows: int, lora: LoraConfig | None, before: str = "") -> RunConfig:
        start = tmp_path / before if before else ""
        language = on_base(base, vocab_size=rows)
        return configured(tmp_path / name, *BOTH, lora=lora, language=language, init_from=start)

    first = made_run(stage("a", VOCABULARY + 4, FIRST))
    second = assert_goes_on(stage("b", VOCABULARY + 4, replace(FIRST, rank=3), "a"), first)
    third = made_run(stage("c", VOCABULARY + 9, None, "b"))
    tables = plain_weights(second.language)
    began = build_run(stage("d", VOCABULARY + 9, None, "b")).model.language
    for name in {"model.embed_tokens.weight", "lm_head.weight"}:
        found, expected = began.get_parameter(name), tables[name].make()
        assert torch.equal(found[: VOCABULARY + 4], expected)
    assert_goes_on(stage("e", VOCABULARY + 9, FIRST, "c"), third)
    larger = build_run(stage("f", VOCABULARY + 12, None, "c")).model.language
    for name in {"model.embed_tokens.weight", "lm_head.weight"}:
        known = third.language.get_parameter(name)
        assert torch.equal(larger.get_parameter(name)[: VOCABULARY + 9], known)
        new = larger.get_parameter(name)[VOCABULARY + 9 :]
        torch.testing.assert_close(new, known.mean(0).expand_as(new))
    with pytest.raises(
        TrainError, match=rf"of {VOCABULARY + 9} rows, this model has {VOCABULARY}; set model\."
    ):
        build_run(stage("g", 0, None, "c"))


@needs_bitsandbytes
def test_adapters_are_merged_before_4_bits_and_4_bits_are_what_lay_below(tmp_path: Path) -> None:
    """Linear layers of a multiple of 64 numbers, as bitsandbytes packs them."""
    sized = model_config("language")
    settings = {**sized.language.settings, "hidden_size": 64, "intermediate_size": 128}
    whole = replace(sized, seed=11, language=replace(sized.language, settings=settings))
    build_model(whole).language.save_pretrained(tmp_path / "base")
    plain = on_base(tmp_path / "base")
    packed = on_base(tmp_path / "base", quantize="nf4")

    def stage(name: str, language: dict[str, Any], before: str = "") -> RunConfig:
        start = tmp_path / before if before else ""
        return configured(tmp_path / name, *BOTH, lora=FIRST, language=language, init_from=start)

    first = made_run(stage("a", plain))
    second = build_run(stage("b", packed, "a")).model
    layer = "model.layers.0.self_attn.q_proj"
    expected = plain_weights(first.language)[f"{layer}.weight"].make()
    functional: Any = importlib.import_module("bitsandbytes.functional")
    held: Any = second.language.get_submodule(layer).base_layer.weight
    found = functional.dequantize_4bit(held.data, held.quant_state)
    quantised, state = functional.quantize_4bit(
        expected, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    assert torch.equal(found, functional.dequantize_4bit(quantised, state))
    ended = made_run(stage("b", packed, "a"))
    assert summed_loss(load_trained(tmp_path / "b").model) == pytest.approx(summed_loss(ended))
    assert_goes_on(stage("c", plain, "b"), ended)  # whole numbers again: those it computed with


@needs_bitsandbytes
def test_layers_in_4_bits_are_those_that_transformers_makes(tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    sized = model_config("language")
    settings = {**sized.language.settings, "hidden_size": 64, "intermediate_size": 128}
    whole = replace(sized, language=replace(sized.language, settings=settings))
    build_model(whole).language.save_pretrained(tmp_path / "base")
    kind = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=kind, dtype=torch.float32, device_map="cpu"
    ).state_dict()
    language = on_base(tmp_path / "base", quantize="nf4")
    ours = build_run(configured(tmp_path / "a", "projector", language=language)).model.language
    found = ours.state_dict()
    assert found.keys() == theirs.keys()
    assert all(torch.equal(found[name], theirs[name]) for name in theirs)


def test_a_run_of_the_chain_that_is_gone_or_another_is_named(base: Path, tmp_path: Path) -> None:
    language = on_base(base)
    first = configured(tmp_path / "a", "projector", language=language)
    second = configured(
        tmp_path / "b", *BOTH, lora=FIRST, language=language, init_from=tmp_path / "a"
    )
    third = configured(
        tmp_path / "c", *BOTH, lora=FIRST, language=language, init_from=tmp_path / "b"
    )
    for config in (first, second, third):
        made_run(config)
    shutil.move(tmp_path / "a", tmp_path / "away")
    for config in (second, third):
        with pytest.raises(
            TrainError,
            match=rf"init_from: {tmp_path}/b started from weights of {tmp_path}/a .*"
            "which has no whole checkpoint any more; put them back",
        ):
            load_trained(Path(config.output))
        with pytest.raises(TrainError, match=rf"started from weights of {tmp_path}/a"):
            build_run(config)
    made_run(replace(first, model=replace(first.model, seed=4)))
    with pytest.raises(TrainError, match=r"which has others now \(step 1\)"):
        load_trained(Path(third.output))


def test_a_start_that_went_on_is_still_found(base: Path, tmp_path: Path) -> None:
    language = on_base(base)
    first = configured(tmp_path / "a", "projector", language=language)
    made_run(first)
    second = configured(tmp_path / "b", "language", language=language, init_from=tmp_path / "a")
    ended = summed_loss(made_run(second))
    shutil.copytree(tmp_path / "a" / "checkpoints", tmp_path / "a" / "milestones")
    made_run(first, step=2, scale=0.1)
    assert summed_loss(load_trained(tmp_path / "b").model) == ended
    shutil.rmtree(tmp_path / "a" / "checkpoints" / "step-00000001")
    assert summed_loss(load_trained(tmp_path / "b").model) == ended
    assert build_run(second).start is not None


def test_a_run_of_the_layout_before_is_started_from_and_not_resumed(tmp_path: Path) -> None:
    first = configured(tmp_path / "first", "projector")
    trained = made_run(first)
    weights = {n: v.detach().clone() for n, v in trainable_parameters(trained).items()}
    write_earlier(tmp_path / "first" / "checkpoints" / "step-00000001", weights)
    second = build_run(configured(tmp_path / "second", "language", init_from=tmp_path / "first"))
    found = dict(second.model.named_parameters())
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    loaded = load_trained(tmp_path / "first").model
    assert summed_loss(loaded) == summed_loss(trained)
    newest = latest_checkpoint(tmp_path / "first")
    assert newest is not None
    with pytest.raises(
        TrainError, match=r"has layout 1, this version resumes from layout 2; --init_from=.*first"
    ):
        checkpoint.load_into(None, newest)
