"""Check that a run's token ids keep their meaning when tokens were added to its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lapilli.data.dataset.tokenizer_copy import TOKENIZER
from lapilli.data.errors import DataError
from lapilli.data.text.encode import load_tokenizer, tokenizer_facts
from lapilli.train.checkpoint.find import Checkpoint
from lapilli.train.run_folder.names import DATA

__all__ = ["extends", "keeps_ids"]

OWN = ("added_tokens", "truncation", "padding")  # of a tokenizer's file; the rest says what ids are


def keeps_ids(start: Checkpoint, tokenizer: Any) -> bool:
    """Whether a tokenizer is that of an earlier run with tokens added.

    Args:
        start: The earlier run's checkpoint. Its tokenizer is looked for in its run's folder and in
            its dataset's; one that is another now does not count.
        tokenizer: transformers' tokenizer.
    """
    runs = (start.path.parent.parent, start.path)  # a milestone keeps its own
    dataset: object = start.state.config.get("dataset", "")
    places = [*(run / DATA for run in runs), Path(str(dataset))]
    for folder in [place / TOKENIZER for place in places]:
        try:
            if not folder.is_dir():
                continue
            old = load_tokenizer(folder)
            if tokenizer_facts(old).fingerprint == start.state.data.tokenizer:
                return extends(tokenizer, old)
        except (DataError, OSError):
            continue  # the caller refuses what cannot be told
    return False


def extends(new: Any, old: Any) -> bool:
    """Whether a tokenizer of transformers writes the ids of another, but for tokens it has more.

    Told of tokenizers that the tokenizers library runs; of others False.
    """
    states: list[dict[str, Any]] = []
    for tokenizer in (new, old):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            return False
        states.append(json.loads(backend.to_str()))
    here, there = states
    if any(here[key] != there[key] for key in there.keys() - {*OWN}):
        return False
    return all(token in here["added_tokens"] for token in there["added_tokens"])
