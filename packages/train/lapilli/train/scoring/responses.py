"""A model's response to a question beside what is expected, and the scores of many. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lapilli.data.record import excerpt
from lapilli.train.errors import TrainError

__all__ = ["Response", "ScoreTable", "binary_metrics", "require", "tabulate"]

OTHER = "other"  # what was given where it is none of the classes


@dataclass(frozen=True)
class Response:
    """What was asked, expected and given.

    Attributes:
        question_id: Names the question in its file; a sample's id for a dataset's.
        question: The user's words.
        given: The model's answer.
        expected: The answers that people gave; several for VQA, none for a hidden test set.
        category: What its accuracy is counted under.
        image: The image's file name.
        index: The sample of a dataset whose images were shown; -1 for a question of a file.
        logits: By choice, where the model chose among some.
    """

    question_id: str | int
    question: str
    given: str
    expected: tuple[str, ...] = ()
    category: str = ""
    image: str = ""
    index: int = -1
    logits: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class ScoreTable:
    """What a scorer found.

    Attributes:
        scorer: Its name.
        metrics: By name; the first is what the scorer is about.
        by_category: Mean score of each category.
        scores: Of each response, 0 to 1.
        confusion: Expected class to given class to count; empty for answers without classes.
    """

    scorer: str
    metrics: dict[str, float]
    by_category: dict[str, float]
    scores: list[float]
    confusion: dict[str, dict[str, int]]


def tabulate(
    scorer: str,
    responses: Sequence[Response],
    scores: Sequence[float],
    *,
    metric: str = "accuracy",
    classes: Sequence[tuple[str, str | None]] = (),
    metrics: Mapping[str, float] | None = None,
) -> ScoreTable:
    """The table of scores.

    Args:
        scorer: Its name.
        responses: What was scored.
        scores: Of each.
        metric: What their mean is called.
        classes: Expected and given class of each, None for a given answer of no class.
        metrics: Others, behind the mean.
    """
    by_category: defaultdict[str, list[float]] = defaultdict(list)
    for response, score in zip(responses, scores, strict=True):
        by_category[response.category].append(score)
    confusion: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for expected, given in classes:
        confusion[expected][OTHER if given is None else given] += 1
    return ScoreTable(
        scorer=scorer,
        metrics={metric: _mean(scores), **(metrics or {})},
        by_category={name: _mean(found) for name, found in sorted(by_category.items())},
        scores=[*scores],
        confusion={name: dict(counts) for name, counts in sorted(confusion.items())},
    )


def binary_metrics(pairs: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    """TP, FP, TN, FN, precision, recall, F1 and the share answered yes.

    As the POPE benchmark reports them (Li et al., 2023, arXiv 2305.10355, and its `evaluate.py`):
    precision TP / (TP + FP), recall TP / (TP + FN), F1 their harmonic mean. One without a
    denominator is 0, where that program divides by zero.

    Args:
        pairs: Whether yes was expected, and whether it was given.
    """
    counts = Counter(pairs)
    tp, fp = counts[True, True], counts[False, True]
    tn, fn = counts[False, False], counts[True, False]
    precision, recall = _share(tp, tp + fp), _share(tp, tp + fn)
    return {
        "precision": precision,
        "recall": recall,
        "f1": _share(2 * precision * recall, precision + recall),
        "yes_share": _share(tp + fp, len(pairs)),
        "tp": tp, "fp": fp, "tn": tn, "fn": fn,
    }  # fmt: skip


def require(scorer: str, responses: Sequence[Response], bad: Sequence[str], expected: str) -> None:
    """Refuse answers of another kind than a scorer is for.

    Args:
        scorer: Its name.
        responses: All of them.
        bad: What is wrong with each that is, its question's id in front.
        expected: What the scorer takes.

    Raises:
        TrainError: There is one; says how many and shows the first.
    """
    if not responses:
        raise TrainError(f"scorers: {scorer} has nothing to score; expected at least one answer")
    if bad:
        raise TrainError(
            f"scorers: {scorer} is for {expected}; {len(bad)} of {len(responses)} questions have "
            f"something else, first {excerpt(bad[0])}; choose another scorer"
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
