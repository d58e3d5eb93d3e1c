"""What published examples of LLaMA-Factory and ms-swift set, and their defaults, as tables."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DEFAULTS", "EXAMPLES", "Example"]


@dataclass(frozen=True)
class Example:
    """An example.

    Attributes:
        where: Repository, commit and path.
        trainer: The table that holds its settings.
        settings: By name.
        environment: Variables of its command.
    """

    where: tuple[str, str, str]
    trainer: str
    settings: dict[str, str]
    environment: str = ""


FACTORY = "hiyouga/LLaMA-Factory", "ff6d4d12eeb035d6ce06805a5733dd7b29f2ac30"
SWIFT = "modelscope/ms-swift", "3602360a562313afbf2ef6065fdf61f271a2c5b9"

LLAVA = {
    "model_name_or_path": "llava-hf/llava-1.5-7b-hf", "trust_remote_code": "true", "stage": "sft",
    "do_train": "true", "finetuning_type": "lora", "lora_rank": "8", "lora_target": "all",
    "dataset": "mllm_demo", "template": "llava", "cutoff_len": "2048", "max_samples": "1000",
    "overwrite_cache": "true", "preprocessing_num_workers": "16", "dataloader_num_workers": "4",
    "output_dir": "saves/llava1_5-7b/lora/sft", "logging_steps": "10", "save_steps": "500",
    "plot_loss": "true", "overwrite_output_dir": "true", "save_only_model": "false",
    "per_device_train_batch_size": "1", "gradient_accumulation_steps": "8",
    "learning_rate": "1.0e-4", "num_train_epochs": "3.0", "lr_scheduler_type": "cosine",
    "warmup_ratio": "0.1", "bf16": "true", "ddp_timeout": "180000000",
    "resume_from_checkpoint": "null",
}  # fmt: skip
QWEN = {
    **{name: value for name, value in LLAVA.items() if name != "overwrite_cache"},
    "model_name_or_path": "Qwen/Qwen3-VL-4B-Instruct", "image_max_pixels": "262144",
    "video_max_pixels": "16384", "dataset": "mllm_demo,identity,alpaca_en_demo",
    "template": "qwen3_vl_nothink", "output_dir": "saves/qwen3-vl-4b/lora/sft",
    "report_to": "none",
}  # fmt: skip
QWEN_FULL = {
    **{name: value for name, value in QWEN.items() if not name.startswith("lora_")},
    "finetuning_type": "full", "freeze_vision_tower": "true",
    "freeze_multi_modal_projector": "true", "freeze_language_model": "false",
    "deepspeed": "examples/deepspeed/ds_z3_config.json", "gradient_accumulation_steps": "2",
    "learning_rate": "1.0e-5", "output_dir": "saves/qwen3-vl-4b/full/sft",
}  # fmt: skip

CAPTION = {
    "model": "Qwen/Qwen2.5-VL-7B-Instruct",
    "dataset": "modelscope/coco_2014_caption:validation#20000", "load_from_cache_file": "true",
    "split_dataset_ratio": "0.01", "tuner_type": "lora", "torch_dtype": "bfloat16",
    "num_train_epochs": "1", "per_device_train_batch_size": "1",
    "per_device_eval_batch_size": "1", "learning_rate": "1e-4", "lora_rank": "8",
    "lora_alpha": "32", "target_modules": "all-linear", "freeze_vit": "true",
    "freeze_aligner": "true", "gradient_accumulation_steps": "16", "eval_steps": "100",
    "save_steps": "100", "save_total_limit": "2", "logging_steps": "5", "max_length": "2048",
    "output_dir": "output", "warmup_ratio": "0.05", "dataloader_num_workers": "4",
}  # fmt: skip
OCR = {
    **CAPTION, "dataset": "AI-ModelScope/LaTeX_OCR:human_handwrite#20000", "eval_steps": "50",
    "save_steps": "50", "max_length": "4096",
}  # fmt: skip
WHOLE_VIT = {
    **{n: v for n, v in CAPTION.items() if n not in ("target_modules", "freeze_vit")},
    "dataset": "AI-ModelScope/coco#20000", "tuner_type": "lora_llm", "vit_lr": "1e-5",
    "aligner_lr": "1e-5", "lora_rank": "16", "gradient_accumulation_steps": "4",
    "max_length": "8192", "dataset_num_proc": "4", "deepspeed": "zero2", "save_only_model": "true",
}  # fmt: skip
del WHOLE_VIT["freeze_aligner"]
CHECKPOINTING = {
    **{n: v for n, v in CAPTION.items() if not n.startswith("lora_") and n != "target_modules"},
    "dataset": "swift/VideoChatGPT:all", "tuner_type": "full", "per_device_train_batch_size": "4",
    "per_device_eval_batch_size": "4", "learning_rate": "1e-5", "freeze_vit": "false",
    "freeze_aligner": "false", "gradient_accumulation_steps": "1",
    "gradient_checkpointing": "true", "vit_gradient_checkpointing": "true", "deepspeed": "zero3",
    "use_liger_kernel": "true", "attn_impl": "flash_attn", "padding_free": "true",
    "save_only_model": "true",
}  # fmt: skip

ONE = "CUDA_VISIBLE_DEVICES=0 MAX_PIXELS=1003520"
FOUR = "NPROC_PER_NODE=4 CUDA_VISIBLE_DEVICES=0,1,2,3"
MULTIMODAL = "examples/train/multimodal/"
EXAMPLES: dict[str, Example] = {
    "llava_lora": Example(
        (
            FACTORY[0], "7b985f55dbe51a525ab58678730426366d361d62",
            "examples/train_lora/llava1_5_lora_sft.yaml",
        ),
        "llama_factory", LLAVA,
    ),
    "qwen3vl_lora": Example(
        (*FACTORY, "examples/train_lora/qwen3vl_lora_sft.yaml"), "llama_factory", QWEN
    ),
    "qwen3vl_full": Example(
        (*FACTORY, "examples/train_full/qwen3vl_full_sft.yaml"), "llama_factory", QWEN_FULL
    ),
    "caption": Example((*SWIFT, f"{MULTIMODAL}caption.sh"), "ms_swift", CAPTION, ONE),
    "ocr": Example((*SWIFT, f"{MULTIMODAL}ocr.sh"), "ms_swift", OCR, ONE),
    "lora_llm_full_vit": Example(
        (*SWIFT, f"{MULTIMODAL}lora_llm_full_vit/sft.sh"), "ms_swift", WHOLE_VIT, FOUR
    ),
    "vit_gradient_checkpointing": Example(
        (*SWIFT, f"{MULTIMODAL}vit_gradient_checkpointing.sh"), "ms_swift", CHECKPOINTING, FOUR
    ),
}  # fmt: skip

# Of their argument classes, those that decide what is trained.
DEFAULTS: dict[str, dict[str, object]] = {
    "llama_factory": {
        "dataset_dir": "data", "cutoff_len": 2048, "train_on_prompt": False, "val_size": 0.0,
        "packing": None, "neat_packing": False, "max_samples": None, "stage": "sft",
        "finetuning_type": "lora", "lora_alpha": None, "lora_dropout": 0.0, "lora_rank": 8,
        "lora_target": "all", "use_rslora": False, "freeze_vision_tower": True,
        "freeze_multi_modal_projector": True, "freeze_language_model": False,
        "quantization_bit": None, "quantization_type": "nf4", "double_quantization": True,
        "image_max_pixels": 768 * 768, "image_min_pixels": 32 * 32, "enable_liger_kernel": False,
    },
    "ms_swift": {
        "tuner_type": "lora", "freeze_llm": False, "freeze_vit": True, "freeze_aligner": True,
        "target_modules": "all-linear", "lora_rank": 8, "lora_alpha": 32, "lora_dropout": 0.05,
        "lora_bias": "none", "use_rslora": False, "split_dataset_ratio": 0.0, "data_seed": 42,
        "packing": False, "torch_dtype": None, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": None, "learning_rate": None, "weight_decay": 0.1,
        "adam_beta2": 0.95, "lr_scheduler_type": "cosine", "report_to": "tensorboard",
        "use_liger_kernel": False, "vit_lr": None, "aligner_lr": None, "warmup_ratio": 0.0,
        "sequence_parallel_size": 1, "padding_free": False, "gradient_checkpointing": True,
    },
}  # fmt: skip
