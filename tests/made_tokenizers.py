"""Tokenizers of the two families, trained here, with and without the templates' special tokens."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

__all__ = ["FAMILIES", "made_tokenizer"]

FAMILIES = ("bytes", "joined", "sentencepiece")
SPECIALS = [
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
]  # fmt: skip
CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}{% if m['role'] == 'assistant' %}"
    "{{ eos_token }}{% endif %}\n{% endfor %}"
)
# no header of a template among them: where it ends and an answer begins, no token reaches over
TEXTS = [
    "It is red.\n###",
    "It is red.\n## Why\nI see red.\n### Human",
    "Is 3 > 2?<|im_end|>\n",
    "red.<|im_end|>\n<|im_start|>human\n",
    "C#.\n###",
    "It is #1 red.\n",
    "Is a cat a cat?",
] * 4


def made_tokenizer(family: str, *, has_specials: bool) -> Any:
    """A tokenizer.

    Args:
        family: "bytes" (GPT-2's), "joined" (the same, whose tokens reach over words, punctuation
            and line ends) or "sentencepiece" (Llama's, with single bytes for unknown letters).
        has_specials: Whether it has the special tokens that templates name.
    """
    specials = ["<unk>", "<s>", "</s>", *(SPECIALS if has_specials else [])]
    if family == "sentencepiece":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # while it is trained
            [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Split("\n", "isolated")]
        )
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=420, special_tokens=[*specials, *alphabet], show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=family == "bytes"
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=420,
            show_progress=False,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
    # no piece is spelt as a special token is
    is_split = has_specials or family == "sentencepiece"
    texts = [text for text in TEXTS if not (is_split and "<|im_end|>" in text)]
    tokenizer.train_from_iterator(texts, trainer)
    state = json.loads(tokenizer.to_str())
    if family == "sentencepiece":
        state["pre_tokenizer"] = None
    # single bytes are text
    state["added_tokens"] = [one for one in state["added_tokens"] if one["content"] in specials]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT,
    )
