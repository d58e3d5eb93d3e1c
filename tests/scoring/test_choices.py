"""Conclusions from logits: softmax, threshold, the truth of a record or of a file name."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lapilli.train.errors import TrainError
from lapilli.train.scoring.choices import (
    category_of,
    compiled,
    conclude,
    parse_choices,
    with_conclusions,
)
from lapilli.train.scoring.responses import Response
from lapilli.train.scoring.scorers import SCORERS

SKIN = {"No": "not-sexy|normal"}


def chosen(yes: float, no: float, image: str = "", expected: str = "Yes") -> Response:
    return Response("1", "Is it?", "", (expected,), "", image, logits={"Yes": yes, "No": no})


def test_a_row_of_icm_assistants_own_results() -> None:
    """Its eval_icm_val/llava-v1.5-7b-after-baseline.json, first row."""
    score, conclusion = conclude({"Yes": 18.203125, "No": 15.1484375}, 0.5)
    assert score == pytest.approx(0.9549844683997677, abs=1e-12)
    assert conclusion == "Yes"


def test_the_threshold_decides() -> None:
    logits = {"Yes": 0.0, "No": math.log(3)}  # shares of 1/4 and 3/4
    assert conclude(logits, 0.5) == (pytest.approx(0.25), "No")
    assert conclude(logits, 0.2) == (pytest.approx(0.25), "Yes")
    assert conclude({"Yes": 1e4, "No": -1e4}, 1.0) == (1.0, "Yes")  # no overflow
    assert conclude({"A": 1.0, "B": 0.5, "C": 0.7}, 0.9)[1] == "C"  # the likeliest of the others


def test_true_and_false_positives_by_file_names() -> None:
    responses = [
        chosen(2, 1, "a/lower_leg_1.jpg"),  # TP
        chosen(1, 2, "a/lower_leg_2.jpg"),  # FN
        chosen(2, 1, "whole_normal_3.jpg"),  # FP
        chosen(1, 2, "whole_normal_4.jpg"),  # TN
        chosen(1, 2, "b/not-sexy-5.jpg"),  # TN
    ]
    pattern = compiled("category_pattern", r"^(.+?)[_-]\d")
    responses = [replace(one, category=category_of(one.image, pattern)) for one in responses]
    found = SCORERS["logits"](with_conclusions(responses, 0.5, SKIN))
    counts = {name: found.metrics[name] for name in ("tp", "fp", "tn", "fn")}
    assert counts == {"tp": 1, "fp": 1, "tn": 2, "fn": 1}
    assert found.metrics["accuracy"] == pytest.approx(0.6)
    assert found.by_category == {"lower_leg": 0.5, "not-sexy": 1.0, "whole_normal": 0.5}


def test_the_truth_of_a_record_begins_with_a_choice() -> None:
    responses = [chosen(2, 1, expected="yes, it is."), chosen(2, 1, expected="No")]
    found = with_conclusions(responses, 0.5, {})
    assert [(one.expected, one.given) for one in found] == [(("Yes",), "Yes"), (("No",), "Yes")]


@pytest.mark.parametrize(
    ("response", "threshold", "patterns", "words"),
    [
        (chosen(1, 2), 1.5, {}, "threshold: 1.5; expected a share from 0 to 1"),
        (chosen(1, 2), float("nan"), {}, "threshold: nan"),
        (chosen(1, 2), 0.5, {"Maybe": "x"}, "truth_patterns: 'Maybe' is no choice"),
        (chosen(1, 2), 0.5, {"No": "["}, "truth_patterns: '\\[' is no regular expression"),
        (chosen(1, 2, "normal"), 0.5, {"No": "n", "Yes": "n"}, "matches those of No and Yes"),
        (chosen(1, 2, ""), 0.5, SKIN, "neither its expected answer"),
        (chosen(1, 2, expected="Yesterday"), 0.5, {}, "neither its expected answer .Yesterday."),
    ],
)
def test_what_has_no_truth_is_one_line(
    response: Response, threshold: float, patterns: dict[str, str], words: str
) -> None:
    with pytest.raises(TrainError, match=words) as said:
        with_conclusions([response], threshold, patterns)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("text", ["Yes", "Yes,Yes", "Yes,", ""])
def test_choices_differ(text: str) -> None:
    with pytest.raises(TrainError, match=r"choices: .* expected two or more that differ"):
        parse_choices(text)
    assert parse_choices("Yes, No") == ("Yes", "No")
