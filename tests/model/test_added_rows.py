"""Rows for added tokens learn beside a frozen vocabulary, as they do where all of it learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lapilli.data.batches.collate import Batch, BatchShape, collate
from lapilli.model.config import LoraConfig, ModelConfig
from lapilli.model.errors import ModelError
from lapilli.model.generate import generate_greedy
from lapilli.model.interop.llava import load_llava, write_projector
from lapilli.model.interop.lora_run import write_lora_run
from lapilli.model.interop.peft import merge_adapter, read_adapter
from lapilli.model.interop.weights import plain_weights
from lapilli.model.parts.added_rows import added_rows, source_rows, table_names
from lapilli.model.parts.trainable import group_of, trainable_parameters
from lapilli.model.vlm import VisionLanguageModel, build_model
from tests.model import twins

ADDED = 5  # the last ids of the batches are among them
KNOWN = twins.VOCABULARY - ADDED
LORA = LoraConfig(rank=2, alpha=4, dropout=0.0)
FAMILIES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "phi": {},
    "gemma": {},
    "granite": {},
}  # fmt: skip  untied, tied, a head with a bias, a scaled embedding, scaled logits


def config(name: str, lora: LoraConfig | None = LORA, **values: Any) -> ModelConfig:
    """A vocabulary of fewer rows than the batches have ids, grown to them."""
    made = twins.config("clip", name, trainable=("projector", "language"), lora=lora, **values)
    settings = {**made.language.settings, **FAMILIES[name], "vocab_size": KNOWN}
    language = replace(made.language, settings=settings, vocab_size=twins.VOCABULARY)
    return replace(made, language=language)


def batch() -> Batch:
    """Added ids are asked and answered, beside images."""
    samples = twins.samples(5, (1, 0, 2))
    for number, sample in enumerate(samples):
        text = np.flatnonzero(sample.input_ids >= 0)
        sample.input_ids[text[-1]] = KNOWN + number
        sample.input_ids[text[1]] = KNOWN + 3
    return collate(samples, BatchShape(3, (48,), 9, 4), twins.SIDE)


@torch.no_grad()
def learnt(model: VisionLanguageModel) -> VisionLanguageModel:
    """As after training: every parameter that learns has moved."""
    generator = torch.Generator().manual_seed(3)
    for value in trainable_parameters(model).values():
        value += 0.1 * torch.randn(value.shape, generator=generator)
    return model


def as_whole(model: VisionLanguageModel) -> VisionLanguageModel:
    """The same function without adapters, from the tensors that exports write."""
    plain = build_model(replace(model.config, lora=None))
    plain.load_state_dict(
        {
            name: w.make()
            for name, w in plain_weights(model.projector).items()
            for name in [f"projector.{name}"]
        },
        strict=False,
    )
    tensors = {name: weight.make() for name, weight in plain_weights(model.language).items()}
    plain.language.load_state_dict(tensors)
    plain.vision.load_state_dict(model.vision.state_dict())
    return plain


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_the_tables_rows(name: str) -> None:
    model = learnt(build_model(config(name)))
    plain = as_whole(model)
    loss, expected = twins.forward(model, batch()), twins.forward(plain, batch())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    rows = added_rows(model.language)
    assert rows is not None
    assert (rows.head is None) == bool(plain.language.config.tie_word_embeddings)
    found: dict[str, Any] = {"embedding": rows.embedding, "head": rows.head_rows}
    for table, kind in table_names(plain.language).items():
        gradient = plain.language.get_parameter(table).grad
        assert gradient is not None
        assert gradient[KNOWN:].abs().max() > 0
        torch.testing.assert_close(found[kind].grad, gradient[KNOWN:], rtol=1e-4, atol=1e-5)
        assert not model.language.get_parameter(table).requires_grad


def stage_1(name: str) -> ModelConfig:
    """The projector, and the embedding's added rows; the language model is frozen."""
    made = config(name, lora=None)
    language = replace(made.language, train_added_rows=True)
    return replace(made, trainable=("projector",), language=language)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_embeddings_rows_learn_beside_a_frozen_language_model(name: str) -> None:
    """LLaVA's first stage with image start and end tokens; an untied head's rows stay."""
    model = learnt(build_model(stage_1(name)))
    names = [n for n in trainable_parameters(model) if not n.startswith("projector.")]
    assert names == ["language.added_rows.embedding"]
    plain = build_model(replace(config(name, lora=None), seed=2))
    weights = plain_weights(model.language)
    plain.language.load_state_dict({n: w.make() for n, w in weights.items()})
    plain.projector.load_state_dict(model.projector.state_dict())
    plain.vision.load_state_dict(model.vision.state_dict())
    loss, expected = twins.forward(model, batch()), twins.forward(plain, batch())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    rows = added_rows(model.language)
    assert rows is not None
    whole: Any = plain.language.get_input_embeddings().weight
    torch.testing.assert_close(rows.embedding.grad, whole.grad[KNOWN:], rtol=1e-4, atol=1e-5)
    assert whole.grad[KNOWN:].abs().max() > 0
    if rows.head_rows is None:  # as it was made: the mean of the others
        head: Any = model.language.get_output_embeddings().weight
        mean = head[:KNOWN].float().mean(0)
        torch.testing.assert_close(head[KNOWN:], mean.expand(ADDED, -1))


def test_llavas_projector_file_has_the_embedding_and_its_last_rows_are_read(tmp_path: Path) -> None:
    model = learnt(build_model(stage_1("llama")))
    path = write_projector(model, tmp_path)
    table = torch.load(path, weights_only=True)["model.embed_tokens.weight"]
    frozen: Any = model.language.get_input_embeddings().weight
    rows = added_rows(model.language)
    assert rows is not None
    assert torch.equal(table[:KNOWN], frozen[:KNOWN])
    assert torch.equal(table[KNOWN:], rows.embedding)
    assert not torch.equal(table[KNOWN:], frozen[KNOWN:])
    for form in (table, table[KNOWN:]):  # LLaVA takes either
        found = torch.load(path, weights_only=True) | {"model.embed_tokens.weight": form}
        torch.save(found, tmp_path / "again.bin")
        after = build_model(replace(config("llama", lora=None), seed=7))
        before = {n: v.clone() for n, v in after.language.state_dict().items()}
        assert load_llava(tmp_path / "again.bin", after) == ["projector"]
        now: dict[str, Any] = after.language.state_dict()
        assert torch.equal(now["model.embed_tokens.weight"][KNOWN:], rows.embedding)
        before["model.embed_tokens.weight"][KNOWN:] = rows.embedding.detach()
        assert all(torch.equal(now[name], value) for name, value in before.items())
    small = config("llama", lora=None)
    other = build_model(replace(small, language=replace(small.language, vocab_size=0)))
    with pytest.raises(ModelError, match=r"again\.bin: model\.embed_tokens\.weight of shape"):
        load_llava(tmp_path / "again.bin", other)


def test_added_rows_that_cannot_learn_are_one_line() -> None:
    made = stage_1("llama")
    with pytest.raises(ModelError, match=r"without language\.vocab_size, which adds the rows"):
        replace(made.language, vocab_size=0)
    with pytest.raises(ModelError, match="adds no row to the 59 there are"):
        build_model(replace(made, language=replace(made.language, vocab_size=KNOWN)))
    with pytest.raises(ModelError, match="language is in trainable, where added rows learn anyway"):
        replace(made, trainable=("projector", "language"))


def test_they_are_all_that_is_added_and_belong_to_the_adapters() -> None:
    model = build_model(config("llama"))
    names = [n for n in trainable_parameters(model) if n.startswith("language.added_rows.")]
    assert names == ["language.added_rows.embedding", "language.added_rows.head"]
    assert {group_of(name) for name in names} == {"adapters"}
    shapes = {tuple(trainable_parameters(model)[name].shape) for name in names}
    assert shapes == {(ADDED, twins.DECODER["hidden_size"])}
    assert source_rows(model.language) == KNOWN


@pytest.mark.parametrize(
    "change",
    [
        {"lora": None},  # the tables learn whole
        {"lora": replace(LORA, target=r"vision\..*"), "trainable": ("vision", "projector")},
        {"trainable": ("projector",), "lora": None},
    ],
)
def test_there_are_none_where_the_tables_learn_or_the_language_model_does_not(
    change: dict[str, Any],
) -> None:
    model = build_model(replace(config("llama"), **change))
    assert added_rows(model.language) is None


def test_a_vocabulary_that_did_not_grow_has_none() -> None:
    made = config("llama")
    model = build_model(replace(made, language=replace(made.language, vocab_size=KNOWN)))
    assert added_rows(model.language) is None
    assert source_rows(model.language) == KNOWN


def test_a_batch_without_added_ids_gives_the_rows_a_gradient() -> None:
    model = build_model(config("llama"))
    plain = twins.samples(5, (0, 1))
    for sample in plain:
        np.minimum(sample.input_ids, KNOWN - 1, out=sample.input_ids)
    twins.forward(model, collate(plain, BatchShape(2, (48,), 9, 4), twins.SIDE)).backward()
    rows = added_rows(model.language)
    assert rows is not None
    assert rows.embedding.grad is not None
    assert not rows.embedding.grad.any()
    assert rows.head_rows is not None
    assert rows.head_rows.grad is not None
    assert rows.head_rows.grad.any()  # less likely than what was said


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_those_of_the_tables_rows(name: str) -> None:
    model = learnt(build_model(config(name))).eval()
    plain = as_whole(model).eval()
    prompts = [np.array([1, KNOWN, 4, KNOWN + 2]), np.array([KNOWN + 1, -200, 3])]
    pixels = [s.pixels for s in twins.samples(5, (0, 1))]
    with torch.no_grad():  # so that added ids are what is answered
        for made in (model, plain):
            head = made.language.get_output_embeddings()
            head.register_forward_hook(
                lambda module, given, output: output + 3.0 * (torch.arange(64) >= KNOWN)
            )
    asked = [
        generate_greedy(made, prompts, pixels, end_id=0, max_new_tokens=6)
        for made in (model, plain)
    ]
    assert asked[0] == asked[1]
    assert any(token >= KNOWN for answer in asked[0] for token in answer)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_peft_loads_them_onto_a_base_of_as_many_rows(name: str, tmp_path: Path) -> None:
    made = config(name)
    model = learnt(build_model(made)).eval()
    write_lora_run(model, tmp_path / "adapter")
    base = build_model(replace(made, lora=None)).language  # grown, as a user grows it
    base.save_pretrained(tmp_path / "base")
    theirs: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    ).eval()
    ids = torch.tensor([[1, KNOWN, 4, KNOWN + 2]])
    expected = model.language(ids).logits
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-4, atol=1e-4)
    merge_adapter(read_adapter(tmp_path / "adapter"), base)
    torch.testing.assert_close(base(ids).logits, expected, rtol=1e-4, atol=1e-4)
