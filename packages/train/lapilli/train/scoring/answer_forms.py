"""Bring answers into the form in which the benchmarks compare them. Pure."""

from __future__ import annotations

import re

__all__ = ["edit_distance", "exact_text", "vqa_text"]

NUMBERS = "zero one two three four five six seven eight nine ten"
ARTICLES = frozenset({"a", "an", "the"})
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# The evaluation's own table, word=word. Its keys with a capital letter are never met: the text is
# in small letters by then.
CONTRACTIONS = """
aint=ain't arent=aren't cant=can't couldve=could've couldnt=couldn't couldn'tve=couldn't've
couldnt've=couldn't've didnt=didn't doesnt=doesn't dont=don't hadnt=hadn't
hadnt've=hadn't've hadn'tve=hadn't've hasnt=hasn't havent=haven't hed=he'd hed've=he'd've
he'dve=he'd've hes=he's howd=how'd howll=how'll hows=how's Id've=I'd've I'dve=I'd've Im=I'm
Ive=I've isnt=isn't itd=it'd itd've=it'd've it'dve=it'd've itll=it'll maam=ma'am
mightnt=mightn't mightnt've=mightn't've mightn'tve=mightn't've mightve=might've
mustnt=mustn't mustve=must've neednt=needn't notve=not've oclock=o'clock oughtnt=oughtn't
ow's'at='ow's'at 'ows'at='ow's'at 'ow'sat='ow's'at shant=shan't shed've=she'd've
she'dve=she'd've shouldve=should've shouldnt=shouldn't shouldnt've=shouldn't've
shouldn'tve=shouldn't've somebody'd=somebodyd somebodyd've=somebody'd've
somebody'dve=somebody'd've somebodyll=somebody'll somebodys=somebody's someoned=someone'd
someoned've=someone'd've someone'dve=someone'd've someonell=someone'll someones=someone's
somethingd=something'd somethingd've=something'd've something'dve=something'd've
somethingll=something'll thats=that's thered=there'd thered've=there'd've
there'dve=there'd've therere=there're theres=there's theyd=they'd theyd've=they'd've
they'dve=they'd've theyll=they'll theyre=they're theyve=they've twas='twas wasnt=wasn't
wed've=we'd've we'dve=we'd've weve=we've werent=weren't whatll=what'll whatre=what're
whats=what's whatve=what've whens=when's whered=where'd wheres=where's whereve=where've
whod=who'd whod've=who'd've who'dve=who'd've wholl=who'll whos=who's whove=who've
whyll=why'll whyre=why're whys=why's wont=won't wouldve=would've wouldnt=wouldn't
wouldnt've=wouldn't've wouldn'tve=wouldn't've yall=y'all yall'll=y'all'll y'allll=y'all'll
yall'd've=y'all'd've y'alld've=y'all'd've y'all'dve=y'all'd've youd=you'd youd've=you'd've
you'dve=you'd've youll=you'll youre=you're youve=you've
"""
_DIGITS = {word: str(number) for number, word in enumerate(NUMBERS.split())} | {"none": "0"}
_CONTRACTED = {plain: word for plain, _, word in (p.partition("=") for p in CONTRACTIONS.split())}
_PERIOD = re.compile(r"\.(?!\d)")


def exact_text(text: str) -> str:
    """Small letters, single spaces, and no full stop at the end."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def vqa_text(text: str) -> str:
    """An answer as the VQA evaluation compares it.

    Small letters; no commas, question marks, articles or full stops that are no decimal points;
    other punctuation is taken out where a space is beside it, and else becomes a space; number
    words are digits; apostrophes of contractions are put back. These are the steps of the public
    evaluation (https://visualqa.org/evaluation) as its server runs them, which Pythia's
    `EvalAIAnswerProcessor` published and LLaVA's `m4c_evaluator.py` copied.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    plain = text
    for mark in PUNCTUATION:
        has_space = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if has_space else " ")
    plain = _without_periods(plain)
    words = (_DIGITS.get(word, word) for word in plain.lower().split())
    return " ".join(_CONTRACTED.get(word, word) for word in words if word not in ARTICLES)


def _without_periods(text: str) -> str:
    """Without full stops that no digit follows; the evaluation takes out the first 32 of them.

    It hands `re.UNICODE`, which is 32, to `re.sub` as the most replacements.
    """
    return _PERIOD.sub("", text, count=32)


def edit_distance(first: str, second: str) -> int:
    """The fewest letters to insert, delete or replace to come from one text to the other."""
    if len(first) < len(second):
        first, second = second, first
    row = list(range(len(second) + 1))
    for number, letter in enumerate(first, 1):
        above, row[0] = row[0], number
        for place, other in enumerate(second, 1):
            above, row[place] = (
                row[place],
                min(row[place] + 1, row[place - 1] + 1, above + (letter != other)),
            )
    return row[-1]
