"""What LLaVA's published scripts give its trainer, and the trainer's own flags, as tables.

Read from haotian-liu/LLaVA at the commit below; `script` writes one in that form.
"""

from __future__ import annotations

__all__ = ["COMMIT", "DEFAULTS", "REPOSITORY", "SCRIPTS", "script"]

REPOSITORY = "haotian-liu/LLaVA"
COMMIT = "c121f0432da27facab705978f83c4ada465e46fd"

EVERY = {
    "mm_vision_select_layer": "-2", "mm_use_im_start_end": "False",
    "mm_use_im_patch_token": "False", "bf16": "True", "num_train_epochs": "1",
    "per_device_train_batch_size": "16", "per_device_eval_batch_size": "4",
    "gradient_accumulation_steps": "1", "evaluation_strategy": "no", "save_strategy": "steps",
    "save_steps": "50000", "save_total_limit": "1", "learning_rate": "2e-5", "weight_decay": "0.",
    "warmup_ratio": "0.03", "lr_scheduler_type": "cosine", "logging_steps": "1", "tf32": "True",
    "model_max_length": "2048", "gradient_checkpointing": "True", "dataloader_num_workers": "4",
    "lazy_preprocess": "True", "report_to": "wandb", "version": "v1",
}  # fmt: skip
FIVE = {
    **EVERY, "deepspeed": "./scripts/zero3.json", "model_name_or_path": "lmsys/vicuna-13b-v1.5",
    "data_path": "./playground/data/llava_v1_5_mix665k.json", "image_folder": "./playground/data",
    "vision_tower": "openai/clip-vit-large-patch14-336", "mm_projector_type": "mlp2x_gelu",
    "image_aspect_ratio": "pad", "group_by_modality_length": "True",
}  # fmt: skip
LORA = {
    "lora_enable": "True", "lora_r": "128", "lora_alpha": "256", "mm_projector_lr": "2e-5",
    "learning_rate": "2e-4",
}  # fmt: skip
STAGE_2 = ("image_aspect_ratio", "group_by_modality_length")
BEFORE = {"pretrain_mm_mlp_adapter": "./checkpoints/llava-v1.5-13b-pretrain/mm_projector.bin"}
TASK = {"model_name_or_path": "liuhaotian/llava-v1.5-13b"}
FIRST = {
    **EVERY, "deepspeed": "./scripts/zero2.json",
    "model_name_or_path": "./checkpoints/$MODEL_VERSION",
    "image_folder": "/path/to/coco/train2017", "vision_tower": "openai/clip-vit-large-patch14",
    "version": "$PROMPT_VERSION", "data_path": "./playground/data/llava_instruct_80k.json",
    "pretrain_mm_mlp_adapter": "./checkpoints/llava-$MODEL_VERSION-pretrain/mm_projector.bin",
    "output_dir": "./checkpoints/llava-$MODEL_VERSION-finetune",
}  # fmt: skip
STAGE_1 = {
    **{name: value for name, value in FIRST.items() if name != "pretrain_mm_mlp_adapter"},
    "data_path": "/path/to/pretrain_data.json", "image_folder": "/path/to/images",
    "tune_mm_mlp_adapter": "True", "output_dir": "./checkpoints/llava-$MODEL_VERSION-pretrain",
    "save_steps": "24000", "learning_rate": "2e-3",
}  # fmt: skip
ADAPTED = {"lora_enable": "True", "output_dir": "./checkpoints/llava-$MODEL_VERSION-finetune_lora"}
SCRIPTS: dict[str, dict[str, str]] = {
    "v1_5/pretrain": {
        **{n: v for n, v in FIVE.items() if n not in STAGE_2},
        "deepspeed": "./scripts/zero2.json", "version": "plain", "tune_mm_mlp_adapter": "True",
        "data_path": "./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
        "image_folder": "./playground/data/LLaVA-Pretrain/images",
        "output_dir": "./checkpoints/llava-v1.5-13b-pretrain",
        "per_device_train_batch_size": "32", "save_steps": "24000", "learning_rate": "1e-3",
    },
    "v1_5/finetune": {**FIVE, **BEFORE, "output_dir": "./checkpoints/llava-v1.5-13b"},
    "v1_5/finetune_lora": {
        **FIVE, **BEFORE, **LORA, "output_dir": "./checkpoints/llava-v1.5-13b-lora"
    },
    "v1_5/finetune_task": {**FIVE, **TASK, "output_dir": "./checkpoints/llava-v1.5-13b-task"},
    "v1_5/finetune_task_lora": {
        **FIVE, **TASK, **LORA, "output_dir": "./checkpoints/llava-v1.5-13b-task-lora"
    },
    "pretrain": STAGE_1,
    "pretrain_xformers": {
        **STAGE_1, "bf16": "False", "tf32": "False", "per_device_train_batch_size": "4",
        "gradient_accumulation_steps": "4",
    },
    "finetune": FIRST,
    "finetune_full_schedule": {
        **FIRST, "data_path": "./playground/data/llava_instruct_158k.json", "num_train_epochs": "3"
    },
    "finetune_lora": {**FIRST, **ADAPTED},
    "finetune_qlora": {**FIRST, **ADAPTED, "bits": "4"},
    "finetune_sqa": {
        **FIRST, "model_name_or_path": "lmsys/vicuna-13b-v1.3", "num_train_epochs": "12",
        "data_path": "/Data/ScienceQA/data/scienceqa/llava_train_QCM-LEA.json",
        "image_folder": "/Data/ScienceQA/data/scienceqa/images/train",
        "pretrain_mm_mlp_adapter": "./checkpoints/huggingface/liuhaotian/"
        "llava-pretrain-vicuna-13b-v1.3/mm_projector.bin",
        "output_dir": "./checkpoints/llava-vicuna-13b-v1.3-pretrain_lcs558k_plain-"
        "ScienceQA_QCM_LEA-12e",
    },
}  # fmt: skip

# llava/train/train.py: the fields of its three classes, with their defaults.
DEFAULTS: dict[str, dict[str, object]] = {
    "ModelArguments": {
        "model_name_or_path": "facebook/opt-125m", "version": "v0", "freeze_backbone": False,
        "tune_mm_mlp_adapter": False, "vision_tower": None, "mm_vision_select_layer": -1,
        "pretrain_mm_mlp_adapter": None, "mm_projector_type": "linear",
        "mm_use_im_start_end": False, "mm_use_im_patch_token": True,
        "mm_patch_merge_type": "flat", "mm_vision_select_feature": "patch",
    },
    "DataArguments": {
        "data_path": None, "lazy_preprocess": False, "is_multimodal": False,
        "image_folder": None, "image_aspect_ratio": "square",
    },
    "TrainingArguments": {
        "cache_dir": None, "optim": "adamw_torch", "remove_unused_columns": False,
        "freeze_mm_mlp_adapter": False, "mpt_attn_impl": "triton", "model_max_length": 512,
        "double_quant": True, "quant_type": "nf4", "bits": 16, "lora_enable": False,
        "lora_r": 64, "lora_alpha": 16, "lora_dropout": 0.05, "lora_weight_path": "",
        "lora_bias": "none", "mm_projector_lr": None, "group_by_modality_length": False,
    },
}  # fmt: skip


def script(flags: dict[str, str], launcher: str = "deepspeed llava/train/train_mem.py") -> str:
    """A script with these flags, a continued line each, and what the published ones have above."""
    above = [
        "#!/bin/bash",
        "",
        "# Uncomment and set the following variables",
        "# PROMPT_VERSION=v1",
    ]
    lines = [launcher, *(f'    --{name} "{value}"' for name, value in flags.items())]
    return "\n".join([*above, "", " \\\n".join(lines), ""])
