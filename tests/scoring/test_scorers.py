"""Every scorer against small files whose scores were computed by hand from the published rules."""

from __future__ import annotations

import math

import pytest

from lapilli.train.errors import TrainError
from lapilli.train.scoring.answer_forms import edit_distance, exact_text, vqa_text
from lapilli.train.scoring.responses import Response
from lapilli.train.scoring.scorers import SCORERS, chosen_scorers


def response(given: str, *expected: str, category: str = "") -> Response:
    return Response("7", "?", given, expected, category)


def scores(name: str, *responses: Response) -> list[float]:
    return SCORERS[name](responses).scores


def test_exact_ignores_case_spaces_and_a_final_full_stop() -> None:
    found = SCORERS["exact"](
        [
            response(" Red. ", "red", category="colour"),
            response("dark  red", "Dark Red", category="colour"),
            response("red!", "red", category="colour"),
            response("3", "two", "3", category="count"),
        ]
    )
    assert found.scores == [1, 1, 0, 1]
    assert found.metrics == {"accuracy": 0.75}
    assert found.by_category == {"colour": pytest.approx(2 / 3), "count": 1.0}
    assert found.confusion["red"] == {"red": 1, "other": 1}
    assert exact_text("U.S.") == "u.s"


@pytest.mark.parametrize(
    ("given", "letter"),
    [
        ("A", "A"), ("(b)", "B"), ("C. a cat", "C"), ("[D] it", "D"), ("e) no", "E"),
        ("Yes", "Y"), ("no, it is not", "N"), ("Y", "Y"), ("N.", "N"),
        ("Apple", None), ("Yesterday", None), ("Nobody", None), ("F", None),
        ("", None), ("(", None),
    ],
)  # fmt: skip
def test_a_first_letter_stands_alone(given: str, letter: str | None) -> None:
    expected = letter or "A"
    assert scores("first_letter", response(given, expected)) == [float(letter is not None)]
    table = SCORERS["first_letter"]([response(given, expected)])
    assert table.confusion == {expected: {letter or "other": 1}}


@pytest.mark.parametrize(
    ("given", "is_right"),
    [
        ("B", True), ("B. a dog", True), ("The answer is B.", True),
        ("So. The answer is B, I say", True),
        ("The answer is A. The answer is B.", False), ("(B)", False), ("b", False), ("B:", False),
        ("The answer is Z.", False),
    ],
)  # fmt: skip
def test_a_choice_is_read_as_scienceqa_does(given: str, is_right: bool) -> None:
    assert scores("choice", response(given, "B")) == [float(is_right)]


def test_yes_no_has_the_metrics_of_pope() -> None:
    """2 true positives, 1 false positive, 1 false negative, 1 true negative.

    Precision and recall are 2/3, F1 too; 3 of 5 answered yes; "A cat" counts as yes by that rule.
    """
    found = SCORERS["yes_no"](
        [
            response("Yes, there is.", "yes"),
            response("A cat", "yes"),
            response("There is a dog. No cat.", "no"),
            response("There is not, no", "yes"),
            response("No", "no"),
        ]
    )
    assert found.scores == [1, 1, 0, 0, 1]
    third = pytest.approx(2 / 3)
    assert found.metrics == {
        "accuracy": pytest.approx(0.6), "precision": third, "recall": third, "f1": third,
        "yes_share": pytest.approx(0.6), "tp": 2, "fp": 1, "tn": 1, "fn": 1, "neither": 1,
    }  # fmt: skip
    assert found.confusion == {"yes": {"yes": 2, "no": 1}, "no": {"yes": 1, "no": 1}}


def test_metrics_without_a_denominator_are_zero() -> None:
    found = SCORERS["yes_no"]([response("No", "no")])
    assert (found.metrics["precision"], found.metrics["recall"], found.metrics["f1"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("same", "score"),
    # leaving each of ten out: of those who gave it s - 1 are left, of the others s
    [(0, 0.0), (1, 0.3), (2, (2 * 1 / 3 + 8 * 2 / 3) / 10), (3, (3 * 2 / 3 + 7) / 10), (4, 1.0)],
)
def test_vqa_accuracy_is_the_mean_over_leaving_one_person_out(same: int, score: float) -> None:
    people = ["red"] * same + [f"other {number}" for number in range(10 - same)]
    (found,) = scores("vqa", response("Red.", *people))
    assert math.isclose(found, score)


@pytest.mark.parametrize(
    ("answer", "form"),
    # the rules of visualqa.org/evaluation, one by one
    [
        ("The Red Cat", "red cat"), ("two", "2"), ("none", "0"), ("dont", "don't"),
        ("1,000", "1000"), ("3.5", "3.5"), ("U.S.", "us"), ("red-blue", "red blue"),
        ("red - blue", "red blue"), ("what?", "what"), ("a/b", "b"), ("cat's", "cat 's"),
        ("(yes)", "yes"), ("", ""), ("a\nb", "b"),
    ],
)  # fmt: skip
def test_answers_are_normalised_as_the_vqa_evaluation_does(answer: str, form: str) -> None:
    assert vqa_text(answer) == form


def test_anls_cuts_at_half_and_takes_the_best_expected_answer() -> None:
    """kitten to sitting: 3 edits of 7 letters. ab to cd: 2 of 2. ab to ac: 1 of 2, not below 0.5"""
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == 3
    found = SCORERS["anls"](
        [
            response("Kitten ", "sitting"),
            response("ab", "cd", "AB"),
            response("ab", "ac"),
            response("", "x"),
        ]
    )
    assert found.scores == [pytest.approx(4 / 7), 1.0, 0.0, 0.0]
    assert list(found.metrics) == ["anls"]


KINDS = {
    "exact": response("x"),
    "first_letter": response("A", "a red apple tree".replace("a ", "the ", 1)),
    "yes_no": response("yes", "red"),
    "vqa": response("red", "red"),
    "anls": response("x"),
    "choice": response("A", "an apple"),
    "logits": response("Yes", "Yes"),
}


@pytest.mark.parametrize("name", SCORERS)
def test_answers_of_another_kind_are_refused(name: str) -> None:
    with pytest.raises(TrainError, match=f"scorers: {name} is for .* 1 of 1 questions .*7"):
        SCORERS[name]([KINDS[name]])
    with pytest.raises(TrainError, match=f"scorers: {name} has nothing to score"):
        SCORERS[name]([])


def test_scorers_are_named() -> None:
    assert chosen_scorers("exact, vqa,exact") == [SCORERS["exact"], SCORERS["vqa"]]
    with pytest.raises(TrainError, match="scorers: 'bleu'; expected some of exact"):
        chosen_scorers("exact,bleu")
