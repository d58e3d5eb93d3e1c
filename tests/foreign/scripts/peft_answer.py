"""Adapters loaded by PEFT's own classes, and what the language model under them says.

python peft_answer.py JOBS.json

Each job has `path`, `quantized` (load the base in 4 bits), `ids` (prompts of unlike lengths),
`tokens` and `output`. The output gets each prompt's logits of the last position and greedy ids, and
the greedy ids of all in one batch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM
from transformers import BitsAndBytesConfig


def main() -> None:
    """Answer every job."""
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        given: dict[str, Any] = {"torch_dtype": torch.float32}
        if job["quantized"]:
            given["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32,
            )
        model = AutoPeftModelForCausalLM.from_pretrained(job["path"], **given).eval()
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False  # a kernel in bf16, on some processors
        found: list[dict[str, Any]] = []
        with torch.inference_mode():
            for ids in job["ids"]:
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
                made = greedy(model, [ids], job["tokens"])[0]
                found.append({"logits": logits.tolist(), "made": made})
            batch = greedy(model, job["ids"], job["tokens"])
        Path(job["output"]).write_text(json.dumps({"answers": found, "batch": batch}))


def greedy(model: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """As many tokens as asked for after each prompt, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    made = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
    )
    return made[:, longest:].tolist()


if __name__ == "__main__":
    main()
