"""AI Challenger's Chinese captions: a JSON array of `{image_id, caption: [five texts], url}`.

`image_id` is the file's name. The captions answer one of the recipe's `prompts`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from lapilli.data.config import SourceConfig
from lapilli.data.sources.captions import choose, draw_prompt, left_over
from lapilli.data.sources.reading import json_stream

__all__ = ["read"]

UNDERSTOOD = frozenset({"image_id", "caption"})


def read(config: SourceConfig, root: Path) -> Iterator[Any]:
    """An element a caption, or one an image; what has no captions comes as it is.

    Raises:
        DataError: A file is missing or no JSON.
    """
    for element in json_stream.read(config, root):
        fields = cast("dict[str, Any]", element) if isinstance(element, dict) else {}
        image, captions = fields.get("image_id"), fields.get("caption")
        if not isinstance(image, str) or not isinstance(captions, list) or not captions:
            yield element
            continue
        for number, caption in enumerate(choose(cast("list[Any]", captions), config, image)):
            yield {
                "id": image,
                "image": image,
                "question": draw_prompt(config, f"{image}/{number}"),
                "answer": caption,
                **left_over(fields, UNDERSTOOD),
            }
