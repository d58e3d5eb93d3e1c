"""Answer with the most common training answer to the same question, without looking."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lapilli.train.inference.evaluate import Answer

__all__ = ["blind_answers"]

MARKER = "<image>"


def blind_answers(annotations: Path, answers: Sequence[Answer]) -> list[Answer]:
    """The same questions, each answered with its commonest answer in the training data.

    Args:
        annotations: The training data, LLaVA's JSON.
        answers: What a model answered; only the questions are looked at.

    Returns:
        One answer a question; to a question that training never asked, the commonest of all.
    """
    records: list[dict[str, Any]] = json.loads(annotations.read_text(encoding="utf-8"))
    by_question: defaultdict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for record in records:
        turns = [turn["value"].replace(MARKER, "").strip() for turn in record["conversations"]]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            by_question[question][answer] += 1
            overall[answer] += 1
    return [
        replace(one, given=by_question.get(one.question, overall).most_common(1)[0][0])
        for one in answers
    ]
