"""Template and tokenizer for transformers: the ids of training, or a line before it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lapilli.data.text.encode import bind_template
from lapilli.data.text.export_template import TRIALS, export_obstacle, export_text, prompt_ids
from lapilli.data.text.templates import TEMPLATES, Template
from tests.made_tokenizers import FAMILIES, made_tokenizer

THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content.removeprefix('#') }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}\n"
)


def messages(turns: Any) -> list[dict[str, Any]]:
    return [
        {
            "role": t.role,
            "content": [
                {"type": "text", "text": p.text} if hasattr(p, "text") else {"type": "image"}
                for p in t.parts
            ],
        }
        for t in turns
    ]


@pytest.mark.filterwarnings("ignore:template .* its end marker:UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["v1", "plain", "chatml", "llava_llama_2", "own", "thinks"])
def test_the_files_give_trainings_ids_in_transformers(
    name: str, family: str, tmp_path: Path
) -> None:
    """Read back by AutoTokenizer, each way from messages to ids; the bos is not doubled."""
    tokenizer = made_tokenizer(family, has_specials=True)
    own = Template("own", chat=THINKS if name == "thinks" else "tokenizer")
    template = bind_template(TEMPLATES.get(name, own), tokenizer)
    exported = export_text(template, tokenizer)
    exported.write(tmp_path)
    read: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert read.padding_side == "left"
    assert read.pad_token is not None
    assert read.eos_token == ("<|im_end|>" if name in ("chatml", "thinks") else "</s>")
    assert exported.token_id("eos") in exported.end_ids or name == "plain"
    for turns in TRIALS:
        expected = prompt_ids(turns, tokenizer, template)
        said = messages(turns)
        text = read.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        image = read.convert_tokens_to_ids("<image>")
        for ids in (read(text)["input_ids"], read(text, add_special_tokens=False)["input_ids"]):
            assert [-200 if i == image else i for i in ids] == expected
        # and ours on the exported tokenizer, by the template that goes with it
        assert prompt_ids(turns, read, exported.template) == expected


def test_a_special_token_spelt_as_text_is_named_before_training() -> None:
    tokenizer = made_tokenizer("bytes", has_specials=True)
    said = export_obstacle(TEMPLATES["phi_hf"], tokenizer)
    assert said.startswith("template phi_hf: it writes '<|im_start|>' as text")
    assert "\n" not in said
    assert export_obstacle(replace(TEMPLATES["v1"]), tokenizer) == ""
