"""Scorers by name: responses in, a table of scores out. Pure.

Each says in its docstring whose rule it is. One that is given answers of another kind than it is
for refuses them, and scores nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeAlias

from lapilli.data.record import element_json
from lapilli.train.errors import TrainError
from lapilli.train.scoring.answer_forms import edit_distance, exact_text, vqa_text
from lapilli.train.scoring.responses import (
    Response,
    ScoreTable,
    binary_metrics,
    require,
    tabulate,
)

__all__ = ["SCORERS", "Scorer", "chosen_scorers"]

Scorer: TypeAlias = Callable[[Sequence[Response]], ScoreTable]

VQA_ANSWERS = 10  # people asked for each question
ANLS_THRESHOLD = 0.5
MOST_CLASSES = 20  # of a confusion table of `exact`
LETTERS = ("A", "B", "C", "D", "E")
_FIRST_LETTER = re.compile(r"\s*[\(\[]?(?:([a-e])(?![a-z])|(y)(?:es)?\b|(n)o?\b)", re.IGNORECASE)
_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")
_WORD = re.compile(r"[a-z']+")


def exact(responses: Sequence[Response]) -> ScoreTable:
    """1 for one of the expected answers: small letters, single spaces, no full stop at the end."""
    require("exact", responses, _without_expected(responses), "questions with an expected answer")
    forms = [exact_text(response.given) for response in responses]
    expected = [[exact_text(answer) for answer in r.expected] for r in responses]
    classes = {answers[0] for answers in expected}
    pairs = [(a[0], f if f in classes else None) for a, f in zip(expected, forms, strict=True)]
    return tabulate(
        "exact",
        responses,
        [float(form in answers) for form, answers in zip(forms, expected, strict=True)],
        classes=pairs if len(classes) <= MOST_CLASSES else (),
    )


def first_letter(responses: Sequence[Response]) -> ScoreTable:
    """1 if the first letters agree: A to E, or Y and N, in whatever brackets, or Yes and No.

    ICM-Assistant's rule for its questions with given and with open answers
    (`eval_scripts/eval_mqa`), which compares first letters. A letter that begins another word
    (`Apple`) is no answer here.
    """
    return _by_class("first_letter", responses, _first_letter, "answers A to E, Yes or No")


def choice(responses: Sequence[Response]) -> ScoreTable:
    """1 for the expected letter: `B`, `B. because`, or `The answer is B.` once.

    ScienceQA's rule in LLaVA's `eval_science_qa.py`.
    """
    return _by_class("choice", responses, _choice, "answers that are a letter A to E")


def yes_no(responses: Sequence[Response]) -> ScoreTable:
    """Accuracy, precision, recall, F1 and the share of yes, by POPE's reading of an answer.

    Of the first sentence without commas: `No`, `no` or `not` among its words makes it no, anything
    else yes (`eval_pope.py` of LLaVA, from POPE's own program; Li et al., 2023, arXiv 2305.10355).
    `neither` counts answers that have none of these words and no yes, which that rule takes for
    yes.
    """
    truths = [_yes_or_no(response.expected) for response in responses]
    bad = [_shown(r) for r, truth in zip(responses, truths, strict=True) if truth is None]
    require("yes_no", responses, bad, "questions whose expected answer begins with yes or no")
    pairs = [(bool(t), _says_yes(r.given)) for r, t in zip(responses, truths, strict=True)]
    words = [{*_WORD.findall(response.given.lower())} for response in responses]
    neither = sum(not found & {"yes", "no", "not"} for found in words)
    return tabulate(
        "yes_no",
        responses,
        [float(expected == given) for expected, given in pairs],
        classes=[(_word(expected), _word(given)) for expected, given in pairs],
        metrics={**binary_metrics(pairs), "neither": neither},
    )


def vqa(responses: Sequence[Response]) -> ScoreTable:
    """Accuracy against the answers of ten people.

    An answer that three or more people gave is right, one that fewer gave in part: the mean, over
    leaving out each of the ten in turn, of min(1, people who gave it / 3), after the evaluation's
    own normalisation (`vqa_text`). Antol et al., 2015, and https://visualqa.org/evaluation.
    """
    counts = [len(response.expected) for response in responses]
    bad = [
        f"{_shown(response)}: {count}"
        for response, count in zip(responses, counts, strict=True)
        if count != VQA_ANSWERS
    ]
    require("vqa", responses, bad, f"questions with {VQA_ANSWERS} expected answers")
    return tabulate("vqa", responses, [_vqa_score(response) for response in responses])


def _vqa_score(response: Response) -> float:
    given = vqa_text(response.given)
    same = sum(vqa_text(answer) == given for answer in response.expected)
    # of those left out `same` are one of them, the others are not
    others = len(response.expected) - same
    whole = same * min(1.0, (same - 1) / 3) + others * min(1.0, same / 3)
    return whole / len(response.expected)


def anls(responses: Sequence[Response]) -> ScoreTable:
    """Average normalised Levenshtein similarity, threshold 0.5.

    The greatest, over the expected answers, of 1 - NL where NL < 0.5, else 0; NL is the edit
    distance of the answers in small letters over the length of the longer (Biten et al., 2019,
    arXiv 1907.00490, equation 1). LLaVA's `m4c_evaluator.py` counts NL = 0.5 too.
    """
    require("anls", responses, _without_expected(responses), "questions with an expected answer")
    scores = [max(_similarity(r.given, answer) for answer in r.expected) for r in responses]
    return tabulate("anls", responses, scores, metric="anls")


def _similarity(given: str, expected: str) -> float:
    given, expected = given.lower().strip(), expected.lower().strip()
    longest = max(len(given), len(expected))
    distance = edit_distance(given, expected) / longest if longest else 0.0
    return 1.0 - distance if distance < ANLS_THRESHOLD else 0.0


def logits(responses: Sequence[Response]) -> ScoreTable:
    """What was concluded from the choices' logits, with the first choice as yes.

    Its metrics are those of `binary_metrics`, which ICM-Assistant's `eval_icm_val` counts too.
    """
    bad = [_shown(response) for response in responses if not response.logits]
    require("logits", responses, bad, "answers with logits, which evaluate --choices writes")
    names = [*responses[0].logits]
    wrong = [
        _shown(response)
        for response in responses
        if [*response.logits] != names or not {*response.expected[:1]} & {*names}
    ]
    require("logits", responses, wrong, f"expected answers among {', '.join(names)}")
    classes = [(response.expected[0], response.given) for response in responses]
    pairs = [(expected == names[0], given == names[0]) for expected, given in classes]
    return tabulate(
        "logits",
        responses,
        [float(expected == given) for expected, given in classes],
        classes=classes,
        metrics=binary_metrics(pairs),
    )


SCORERS: dict[str, Scorer] = {
    "exact": exact,
    "first_letter": first_letter,
    "yes_no": yes_no,
    "vqa": vqa,
    "anls": anls,
    "choice": choice,
    "logits": logits,
}


def chosen_scorers(names: str) -> list[Scorer]:
    """The scorers of a list of names, separated by commas.

    Raises:
        TrainError: A name that is none.
    """
    found = [name.strip() for name in names.split(",") if name.strip()]
    for name in found:
        if name not in SCORERS:
            raise TrainError(f"scorers: {name!r}; expected some of {', '.join(SCORERS)}")
    return [SCORERS[name] for name in dict.fromkeys(found)]


def _by_class(
    scorer: str, responses: Sequence[Response], read: Callable[[str], str | None], kind: str
) -> ScoreTable:
    truths = [read(r.expected[0]) if r.expected else None for r in responses]
    bad = [_shown(r) for r, truth in zip(responses, truths, strict=True) if truth is None]
    require(scorer, responses, bad, f"expected {kind}")
    classes = [(t or "", read(r.given)) for r, t in zip(responses, truths, strict=True)]
    scores = [float(expected == given) for expected, given in classes]
    return tabulate(scorer, responses, scores, classes=classes)


def _first_letter(text: str) -> str | None:
    found = _FIRST_LETTER.match(text)
    return "".join(filter(None, found.groups())).upper() if found else None


def _choice(text: str) -> str | None:
    if text in LETTERS:
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = _ANSWER_IS.findall(text)
    return found[0] if len(found) == 1 and found[0] in LETTERS else None


def _yes_or_no(expected: Sequence[str]) -> bool | None:
    """Whether an expected answer is yes; None for one that is neither."""
    words = _WORD.findall(expected[0].lower()) if expected else []
    return {"yes": True, "no": False}.get(words[0]) if words else None


def _says_yes(text: str) -> bool:
    words = text.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & {*words}


def _word(is_yes: bool) -> str:
    return "yes" if is_yes else "no"


def _without_expected(responses: Sequence[Response]) -> list[str]:
    return [_shown(response) for response in responses if not response.expected]


def _shown(response: Response) -> str:
    expected = response.expected[0] if response.expected else None
    return f"{response.question_id} ({'none' if expected is None else element_json(expected)})"
