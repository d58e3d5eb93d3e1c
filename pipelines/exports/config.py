"""Settings of `export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipelines.cli.trust_flags import TrustFlags

__all__ = ["ExportConfig"]


@dataclass(frozen=True)
class ExportConfig(TrustFlags):
    """What is written in which form.

    Attributes:
        to: `webdataset`: tars of the original images with the conversations as json, an epoch of
            each split. `hf`: a folder that transformers' LlavaForConditionalGeneration and its
            processor load. `llava`: LLaVA's checkpoint, which its `load_pretrained_model` loads,
            with a trained tower in `mm_vision_tower/`, and the projector as `mm_projector.bin`.
            Both have adapters merged into the weights. `peft`: the adapters by themselves, as
            PEFT and LLaVA load them, with whatever else learnt in `non_lora_trainables.bin`, and
            their base model in `base/` where it lies nowhere else. `basic_vlm`: adapters on a
            Qwen-1 as Basic-VLM has them, `adapter_model.bin` and `other_params.bin`.
        output: Folder or address to write, by one process at a time; a model's must be empty or
            not there.
        run: Folder or address of a training run; its newest checkpoint is taken.
        dtype: Of a model's weights; an adapter's stay float32.
        shard_size: Most bytes in one file of weights, such as `5GB`.
        files: Form of `llava`'s weights: `safetensors`, or `bin`, which older programs read.
        dataset: Folder or address of a dataset.
        root: Folder or address of its annotations and images; empty for where it was made of.
        samples_per_tar: Samples in a tar.
    """

    to: str
    output: str
    run: str = ""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    shard_size: str = "5GB"
    files: Literal["safetensors", "bin"] = "safetensors"
    dataset: str = ""
    root: str = ""
    samples_per_tar: int = 10_000
