"""A step of transformers' Trainer on its own LLaVA model of the same sizes: a yardstick."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from lapilli.data.batches.collate import Batch
from lapilli.model.config import ModelConfig
from lapilli.train.device import peak_memory

__all__ = ["TrainerStep", "trainer_seconds"]


@dataclass(frozen=True)
class TrainerStep:
    """Median seconds of a step, and the most memory."""

    seconds: float
    memory: int


def trainer_seconds(
    shapes: ModelConfig,
    batch: Batch,
    steps: int,
    device: torch.device,
    accumulation: int = 1,
    *,
    folder: str,
    recomputes: bool = False,
) -> TrainerStep:
    """Time `steps` steps of one batch over and over, after two that are not timed."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model = _model(shapes, device)
    row = _inputs(batch, model)
    found: list[float] = []

    class Clock(TrainerCallback):
        started = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            found.append(time.perf_counter() - self.started)

    recompute: dict[str, Any] = {"gradient_checkpointing": True} if recomputes else {}
    arguments = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=1, gradient_accumulation_steps=accumulation, max_steps=steps + 2, report_to=[],
        remove_unused_columns=False, save_strategy="no", learning_rate=1e-5, max_grad_norm=1.0,
        optim="adamw_torch", disable_tqdm=True, logging_strategy="no",
        use_cpu=device.type == "cpu", bf16=device.type == "cuda",
        **recompute,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, data_collator=lambda rows: rows[0],
        train_dataset=[row] * (steps + 2) * accumulation, callbacks=[Clock()],  # type: ignore[arg-type]
    )  # fmt: skip
    trainer.train()
    return TrainerStep(statistics.median(found[2:]), peak_memory(device))


def _model(shapes: ModelConfig, device: torch.device) -> Any:
    """Transformers' LLaVA with the same parts learning."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    text = LlamaConfig(**shapes.language.settings)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shapes.vision.settings),
        text_config=text,
        image_token_index=text.vocab_size - 1,
        vision_feature_layer=shapes.vision.vision_feature_layer,
    )
    with device:
        model: Any = LlavaForConditionalGeneration(config)
    if device.type == "cuda":
        model.to(torch.bfloat16)
    learning = ("multi_modal_projector",)
    if "language" in shapes.trainable and not shapes.lora:
        learning += ("language_model", "lm_head")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in learning))
    if shapes.lora:
        from peft import LoraConfig, inject_adapter_in_model

        settings = LoraConfig(
            r=shapes.lora.rank,
            lora_alpha=shapes.lora.alpha,
            lora_dropout=shapes.lora.dropout,
            target_modules=r".*language_model.*_proj",
        )
        model = inject_adapter_in_model(settings, model)
        for name, parameter in model.named_parameters():
            if "multi_modal_projector" in name:
                parameter.requires_grad_(requires_grad=True)
    return model


def _inputs(batch: Batch, model: Any) -> dict[str, torch.Tensor]:
    """The same rows as transformers' model takes them; pixels come normalised."""
    ids, merge = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.merge_index)
    ids = torch.where(merge >= 0, model.config.image_token_index, ids)
    labels = torch.full_like(ids, -100)
    count = batch.num_targets
    places = torch.from_numpy(batch.predict_positions[:count] + 1)
    labels.view(-1)[places] = torch.from_numpy(batch.targets[:count])
    pixels = torch.from_numpy(batch.pixels).permute(0, 3, 1, 2).float() / 255
    return {
        "input_ids": ids,
        "attention_mask": torch.from_numpy(batch.segment_ids).long(),
        "labels": labels,
        "pixel_values": pixels.to(model.dtype),
    }
