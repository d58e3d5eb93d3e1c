"""Compare a run's longest sequences with its language model's positions."""

from __future__ import annotations

from collections.abc import Callable

from lapilli.data.dataset.dataset import Dataset
from lapilli.model.parts.positions import positions_of
from lapilli.model.vlm import VisionLanguageModel
from lapilli.train.config import RunConfig
from lapilli.train.errors import TrainError
from lapilli.train.validation.validation_loss import held_out_buckets

__all__ = ["check_context"]


def check_context(
    model: VisionLanguageModel,
    config: RunConfig,
    dataset: Dataset,
    held_out: Dataset | None,
    on_note: Callable[[str], None],
) -> None:
    """Compare the longest samples, as they are padded, with the positions there are.

    Args:
        model: The run's model; its shapes are enough.
        config: Its settings.
        dataset: The training data.
        held_out: The validation data, if any.
        on_note: Called with a line for a model that goes beyond its positions untrained.

    Raises:
        TrainError: The model cannot go beyond them; names both numbers.
    """
    known = positions_of(model.language)
    if known is None:
        return
    longest = int(dataset.lengths.max())
    rows = [("sample", longest, -(-longest // 8) * 8, 8)]  # shapes are multiples of 8
    if held_out is not None:
        longest = int(held_out.lengths.max())
        rows.append(("held-out sample", longest, held_out_buckets(longest)[-1], 32))
    if config.is_static:
        rows = [(what, longest, config.max_length, 1) for what, longest, *_ in rows]
    for what, length, padded, step in rows:
        if known.is_fixed and padded > known.limit:
            as_padded = f", {padded} as it is padded" if padded > length else ""
            raise TrainError(
                f"max_length: the longest {what} has {length} tokens{as_padded}; the language "
                f"model has {known.limit} positions and cannot go beyond; set max_length: "
                f"{max(1, known.limit // step * step)}, or take another language model"
            )
        if length > known.limit:
            on_note(
                f"the longest {what} has {length} tokens, the language model was made for "
                f"{known.limit} positions: it learns the others from this dataset alone; lower "
                "max_length to leave longer samples out"
            )
