"""A run's settings as the version before settings were renamed and grouped wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lapilli.train.run_folder.names import CONFIG

__all__ = ["SETTINGS", "make_earlier"]

SETTINGS: dict[str, Any] = json.loads("""{
 "dataset": "in", "output": "out", "view": "pad32",
 "model": {
  "vision": {
   "tower": "clip", "pretrained": "",
   "settings": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 32, "patch_size": 16},
   "layer": -1, "features": "cls_patch", "image_size": 0,
   "mean": [0.9, 0.9, 0.9], "std": [2.0, 2.0, 2.0], "allow_pickle": false
  },
  "language": {
   "model_type": "llama", "pretrained": "",
   "settings": {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 512},
   "attention": "auto", "allow_pickle": false, "trust_remote_code": false, "vocab_size": 0,
   "quantize": "none"
  },
  "projector": "mlp2x_gelu", "projector_std": null, "trainable": ["vision", "projector"],
  "lora": null, "gradient_checkpointing": false, "merge": "torch", "loss": "torch",
  "dtype": "fp32", "head_chunk": 128, "seed": 0
 },
 "global_batch": 8, "micro_batch": 4,
 "optim": {"lr": 0.0015, "lrs": {"projector": 0.01}, "schedule": "cosine", "warmup_ratio": 0.03,
  "warmup_steps": 0, "weight_decay": 0.01, "betas": [0.9, 0.98], "grad_clip": 1.0},
 "start_from": "", "epochs": 6, "max_steps": 2, "max_length": 512, "truncate": null,
 "policy": "random", "group_by_modality_length": null, "llava_processes": 0,
 "remainder": "auto", "loss": "means", "seed": 42, "zero_stage": 2, "offload": "cpu",
 "offload_path": "", "precision": "fp32", "workers": 1, "device": "cpu",
 "launcher": "process", "save_every": 7, "keep": 3, "milestone_every": 2, "mirror": "",
 "max_failures": 4, "buckets": 9, "min_workers": 1, "hang_seconds": 500.0, "max_spike": 90.0,
 "loggers": [], "eval_every": 0, "eval_samples": 255, "eval_dataset": "other",
 "generate_every": 0, "generate_samples": 7, "generate_tokens": 127
}""")


def make_earlier(run: Path, settings: dict[str, Any]) -> None:
    """Write a run's settings as the earlier version did, wherever they stand in its folder."""
    for path in run.rglob(CONFIG):
        if path.parent == run or (path.parent / "state.json").exists():
            path.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    for path in run.rglob("state.json"):
        state = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**state, "config": settings}, indent=1), encoding="utf-8")
