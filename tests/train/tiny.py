"""A model of a few thousand parameters and random batches for it, made without any dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lapilli.data.batches.collate import Batch, BatchShape, collate
from lapilli.data.dataset.dataset import Sample
from lapilli.model.config import LanguageConfig, LoraConfig, ModelConfig, Part, VisionConfig
from lapilli.train.config import OptimConfig, RunConfig

IMAGE_SIZE, IMAGE_TOKENS, VOCABULARY = 16, 4, 48
SHAPE = BatchShape(rows=3, buckets=(16, 32), image_tokens=IMAGE_TOKENS, predict_chunk=8)


def model_config(
    *trainable: Part, tied: bool = False, lora: LoraConfig | None = None
) -> ModelConfig:
    """CLIP and Llama with every size as small as it can be."""
    return ModelConfig(
        vision=VisionConfig(
            vision_feature_layer=-2,
            settings={
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": IMAGE_SIZE,
                "patch_size": 8,
            },
        ),
        language=LanguageConfig(
            settings={
                "hidden_size": 24,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "vocab_size": VOCABULARY,
                "tie_word_embeddings": tied,
            }
        ),
        trainable=trainable or ("projector", "language"),
        lora=lora,
        head_chunk=8,
        seed=3,
    )


def run_config(
    model: ModelConfig, lr_by_part: dict[str, float] | None = None, **values: Any
) -> RunConfig:
    """A run of two workers, two micro-batches each, three rows a micro-batch."""
    optim = OptimConfig(lr=1e-3, lr_by_part=lr_by_part or {}, weight_decay=0.1, grad_clip=0.5)
    settings: dict[str, Any] = {
        "dataset": "", "output": "", "view": "", "global_batch_size": 12, "micro_batch_size": 3,
        "num_workers": 2, "optim": optim, **values,
    }  # fmt: skip
    return RunConfig(model=model, **settings)


def random_sample(name: str, generator: np.random.Generator, *, images: int) -> Sample:
    """A sample with images anywhere among its tokens and one or two trained stretches."""
    text = generator.integers(1, VOCABULARY, int(generator.integers(4, 12))).astype(np.int32)
    ids = np.insert(text, generator.integers(1, len(text), images), -200)
    # from one trained token to nearly all of them: micro-batches weigh very differently
    end = int(generator.integers(2, len(ids) + 1))
    start = int(generator.choice([1, max(1, end - 1)]))
    while -200 in ids[start:end]:
        start = int(np.flatnonzero(ids == -200).max()) + 1
        end = max(end, start + 1)
        ids = ids if end <= len(ids) else np.append(ids, np.int32(7))
    pixels = generator.integers(0, 256, (images, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.uint8)
    return Sample(name, ids, np.array([[start, end]], np.int32), pixels)


def random_steps(count: int, seed: int) -> list[list[list[Batch]]]:
    """[step][rank][micro] of batches.

    Every third step is text only, every fifth cut short to one micro-step; some batches are empty.
    """
    generator = np.random.default_rng(seed)
    steps: list[list[list[Batch]]] = []
    for step in range(count):
        most_images = 0 if step % 3 == 1 else 2
        micros = range(1 if step % 5 == 3 else 2)
        samples = [
            [_random_samples(generator, (step, rank, micro), most_images) for micro in micros]
            for rank in range(2)
        ]
        has_images = [any(len(s.pixels) for rank in samples for s in rank[k]) for k in micros]
        steps.append(
            [
                [
                    collate(rank[micro], SHAPE, IMAGE_SIZE, with_images=has_images[micro])
                    for micro in micros
                ]
                for rank in samples
            ]
        )
    return steps


def _random_samples(
    generator: np.random.Generator, place: tuple[int, int, int], most_images: int
) -> list[Sample]:
    rows = 0 if place == (2, 1, 1) else int(generator.integers(1, 4))
    return [
        random_sample(
            f"{place}/{row}", generator, images=int(generator.integers(0, most_images + 1))
        )
        for row in range(rows)
    ]


def global_tokens(ranks: Sequence[Sequence[Batch]]) -> int:
    """Trained tokens of a global batch."""
    return sum(batch.num_targets for micros in ranks for batch in micros)
