"""Tiny runs of every form that is exported: whole, adapters, grown vocabulary, trained tower."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pipelines.export
import pipelines.train
from lapilli.data.images.view import ImageSpec, prepare
from lapilli.model.config import Decoding
from lapilli.train.inference.assistant import Assistant, Question, open_assistant
from tests.factories import (
    CLIP_MEAN,
    COLOURS,
    NOUNS,
    build_dataset,
    image_bytes,
    make_mixture,
    make_tokenizer,
)
from tests.foreign.llava_material import SIDE, write_tower

__all__ = ["ADDED", "LORA", "TOKENS", "Forms", "Said", "ask"]

TOKENS = 8
ADDED = ["<|im_start|>", "<|im_end|>", "<goat>"]
THETA = 50_000.0
PIECES = VOCABULARY = 320
RECIPE = """
view: view
global_batch_size: 8
micro_batch_size: 4
num_workers: 1
device: cpu
optim: {lr: 0.01}
model:
  vision: {tower: clip, pretrained: TOWER}
  language: {pretrained: LANGUAGE}
"""
LORA = ("--model.lora.rank=4", "--model.lora.alpha=16", "--model.lora.dropout=0")


@dataclass(frozen=True)
class Said:
    """What a model answers to a question.

    Attributes:
        ids: Of the prompt, -200 for an image.
        logits: Of the prompt's last position.
        text: The greedy answer.
    """

    ids: list[int]
    logits: torch.Tensor
    text: str


@dataclass
class Forms:
    """Trains a run of a form when it is first asked for."""

    folder: Path

    def __post_init__(self) -> None:
        """Write models, a tokenizer of pieces and pictures."""
        self.folder.mkdir(exist_ok=True)
        for number, size in enumerate([(57, 40), (40, 90), (56, 56)]):
            data = image_bytes("png", *size, seed=number)
            (self.folder / f"photo{number}.png").write_bytes(data)
        torch.manual_seed(1)
        language = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=1024,
                initializer_range=0.15,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
                rope_parameters={"rope_theta": THETA, "rope_type": "default"},
            )
        )
        for name in ("decoder", "language"):  # for any tokenizer, and with one
            language.save_pretrained(self.folder / name)
            config = (
                self.folder / name / "config.json"
            )  # as it was published, before transformers 5
            settings: dict[str, Any] = json.loads(config.read_text())
            del settings["rope_parameters"]
            config.write_text(json.dumps({**settings, "rope_theta": THETA}))
        write_pieces(self.folder / "language")
        write_tower(self.folder / "tower")

    @property
    def questions(self) -> list[tuple[str, str | None]]:
        """Of unlike lengths, one without an image."""
        photos = [str(self.folder / f"photo{number}.png") for number in range(3)]
        return [
            ("<image>\nWhat colour is the goat?", photos[0]),
            ("<image>\nWhich?", photos[1]),
            ("Is it red or is it blue, and why do you think so?", None),
            ("<image>\nWhat is this, in a word or two?", photos[2]),
        ]

    def tokenizer(self, kind: str) -> Path:
        """`pieces` (SentencePiece), `grown` (the same with tokens added), or `bytes`."""
        folder = self.folder / f"tokenizer-{kind}"
        if kind == "pieces":
            return self.folder / "language"
        if not folder.exists() and kind == "bytes":
            make_tokenizer(folder)
        if not folder.exists():
            write_pieces(folder, ADDED)
        return folder

    def dataset(self, kind: str, template: str, aspect: Any = "pad") -> Path:
        """Records of a few words, pictures made square as `aspect` says."""
        output = self.folder / f"data-{kind}-{template}-{aspect}"
        if not output.exists():
            view = ImageSpec(SIDE, CLIP_MEAN, aspect=aspect, resizer="pillow")
            mixture = make_mixture(self.folder / f"raw-{output.name}", images=8, text_only=4)
            build_dataset(
                mixture, output, self.tokenizer(kind), views={"view": view}, template=template
            )
        return output

    def run(
        self,
        name: str,
        *flags: str,
        kind: str = "pieces",
        template: str = "v1",
        aspect: str = "pad",
    ) -> Path:
        """Three steps; what is frozen keeps its published weights."""
        output = self.folder / f"run-{name}"
        if not output.exists():
            recipe = self.folder / "recipe.yaml"
            decoder = "decoder" if kind == "bytes" else "language"
            text = RECIPE.replace("TOWER", str(self.folder / "tower"))
            recipe.write_text(text.replace("LANGUAGE", str(self.folder / decoder)))
            data = self.dataset(kind, template, aspect)
            arguments = [f"--config={recipe}", f"--dataset={data}", "--max_steps=3"]
            arguments += ["--launcher=process", f"--output={output}", *flags]
            assert pipelines.train.main(arguments) == 0
        return output

    def export(self, run: Path, to: str, name: str, *flags: str) -> Path:
        """Write a run in a form."""
        output = self.folder / name
        assert pipelines.export.main([str(run), f"--to={to}", f"--output={output}", *flags]) == 0
        return output


def write_pieces(folder: Path, added: list[str] | None = None) -> None:
    """A SentencePiece tokenizer as Llama's is published, with tokens added where `added`."""
    folder.mkdir(exist_ok=True)
    words = [
        f"USER: What colour is the {n}? ASSISTANT: The {n} is {c}." for n in NOUNS for c in COLOURS
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        pad_id=-1,
        minloglevel=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    (folder / "tokenizer.vocab").unlink()
    names = ["<unk>", "<s>", "</s>", *[""] * (PIECES - 3), *(added or [])]
    facts = {
        "tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True,
        "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "pad_token": "<unk>", "model_max_length": 1024, "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(number): {
                "content": name, "special": not name.startswith("<goat"), "lstrip": False,
                "rstrip": False, "normalized": False, "single_word": False,
            }
            for number, name in enumerate(names) if name
        },
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))


def ask(model: Path | Assistant, questions: list[tuple[str, str | None]]) -> list[Said]:
    """What our own code answers, question by question."""
    asked = open_assistant(model) if isinstance(model, Path) else model
    found: list[Said] = []
    for text, file in questions:
        images = [Path(file).read_bytes()] if file else []
        question = Question.of(text, *images)
        prompt = asked.prompt(question.turns)
        tokens = asked.model.vision.num_tokens
        ids = np.repeat(prompt, np.where(prompt < 0, tokens, 1))
        index = np.where(ids < 0, np.cumsum(ids < 0) - 1, -1).astype(np.int32)[None]
        side = asked.spec.size
        pixels = np.zeros((len(images), side, side, 3), np.uint8)
        for number, data in enumerate(images):
            pixels[number] = prepare(data, asked.spec)
        with torch.inference_mode():
            embedded = asked.model.embed(
                torch.from_numpy(np.where(ids < 0, 0, ids))[None],
                torch.from_numpy(index),
                torch.from_numpy(pixels),
            )
            logits = asked.model.language(inputs_embeds=embedded).logits[0, -1].float()
        answer = asked.answer([question], Decoding(TOKENS))[0]
        found.append(Said(prompt.tolist(), logits, answer))
    return found
