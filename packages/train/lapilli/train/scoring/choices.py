"""Conclude from the logits of a few choices, and find the truth that they are scored against. Pure.

The share of a choice is its softmax among the choices; the first one is concluded if its share
reaches the threshold, else the likeliest of the others. With Yes and No that is ICM-Assistant's
`quick_eval` and `eval_icm_val`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lapilli.data.record import excerpt
from lapilli.train.errors import TrainError
from lapilli.train.scoring.answer_forms import exact_text
from lapilli.train.scoring.responses import Response

__all__ = [
    "category_of",
    "compiled",
    "conclude",
    "parse_choices",
    "require_threshold",
    "with_conclusions",
]


def parse_choices(text: str) -> tuple[str, ...]:
    """The choices of `Yes,No`.

    Raises:
        TrainError: One alone, an empty one, or one twice.
    """
    choices = tuple(part.strip() for part in text.split(","))
    if len(choices) < 2 or not all(choices) or len({*choices}) < len(choices):
        raise TrainError(
            f"choices: {excerpt(text)!r}; expected two or more that differ, as in Yes,No"
        )
    return choices


def require_threshold(threshold: float) -> None:
    """Refuse what is no share.

    Raises:
        TrainError: It is not between 0 and 1.
    """
    if not 0.0 <= threshold <= 1.0:
        raise TrainError(f"threshold: {threshold}; expected a share from 0 to 1")


def conclude(logits: Mapping[str, float], threshold: float) -> tuple[float, str]:
    """The share of the first choice, and the choice that is concluded.

    Args:
        logits: By choice.
        threshold: The share from which the first choice is concluded.
    """
    first, *others = logits
    most = max(logits.values())
    shares = {choice: math.exp(logit - most) for choice, logit in logits.items()}
    share = shares[first] / sum(shares.values())
    return share, first if share >= threshold else max(others, key=logits.__getitem__)


def compiled(setting: str, pattern: str) -> re.Pattern[str]:
    """A regular expression of the user's.

    Raises:
        TrainError: It is none.
    """
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise TrainError(
            f"{setting}: {excerpt(pattern)!r} is no regular expression ({error})"
        ) from None


def category_of(image: str, pattern: re.Pattern[str]) -> str:
    """The category in an image's file name: the pattern's first group, or all it matches."""
    found = pattern.search(image.rpartition("/")[2])
    if found is None:
        return ""
    return (found[1] if found.re.groups else found[0]) or ""


def with_conclusions(
    responses: Sequence[Response], threshold: float, truth_patterns: Mapping[str, str]
) -> list[Response]:
    """Responses with logits: given is what they conclude, expected the choice that is true.

    Args:
        responses: Those without logits stay as they are.
        threshold: The share from which the first choice is concluded.
        truth_patterns: A regular expression by choice: a file name that it matches makes the
            choice true. One that none matches has the only choice without a pattern. Empty takes
            the expected answer, which must be a choice or begin with one.

    Raises:
        TrainError: A truth that is none of the choices, or a pattern for none of them.
    """
    require_threshold(threshold)
    patterns = {name: compiled("truth_patterns", p) for name, p in truth_patterns.items()}
    return [_concluded(one, threshold, patterns) if one.logits else one for one in responses]


def _concluded(
    response: Response, threshold: float, patterns: Mapping[str, re.Pattern[str]]
) -> Response:
    choices = [*response.logits]
    if strange := [name for name in patterns if name not in choices]:
        raise TrainError(
            f"truth_patterns: {strange[0]!r} is no choice; expected some of {', '.join(choices)}"
        )
    _, given = conclude(response.logits, threshold)
    if patterns:
        truth = _of_file_name(response, choices, patterns)
    else:
        expected = exact_text(response.expected[0]) if response.expected else ""
        truth = next((c for c in choices if _begins(expected, exact_text(c))), "")
    if not truth:
        raise TrainError(
            f"truth_patterns: {response.question_id}: neither its expected answer "
            f"({excerpt(response.expected[0]) if response.expected else 'none'}) nor its image "
            f"({response.image or 'none'}) says which of {', '.join(choices)} is true; expected "
            "a pattern of file names for each but one"
        )
    return replace(response, given=given, expected=(truth,))


def _of_file_name(
    response: Response, choices: Sequence[str], patterns: Mapping[str, re.Pattern[str]]
) -> str:
    name = response.image.rpartition("/")[2]
    found = [choice for choice, pattern in patterns.items() if name and pattern.search(name)]
    rest = [choice for choice in choices if choice not in patterns]
    if len(found) > 1:
        raise TrainError(
            f"truth_patterns: {excerpt(name)} matches those of {' and '.join(found)}; expected one"
        )
    if found:
        return found[0]
    return rest[0] if name and len(rest) == 1 else ""


def _begins(text: str, word: str) -> bool:
    return text.startswith(word) and not text[len(word) :][:1].isalnum()
