"""What learns: adapters, groups, and layers that are computed again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch.autograd.graph import saved_tensors_hooks

from lapilli.data.batches.collate import Batch, BatchShape, collate
from lapilli.model.config import LoraConfig, ModelConfig
from lapilli.model.errors import ModelError
from lapilli.model.parts.recomputation import recompute_all
from lapilli.model.parts.trainable import parameter_groups, set_modes, trainable_parameters
from lapilli.model.vlm import VisionLanguageModel, build_model
from tests.model import twins

LORA = LoraConfig(rank=2, alpha=8, dropout=0.0)


def batch_of(images: tuple[int, ...] = (2, 0, 1)) -> Batch:
    return collate(twins.samples(7, images), BatchShape(4, (48,), 9, 4), twins.SIDE)


def adapted(target: str, language: str = "llama", **values: Any) -> VisionLanguageModel:
    lora = replace(LORA, target=target)
    fields: dict[str, Any] = {"trainable": ("projector", "language"), "lora": lora, **values}
    return build_model(twins.config(language=language, **fields))


def layers_with_adapters(model: VisionLanguageModel) -> set[str]:
    names = trainable_parameters(model)
    return {name.partition(".lora_")[0] for name in names if ".lora_" in name}


def test_adapters_equal_pefts_own_on_the_same_weights() -> None:
    model = adapted("all-linear").eval()
    plain = build_model(replace(model.config, lora=None)).language
    wrapped: Any = get_peft_model(
        plain, PeftConfig(r=2, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    ).eval()
    ours = {n: p for n, p in model.language.named_parameters() if "lora_" in n}
    theirs = {n.removeprefix("base_model.model."): p for n, p in wrapped.named_parameters()}
    assert ours
    assert ours.keys() == {name for name in theirs if "lora_" in name}
    for name, parameter in ours.items():
        torch.nn.init.normal_(parameter)
        theirs[name].data.copy_(parameter)
    ids = torch.randint(1, 60, (2, 7))
    found = model.language(ids).logits
    torch.testing.assert_close(found, wrapped(ids).logits, rtol=0, atol=1e-5)
    found.square().sum().backward()
    wrapped(ids).logits.square().sum().backward()
    for name, parameter in ours.items():
        there = theirs[name].grad
        assert parameter.grad is not None
        assert there is not None
        torch.testing.assert_close(parameter.grad, there, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("target", "parts", "expected"),
    [
        ("all-linear", ("projector", "language"), 14),
        ("all-linear", ("projector", "language", "vision"), 14 + 12),
        ("q_proj|v_proj", ("projector", "language"), 4),
        (r"language\..*(q|v)_proj", ("language", "vision"), 4),
        (r"layers\.1\.mlp\..*", ("language",), 3),
        ("fc1", ("vision", "projector"), 2),
    ],
)
def test_targets(target: str, parts: tuple[str, ...], expected: int) -> None:
    model = adapted(target, trainable=parts)
    found = layers_with_adapters(model)
    assert len(found) == expected
    assert not any("lm_head" in name for name in found)
    groups = {name for name, _ in parameter_groups(model)}
    assert "adapters" in groups
    assert ("projector" in groups) is ("projector" in parts)
    if target == r"language\..*(q|v)_proj":
        assert "vision" in groups  # no adapter there: it learns whole
    assert "language" not in groups


def test_a_convolution_of_gpt2_is_a_linear_layer() -> None:
    settings = {"n_embd": 24, "n_layer": 1, "n_head": 2, "vocab_size": 64}
    base = twins.config()
    language = replace(base.language, model_type="gpt2", settings=settings)
    lora = replace(LORA, target="c_attn|w1|w2")
    config = replace(base, language=language, trainable=("language",), lora=lora)
    assert len(layers_with_adapters(build_model(config))) == 1


def test_a_target_that_matches_nothing_lists_the_layers_there_are() -> None:
    with pytest.raises(ModelError, match=r"'c_attn\|w1' matches no layer.*down_proj.*q_proj"):
        adapted("c_attn|w1")
    with pytest.raises(ModelError, match="neither language nor vision"):
        adapted("all-linear", trainable=("projector",))
    with pytest.raises(ModelError, match="no regular expression"):
        LoraConfig(target="q_proj(")
    with pytest.raises(ModelError, match="at least 1"):
        LoraConfig(rank=0)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_biases_learn_as_asked(bias: Any) -> None:
    lora = replace(LORA, target="q_proj", bias=bias)
    model = adapted("q_proj", "phi", lora=lora)
    biases = {n for n in trainable_parameters(model) if n.endswith("bias") and "projector" not in n}
    assert all("q_proj" in name for name in biases) is (bias != "all")
    assert bool(biases) is (bias != "none")


def test_groups_hold_every_parameter_once_and_vectors_do_not_decay() -> None:
    model = adapted("all-linear", trainable=("vision", "projector", "language"))
    groups = parameter_groups(model)
    found = [id(p) for params in groups.values() for p in params]
    assert sorted(found) == sorted(id(p) for p in trainable_parameters(model).values())
    for (_, decays), params in groups.items():
        assert all((p.dim() >= 2) is decays for p in params)


def test_text_alone_gives_adapters_of_the_tower_gradient_zero() -> None:
    model = adapted("all-linear", trainable=("vision", "projector", "language"))
    twins.forward(model, batch_of((0, 0))).backward()
    for name, parameter in trainable_parameters(model).items():
        assert parameter.grad is not None, name
        if not name.startswith("language"):
            assert parameter.grad.abs().max() == 0, name


def kept_bytes(model: VisionLanguageModel, batch: Batch) -> tuple[torch.Tensor, int]:
    """The loss, and the bytes that forward keeps for backward beside parameters."""
    parameters = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = twins.forward(model, batch)
    return loss, sum(kept.values())


@pytest.mark.parametrize(
    ("trainable", "lora"),
    [
        (("vision", "projector", "language"), None),
        (("projector",), None),
        (("projector", "language"), LORA),
    ],
)
def test_layers_computed_again_give_equal_gradients_and_keep_less(
    trainable: tuple[Any, ...], lora: LoraConfig | None
) -> None:
    made: list[tuple[dict[str, Any], int]] = []
    for again in (False, True):
        config = ModelConfig(
            twins.config().vision,
            twins.config().language,
            trainable=trainable,
            lora=lora,
            head_chunk=4,
            seed=1,
        )
        model = build_model(config)
        if again:
            recompute_all(model)
        set_modes(model)
        loss, kept = kept_bytes(model, batch_of())
        loss.backward()
        made.append(({n: p.grad for n, p in trainable_parameters(model).items()}, kept))
    (plain, all_kept), (recomputed, less_kept) = made
    assert less_kept < 0.6 * all_kept
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-6)
