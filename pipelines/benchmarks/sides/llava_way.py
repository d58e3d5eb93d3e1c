"""What LLaVA-1.5's dataset does for a sample, written anew: the feed's yardstick.

Pixels by PIL and transformers' CLIP processor, ids by the tokenizer at every access. The tokenizer
is the fast one here, LLaVA's script takes the slow one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lapilli.data.text.encode import load_tokenizer

__all__ = ["LlavaSamples"]

OPENING = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IGNORED, IMAGE = -100, -200


class LlavaSamples(Dataset[dict[str, Tensor]]):
    """Elements of a LLaVA annotation file, everything done when one is asked for."""

    def __init__(
        self, elements: list[dict[str, Any]], root: Path, tokenizer: str, side: int
    ) -> None:
        from transformers import CLIPImageProcessorPil

        self.elements = elements
        self.root = root
        self.tokenizer: Any = load_tokenizer(tokenizer)
        self.side = side
        square = {"height": side, "width": side}
        self.processor: Any = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square)

    def __len__(self) -> int:
        """Number of elements."""
        return len(self.elements)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Ids, labels and normalised pixels; zeros where there is no image."""
        element = self.elements[index]
        if "image" in element:
            with Image.open(self.root / element["image"]) as opened:
                square = self._square(opened.convert("RGB"))
            pixels = self.processor(square, return_tensors="pt")["pixel_values"][0]
        else:
            pixels = torch.zeros(3, self.side, self.side)
        ids, labels = self._tokens(element["conversations"])
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "images": pixels}

    def _square(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        side = max(width, height)
        colour = tuple(int(255 * value) for value in self.processor.image_mean)
        canvas = Image.new("RGB", (side, side), colour)  # type: ignore[arg-type]
        canvas.paste(image, ((side - width) // 2, (side - height) // 2))
        return canvas

    def _tokens(self, turns: Sequence[dict[str, str]]) -> tuple[list[int], list[int]]:
        """The whole text's ids, then each round's again to find its answer."""
        rounds = [
            (f"USER: {asked['value']} ASSISTANT: ", f"{answer['value']}</s>")
            for asked, answer in zip(turns[::2], turns[1::2], strict=True)
        ]
        ids = self._encode(f"{OPENING} " + "".join(asked + answer for asked, answer in rounds))
        labels = list(ids)
        place = len(self._encode(f"{OPENING} "))
        labels[:place] = [IGNORED] * place
        for asked, answer in rounds:
            question, whole = len(self._encode(asked)), len(self._encode(asked + answer))
            labels[place : place + question] = [IGNORED] * min(question, len(ids) - place)
            place += whole
        return ids, labels

    def _encode(self, text: str) -> list[int]:
        first, *others = text.split("<image>")
        ids: list[int] = self.tokenizer(first).input_ids
        for chunk in others:
            ids = [*ids, IMAGE, *self.tokenizer(chunk).input_ids[1:]]
        return ids

    def collate(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Rows padded to the longest."""
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([row["input_ids"] for row in rows], batch_first=True)
        labels = pad([row["labels"] for row in rows], batch_first=True, padding_value=IGNORED)
        images = torch.stack([row["images"] for row in rows])
        return {"input_ids": ids, "labels": labels, "images": images}
