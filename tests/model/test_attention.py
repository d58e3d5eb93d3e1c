"""Our attention against transformers' eager one, for every decoder that `auto` gives it to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig

from lapilli.model.attention.backend import attention_kernel, sdpa_backend
from lapilli.model.attention.choice import DECODERS, choose_attention
from lapilli.model.attention.forward import NAME, attend, holds_all_scores, register, with_masks
from lapilli.model.attention.masks import visible
from lapilli.model.config import LanguageConfig
from lapilli.model.errors import ModelError
from lapilli.model.parts.language import build_language
from lapilli.model.transformers_internals import attention_of
from lapilli.model.vlm import build_model
from tests.device_reads import device_reads
from tests.model import decoders, twins

register()


@pytest.mark.parametrize("family", DECODERS)
def test_equals_eager_attention_with_its_gradients_and_never_reads(family: str) -> None:
    """Rows are longer than the window of an architecture that has one."""
    expected, wanted = decoders.run(decoders.language(family, "eager"), decoders.inputs())
    model, given = decoders.language(family, NAME), decoders.inputs()
    with device_reads() as reads:
        found, gradients = decoders.run(model, given)
    assert reads == []
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        near = 1e-5 * max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=near, msg=name)


@pytest.mark.parametrize("family", decoders.WINDOWED)
def test_the_window_was_there_to_be_honoured(family: str) -> None:
    narrow, _ = decoders.run(decoders.language(family, NAME), decoders.inputs())
    wide, _ = decoders.run(decoders.language(family, NAME, window=64), decoders.inputs())
    assert not torch.allclose(narrow[:, decoders.WINDOW :], wide[:, decoders.WINDOW :], atol=1e-3)
    torch.testing.assert_close(narrow[:, : decoders.WINDOW], wide[:, : decoders.WINDOW])


def test_padding_on_the_right_changes_no_token_before_it() -> None:
    model = decoders.language("mistral", NAME)
    whole, _ = decoders.run(model, decoders.inputs())
    given = decoders.inputs()
    given["inputs_embeds"] = given["inputs_embeds"].detach().clone()
    given["inputs_embeds"][:, 7:] = 9.0
    padded = model.get_decoder()(**given).last_hidden_state
    torch.testing.assert_close(padded[:, :7], whole[:, :7])


@pytest.mark.parametrize(("length", "window"), [(7, None), (7, 3), (7, 1), (7, 9)])
def test_visible_against_a_loop(length: int, window: int | None) -> None:
    places = torch.arange(length)
    found = visible(places, places, window)
    for query in range(length):
        for key in range(length):
            seen = key <= query and (window is None or query - key < window)
            assert bool(found[query, key]) == seen


def test_visible_takes_queries_behind_a_cache_and_rows_of_their_own() -> None:
    queries, keys = torch.tensor([[4, 5], [9, 10]]), torch.arange(12).expand(2, 12)
    found = visible(queries, keys, 3)
    assert found.shape == (2, 2, 12)
    assert found[0, 0].nonzero().flatten().tolist() == [2, 3, 4]
    assert found[1, 1].nonzero().flatten().tolist() == [8, 9, 10]


@pytest.mark.parametrize("family", [*DECODERS, "bloom", "falcon", "gpt_oss"])
def test_auto_takes_ours_where_it_is_tested_and_says_so_where_it_is_not(family: str) -> None:
    chosen = choose_attention("auto", AutoConfig.for_model(family))
    if family in DECODERS:
        assert (chosen.name, chosen.note) == (NAME, "")
    else:
        assert chosen.name in ("sdpa", "eager")
        assert family in chosen.note
        assert "\n" not in chosen.note
        with pytest.raises(ModelError, match=rf"'{NAME}' is nothing {family} supports; expected"):
            choose_attention(NAME, AutoConfig.for_model(family))


def test_a_built_model_names_it_and_takes_it_again_by_that_name() -> None:
    config = twins.config()
    auto = replace(config, language=replace(config.language, attention="auto"))
    model = build_model(auto)
    assert model.config.language.attention == NAME
    assert build_model(model.config).config.language.attention == NAME


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_mask_of_padding_is_refused_but_inside_with_masks(family: str) -> None:
    model = build_language(LanguageConfig(family, settings=decoders.settings(family))).eval()
    ids, mask = torch.arange(1, 7).view(1, 6), torch.tensor([[0, 0, 1, 1, 1, 1]])
    with pytest.raises(ModelError, match=r"language.attention: lapilli takes no attention_mask"):
        model(ids, attention_mask=mask)
    places = torch.tensor([[0, 0, 0, 1, 2, 3]])
    with with_masks(model):
        padded = model(ids, attention_mask=mask, position_ids=places).logits
    alone = model(ids[:, 2:]).logits
    torch.testing.assert_close(padded[:, 2:], alone, rtol=1e-5, atol=1e-5)
    assert attention_of(model) == NAME


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"s_aux": torch.zeros(2)}, "does not know s_aux; set sdpa or eager"),
        ({"is_causal": False}, "attention to later tokens"),
        ({"attention_mask": torch.zeros(1, 1, 3, 3)}, "attention_mask"),
        ({"key": torch.zeros(1, 2, 5, 4)}, "a cache of keys"),
    ],
)
def test_what_would_change_the_result_is_refused(given: dict[str, Any], words: str) -> None:
    states = torch.zeros(1, 2, 3, 4)
    values: dict[str, Any] = {"query": states, "key": states, "value": states}
    values = {"attention_mask": None, **values, **given}
    with pytest.raises(ModelError, match=words):
        attend(torch.nn.Module(), **values)


def test_what_attention_keeps_all_scores() -> None:
    assert holds_all_scores(decoders.language("llama", "eager"))
    assert holds_all_scores(decoders.language("gemma2", NAME))
    assert not holds_all_scores(decoders.language("llama", NAME))


def test_no_file_of_a_model_carries_the_name(tmp_path: Path) -> None:
    model = build_language(LanguageConfig("llama", settings=twins.DECODER))
    model.save_pretrained(tmp_path)
    for path in tmp_path.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert NAME not in text, path
        assert "_attn_implementation" not in text, path


@pytest.mark.parametrize(
    ("family", "length", "expected"),
    [
        ("llama", 8, "lapilli (flash_attention)"),
        ("mistral", 8, "lapilli (flash_attention)"),
        ("gemma2", 8, "lapilli (all scores)"),
        ("gpt2", 8, "lapilli (flash_attention)"),
    ],
)
def test_the_kernels_of_a_cpu_are_named(family: str, length: int, expected: str) -> None:
    model = decoders.language(family, NAME)
    found = attention_kernel(model, length, torch.float32, torch.device("cpu"))
    assert found == expected


def test_the_kernel_that_is_named_is_the_one_that_runs() -> None:
    """With each kernel forbidden but the named one, torch still computes; without it, it cannot."""
    model, cpu = decoders.language("llama", NAME), torch.device("cpu")
    named = attention_kernel(model, decoders.LENGTH, torch.float32, cpu)
    assert named == "lapilli (flash_attention)"
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        decoders.run(model, decoders.inputs())
    shape = (1, 4, 8, 8)
    assert sdpa_backend(shape, shape, torch.float32, cpu, dropout=0.1) == "math"
    assert sdpa_backend(shape, shape, torch.float32, cpu, window=3) == "flash_attention"
