"""What stock transformers makes of an export: transformers_read.py ASKED.json ANSWERED.json.

ASKED: {"folders": {name: path}, "questions": [[image path or null, text], ...], "new": tokens}.
ANSWERED: by folder ids, the last logits and greedy text of each question alone, and the texts of
all of them in one batch, from a processor's text and from messages. LLaVA's processor of
transformers 4.49 takes no messages with images in a batch: null.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


def messages(question: list[Any], *, with_path: bool) -> list[dict[str, Any]]:
    image, text = question
    part = {"type": "image", "path": image} if with_path else {"type": "image"}
    said = {"type": "text", "text": text}
    return [{"role": "user", "content": [part, said] if image else [said]}]


def read(folder: str, questions: list[list[Any]], new: int) -> dict[str, Any]:
    processor = AutoProcessor.from_pretrained(folder)
    model: Any = AutoModelForImageTextToText.from_pretrained(
        folder, torch_dtype=torch.float32
    ).eval()
    said: dict[str, Any] = {"ids": [], "logits": [], "alone": []}

    def texts_of(inputs: Any) -> list[str]:
        ids = model.generate(**inputs, max_new_tokens=new, do_sample=False)
        cut = ids[:, inputs["input_ids"].shape[1] :]
        return [t.strip() for t in processor.batch_decode(cut, skip_special_tokens=True)]

    def inputs_of(some: list[list[Any]]) -> Any:
        prompts = [
            processor.apply_chat_template(messages(q, with_path=False), add_generation_prompt=True)
            for q in some
        ]
        images = [Image.open(q[0]).convert("RGB") for q in some if q[0]] or None
        return processor(text=prompts, images=images, return_tensors="pt", padding=True)

    for question in questions:
        inputs = inputs_of([question])
        with torch.inference_mode():
            logits = model(**inputs).logits[0, -1]
        said["ids"].append(inputs["input_ids"][0].tolist())
        said["logits"].append(logits.tolist())
        said["alone"] += texts_of(inputs)
    said["batch"] = texts_of(inputs_of(questions))
    with_images = [q for q in questions if q[0]]
    said["chat"] = None
    if not transformers.__version__.startswith("4.49"):
        inputs = processor.apply_chat_template(
            [messages(q, with_path=True) for q in with_images],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
        )
        said["chat"] = texts_of(inputs)
    return said


asked = json.loads(Path(sys.argv[1]).read_text())
found = {n: read(f, asked["questions"], asked["new"]) for n, f in asked["folders"].items()}
Path(sys.argv[2]).write_text(json.dumps({"version": transformers.__version__, "found": found}))
