"""LoRA folders against PEFT: what it writes is read and merged, what is written it loads."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lapilli.model.errors import ModelError
from lapilli.model.interop.peft import merge_adapter, read_adapter, write_adapter


def base() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=32,
            attention_bias=True,
        )
    )


def adapted(model: Any, **settings: Any) -> Any:
    """PEFT's model around a copy, every trained value drawn anew: B begins as zeros."""
    values: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 12, "r": 4}
    library: Any = peft
    made = library.get_peft_model(
        copy.deepcopy(model), library.LoraConfig(**{**values, **settings})
    )
    for parameter in made.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    return made


KINDS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {"bias": "all"},
    {"modules_to_save": ["lm_head"]},
    {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}},
    {"alpha_pattern": {"layers.1.self_attn.q_proj": 3}},
]


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_merging_is_pefts_bit_for_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = base()
    theirs = adapted(model, **settings)
    theirs.save_pretrained(tmp_path)
    changed = merge_adapter(read_adapter(tmp_path), model)
    expected = theirs.merge_and_unload().state_dict()
    assert changed
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_what_is_written_peft_loads(tmp_path: Path) -> None:
    model = base()
    adapted(model).save_pretrained(tmp_path / "theirs")
    adapter = read_adapter(tmp_path / "theirs")
    write_adapter(adapter, tmp_path / "ours")
    again = read_adapter(tmp_path / "ours")
    assert again.settings == adapter.settings
    assert all(torch.equal(value, again.tensors[name]) for name, value in adapter.tensors.items())
    library: Any = peft
    loaded = library.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours")
    merge_adapter(adapter, model)
    ids = torch.arange(6)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_one_line_and_changes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no adapter can be read"):
        read_adapter(tmp_path)
    adapted(base()).save_pretrained(tmp_path)
    other = torch.nn.ModuleDict({"model": torch.nn.Linear(2, 2)})
    with pytest.raises(ModelError, match="is not in the model"):
        merge_adapter(read_adapter(tmp_path), other)
    narrow = base()
    narrow.model.layers[1].mlp.down_proj = torch.nn.Linear(20, 16)
    before = copy.deepcopy(narrow.state_dict())
    with pytest.raises(ModelError, match="expected its base model"):
        merge_adapter(read_adapter(tmp_path), narrow)
    assert all(torch.equal(value, before[name]) for name, value in narrow.state_dict().items())
    settings = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    for change, words in (({"use_dora": True}, "DoRA"), ({"peft_type": "IA3"}, "IA3")):
        text = json.dumps({**settings, **change})
        (tmp_path / "adapter_config.json").write_text(text, encoding="utf-8")
        with pytest.raises(ModelError, match=f"kind {words}"):
            read_adapter(tmp_path)
