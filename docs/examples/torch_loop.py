"""A training loop of your own in plain PyTorch: no Ray, no DeepSpeed, no recipe."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lapilli.data import (
    BuildConfig,
    ImageSpec,
    SourceConfig,
    build,
    open_dataset,
    plan_build,
    run_here,
    torch_loader,
    train_tokenizer,
)
from lapilli.model import LanguageConfig, ModelConfig, VisionConfig, build_model

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def make_dataset() -> None:
    """Eight plain photos and a table that says their colour."""
    Path("photos").mkdir()
    lines = ["image,question,answer"]
    for number in range(8):
        colour = ("red", "green", "blue", "white")[number % 4]
        Image.new("RGB", (40, 30), colour).save(f"photos/{number}.png")
        lines.append(f"{number}.png,Which colour?,{colour}")
    Path("photos/captions.csv").write_text("\n".join(lines))
    train_tokenizer(lines, "tokenizer", vocab_size=300)
    config = BuildConfig(
        root="photos",
        output="dataset",
        sources=[SourceConfig("captions", "captions.csv", format="csv")],
        tokenizer="tokenizer",
        template="plain",
        views={"pad32": ImageSpec(32, (122, 116, 104))},
    )
    build(plan_build(config), runner=run_here)


def train(epochs: int) -> list[float]:
    """The loss of each step."""
    tower = {**SMALL, "image_size": 32, "patch_size": 16}
    model = build_model(
        ModelConfig(
            VisionConfig("clip", settings=tower, vision_feature_layer=-1),
            LanguageConfig("llama", settings={**SMALL, "vocab_size": 300}),
            trainable=("vision", "projector", "language"),
        )
    )
    dataset = open_dataset("dataset", view="pad32", image_tokens=model.vision.num_tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses: list[float] = []
    for epoch in range(epochs):
        for batch in torch_loader(dataset, global_batch_size=4, epoch=epoch):
            loss = model(**batch) / (batch["targets"] >= 0).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    return losses


if __name__ == "__main__":
    make_dataset()
    losses = train(epochs=30)
    print(f"{len(losses)} steps, loss {losses[0]:.2f} -> {losses[-1]:.2f}")
