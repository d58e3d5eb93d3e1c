"""Models loaded by LLaVA's own `load_pretrained_model` and asked as its `run_llava` asks.

python llava_answer.py JOBS.json

Each job has `path`, `base` (or null), `conversation` (LLaVA's name of a template), `questions` (a
text with `<image>` or none, and an image file or null), `tokens` and `output`. The output gets of
each question the ids, the logits of the last position and the greedy text; then the texts of all
in one batch. LLaVA loads in fp16; here the name stands for fp32, so that numbers can be compared.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

torch.float16 = torch.float32


def loaded(name: str) -> Any:
    """A module of LLaVA's."""
    return importlib.import_module(f"llava.{name}")


def main() -> None:
    """Answer every job."""
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        answer(job)


def answer(job: dict[str, Any]) -> None:
    """Load one model and write what it says."""
    tools, constants = loaded("mm_utils"), loaded("constants")
    conversations = loaded("conversation").conv_templates
    name = tools.get_model_name_from_path(job["path"])
    tokenizer, model, processor, _ = loaded("model.builder").load_pretrained_model(
        job["path"], job["base"], name, device="cpu"
    )
    model.eval()
    mark = constants.IMAGE_TOKEN_INDEX
    asked: list[tuple[torch.Tensor, torch.Tensor]] = []
    found: list[dict[str, Any]] = []
    for question, file in job["questions"]:
        said = conversations[job["conversation"]].copy()
        said.append_message(said.roles[0], question)
        said.append_message(said.roles[1], None)
        ids = tools.tokenizer_image_token(said.get_prompt(), tokenizer, mark, return_tensors="pt")
        pictures = [opened(file)] if file else []
        side = int(processor.crop_size["height"])
        pixels = torch.zeros(1, 3, side, side)
        if pictures:
            pixels = torch.as_tensor(tools.process_images(pictures, processor, model.config))
        asked.append((ids, pixels.float()))
        with torch.inference_mode():
            logits = model(ids[None], images=asked[-1][1]).logits[0, -1]
            text = texts(model, tokenizer, asked[-1:], job["tokens"])[0]
        found.append({"ids": ids.tolist(), "logits": logits.tolist(), "text": text})
    with torch.inference_mode():
        batch = texts(model, tokenizer, asked, job["tokens"])
    Path(job["output"]).write_text(json.dumps({"answers": found, "batch": batch}))


def texts(model: Any, tokenizer: Any, asked: list[Any], tokens: int) -> list[str]:
    """Greedy answers to a batch of prompts that are padded on the left."""
    longest = max(len(ids) for ids, _ in asked)
    padded = torch.zeros(len(asked), longest, dtype=torch.long)
    mask = torch.zeros(len(asked), longest, dtype=torch.bool)
    for row, (ids, _) in enumerate(asked):
        padded[row, longest - len(ids) :] = ids
        mask[row, longest - len(ids) :] = True
    given = {"attention_mask": mask} if len(asked) > 1 else {}
    made = model.generate(
        padded,
        images=torch.cat([pixels for _, pixels in asked]),
        do_sample=False,
        max_new_tokens=tokens,
        use_cache=True,
        **given,
    )
    return [text.strip() for text in tokenizer.batch_decode(made, skip_special_tokens=True)]


def opened(file: str) -> Any:
    """A picture as LLaVA opens it."""
    from PIL import Image

    return Image.open(file).convert("RGB")


if __name__ == "__main__":
    main()
