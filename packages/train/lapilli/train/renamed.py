"""Names that settings of a run had in earlier versions (see `lapilli.data.renamed`)."""

from __future__ import annotations

from lapilli.data.renamed import Renamed

__all__ = ["RUN_NAMES"]

RUN_NAMES = Renamed(
    {
        "workers": "num_workers",
        "global_batch": "global_batch_size",
        "micro_batch": "micro_batch_size",
        "start_from": "init_from",
        "policy": "sampler",
        "buckets": "max_shapes",
        "loss": "loss_reduction",
        "optim.lrs": "optim.lr_by_part",
        "model.loss": "model.kernels",
        "model.gradient_checkpointing": "memory",
        "model.vision.layer": "model.vision.vision_feature_layer",
        "model.vision.features": "model.vision.vision_feature_select_strategy",
        "save_every": "checkpoint.every",
        "keep": "checkpoint.keep_last",
        "milestone_every": "checkpoint.archive_every",
        "mirror": "checkpoint.upload",
        "eval_every": "validation.every",
        "eval_samples": "validation.samples",
        "eval_dataset": "validation.dataset",
        "generate_every": "validation.answers_every",
        "generate_samples": "validation.answers",
        "generate_tokens": "validation.answer_tokens",
        "max_failures": "recovery.max_failures",
        "min_workers": "recovery.min_workers",
        "hang_seconds": "recovery.step_timeout",
        "max_spike": "recovery.loss_spike_factor",
        "offload": "offload.to",
        "offload_path": "offload.nvme_path",
    },
    {
        "loss": {"tokens": "token_mean", "means": "micro_batch_mean"},
        "model.vision.features": {"patch": "default", "cls_patch": "full"},
        "model.gradient_checkpointing": {"True": "auto", "False": "auto"},
    },
)
