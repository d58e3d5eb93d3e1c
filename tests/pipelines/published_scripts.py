"""What the published scripts of four systems give their trainers: flag, value, repository, commit.

The fifth, amirarsalan90/vlm_training, has no script: its settings are in Python, and its recipes
are compared with them in test_recipe_tables.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.pipelines.llava_scripts import FIVE, LORA, TASK

__all__ = ["SYSTEMS", "Published"]


@dataclass(frozen=True)
class Published:
    """A script.

    Attributes:
        where: Repository, commit and path.
        launcher: What starts the trainer.
        flags: The trainer's flags.
        trainer: The table that holds them.
    """

    where: tuple[str, str, str]
    launcher: str
    flags: dict[str, str]
    trainer: str


VISPER = "SHI-Labs/VisPer-LM", "f7baf3bb41bddecd01d45f4bcb00ffb7b935b013"
GAUDI = "intel/intel-extension-for-transformers"
GAUDI_PATH = "intel_extension_for_transformers/neural_chat/examples/finetuning/multi_modal/scripts/"
ICM = "zhaoyuzhi/ICM-Assistant", "9b3cf21182fb7a26773c351bee9f1205bd4bfcb8"
BASIC = "xinyanghuang7/Basic-Vision-Language-Model", "559d07ca75a3751c427d7990fe0b598de4b68f14"
SPAWN = (
    "PT_HPU_MAX_COMPOUND_OP_SIZE=10 DEEPSPEED_HPU_ZERO3_SYNC_MARK_STEP_REQUIRED=1 \\\n"
    "python3 ./gaudi_spawn.py --use_deepspeed --world_size 4 \\\n    train.py"
)
STAGE_2 = {"image_aspect_ratio", "group_by_modality_length"}

VISPER_IFT = {
    **FIVE, "deepspeed": "./scripts/zero2.json", "version": "llava_llama_3",
    "model_name_or_path": "outputs/pretrain_dsg_VisPer-LM-CLIP-ViT-Llama3-8b",
    "data_path": "datasets/llava_v1_5_mix665k.json", "image_folder": "datasets/",
    "output_dir": "outputs/VisPer-LM-CLIP-ViT-Llama3-8b", "save_steps": "200",
    "save_total_limit": "3", "model_max_length": "4096",
}  # fmt: skip
VISPER_PT = {
    **{name: value for name, value in VISPER_IFT.items() if name not in STAGE_2},
    "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct", "mode": "gen-depth-seg",
    "layer_indices": "d18-20_s10-18_g12-20", "num_task_tokens": "8",
    "loss_weights": "d0.5_s0.5_g0.5", "contrastive_loss_weight": "0.3",
    "image_generator": "stabilityai/stable-diffusion-2-1-unclip",
    "image_segmentor": "shi-labs/oneformer_coco_swin_large",
    "depth_estimator": "depth_anything_v2_vitl.pth", "tune_mm_mlp_adapter": "True",
    "data_path": "datasets/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
    "image_folder": "datasets/LLaVA-Pretrain/images",
    "output_dir": "outputs/pretrain_dsg_VisPer-LM-CLIP-ViT-Llama3-8b",
    "per_device_train_batch_size": "32", "learning_rate": "1e-3",
}  # fmt: skip
VISPER_VPT = {
    **VISPER_IFT, "data_path": "datasets/allava/ALLaVA-Caption.json",
    "image_folder": "datasets/allava",
    "output_dir": "outputs/v-pretrain_VisPer-LM-CLIP-ViT-Llama3-8b",
}  # fmt: skip
VISPER_VPT_IFT = {
    **VISPER_IFT, "model_name_or_path": "outputs/v-pretrain_VisPer-LM-CLIP-ViT-Llama3-8b",
    "output_dir": "outputs/vpt_VisPer-LM-CLIP-ViT-Llama3-8b",
}  # fmt: skip
GAUDI_STAGE_2 = {
    **{name: value for name, value in FIVE.items() if name not in {"version", "tf32"}},
    "model_name_or_path": "mistralai/Mistral-7B-v0.1", "template": "v1",
    "data_path": "./finetuning_data/llava_v1_5_mix665k.json",
    "image_folder": "./finetuning_data/",
    "pretrain_mm_mlp_adapter": "llava-v1.5-mistral-7b-pretrain/mm_projector.bin",
    "output_dir": "./checkpoints/llava-v1.5-13b", "per_device_train_batch_size": "2",
    "gradient_accumulation_steps": "8", "group_by_modality_length": "False", "pad_max": "True",
    "use_habana": "True", "use_lazy_mode": "True",
}  # fmt: skip
GAUDI_STAGE_1 = {
    **{
        name: value
        for name, value in GAUDI_STAGE_2.items()
        if name not in STAGE_2 | {"pretrain_mm_mlp_adapter", "pad_max"}
    },
    "deepspeed": "scripts/zero2.json", "template": "plain", "tune_mm_mlp_adapter": "True",
    "data_path": "./pretraining_data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
    "image_folder": "./pretraining_data/LLaVA-Pretrain/images",
    "output_dir": "./llava-v1.5-mistral-7b-pretrain", "save_steps": "24000",
    "learning_rate": "1e-3",
}  # fmt: skip
ICM_FULL = {
    **FIVE, **TASK, "data_path": "./playground/data/icm_llava_train.json",
    "output_dir": "./checkpoints/icm_llava_train",
}  # fmt: skip
BASIC_FLAGS = {
    "lora_rank": "128", "lora_dropout": "0.10", "per_device_train_batch_size": "4",
    "gradient_accumulation_steps": "1", "num_train_epochs": "2", "save_steps": "1000",
    "save_total_limit": "5", "learning_rate": "3e-5", "seed": "42",
    "ddp_find_unused_parameters": "False", "feature_proj_lr": "1e-4",
    "remove_unused_columns": "false", "logging_steps": "100",
    "output_dir": "./weights/train_V1_5", "target_modules": "c_attn|w1|w2",
    "image_map": "/home/u2023111315/Basic-Vision-Language-Model/data/image_map_b.json",
    "captions_file": "/home/u2023111315/Basic-Vision-Language-Model/data/captions_b.json",
}  # fmt: skip

DEEPSPEED = "deepspeed ola_vlm/train/train_mem.py"
SYSTEMS: dict[str, Published] = {
    "visper_lm/pretrain": Published(
        (*VISPER, "scripts/train/pretrain.sh"), "deepspeed ola_vlm/train/ola_vlm_train_mem.py",
        VISPER_PT, "visper_lm_pretrain",
    ),
    "visper_lm/finetune": Published(
        (*VISPER, "scripts/train/finetune.sh"), DEEPSPEED, VISPER_IFT, "visper_lm"
    ),
    "visper_lm/vpt": Published(
        (*VISPER, "scripts/train/vpt.sh"), DEEPSPEED, VISPER_VPT, "visper_lm"
    ),
    "visper_lm/vpt_ift": Published(
        (*VISPER, "scripts/train/vpt_ift.sh"), DEEPSPEED, VISPER_VPT_IFT, "visper_lm"
    ),
    "gaudi_llava/pretrain": Published(
        (GAUDI, "a446b256c6f87348af2e006accd76e3d74391617", f"{GAUDI_PATH}pretrain.sh"),
        SPAWN.partition("\n")[2], GAUDI_STAGE_1, "gaudi_llava",
    ),
    "gaudi_llava/finetune": Published(
        (GAUDI, "d7c179e82b394f9282f11f3c405064bfc1613f44", f"{GAUDI_PATH}finetune.sh"), SPAWN,
        GAUDI_STAGE_2, "gaudi_llava",
    ),
    "gaudi_llava/finetune_lora": Published(
        (GAUDI, "3466b4fc370885d9d6fadb47058fa35937413760", f"{GAUDI_PATH}finetune_lora.sh"), SPAWN,
        GAUDI_STAGE_2 | LORA | {"data_path": "finetuning_data/llava_v1_5_mix665k.json"},
        "gaudi_llava",
    ),
    "icm_instruct/csft": Published(
        (*ICM, "training_scripts/llava/finetune_task.sh"), "deepspeed llava/train/train_mem.py",
        ICM_FULL, "llava",
    ),
    "icm_instruct/lora": Published(
        (*ICM, "training_scripts/llava/finetune_task_lora.sh"),
        "deepspeed llava/train/train_mem.py",
        {**ICM_FULL, **LORA, "output_dir": "./checkpoints/icm_llava_train_lora"}, "llava",
    ),
    "basic_vlm/train": Published(
        (*BASIC, "train.sh"),
        "CUDA_VISIBLE_DEVICES=0 torchrun --nproc_per_node=1 --master_port=25642 train.py",
        BASIC_FLAGS, "basic_vlm",
    ),
}  # fmt: skip
