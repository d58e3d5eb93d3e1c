"""A run's settings as the version before settings were renamed and grouped wrote them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lapilli.train.run_folder.names import CONFIG

__all__ = ["SETTINGS", "make_earlier", "write_earlier"]

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


def write_earlier(
    checkpoint: Path, weights: Mapping[str, torch.Tensor], *, moments: bool = True
) -> None:
    """Write a checkpoint's files over as the version before parts did: all weights in one file."""
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    for name in ("layout", "shapes", "weights"):
        state.pop(name)
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()
    state["files"] = {}
    tensors = {"weights": dict(weights)}
    if moments:
        both = [(n, v, m) for n, v in weights.items() for m in ("exp_avg", "exp_avg_sq")]
        tensors["moments"] = {f"{name}/{moment}": value.square() for name, value, moment in both}
    for name, values in tensors.items():
        path = checkpoint / f"{name}.safetensors"
        save_file(values, path)
        data = path.read_bytes()
        state["files"][path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkpoint / "state.json").write_text(json.dumps(state), encoding="utf-8")
