"""Ids of chat templates against transformers' own, for texts that templates look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lapilli.data.errors import DataError
from lapilli.data.record import ImagePart, Part, Record, TextPart, Turn
from lapilli.data.text.chat_template.analysis import looks_at_text
from lapilli.data.text.encode import (
    IMAGE_TOKEN_INDEX,
    encode_batch,
    load_tokenizer,
    template_refusal,
    train_tokenizer,
)
from lapilli.data.text.templates import Template
from tests.data.chat_templates import MANNERS, SPECIALS

pytestmark = pytest.mark.filterwarnings("ignore:template .*its end marker")

SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]

FRAGMENTS = [
    "</think>", "<think>", "<think>\n", "\n</think>\n\n", "{{ x }}", "{% if %}", " ", "\n", "é", 
    "👩‍🚀", "4", "assistant", "<tool_response>", "\t", "So it is.", "\ue0a2", "\U000f0000",
]  # fmt: skip
texts = st.text(max_size=16) | st.lists(st.sampled_from(FRAGMENTS), max_size=7).map("".join)
answers = texts.filter(str.strip)
Rounds = list[tuple[str, str]]
rounds = st.lists(st.tuples(texts, answers), min_size=1, max_size=3)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small tokenizer that has the special tokens of all templates."""
    folder = tmp_path_factory.mktemp("made")
    train_tokenizer(["So it is, said the assistant, and thought of 4."] * 4, folder, vocab_size=400)
    tokenizer: Any = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS})
    return tokenizer


def to_record(system: str, said: Rounds) -> Record:
    turns = [Turn("system", (TextPart(system),))] if system else []
    for question, answer in said:
        turns += [Turn("user", (TextPart(question),)), Turn("assistant", (TextPart(answer),))]
    return Record("x", "own/x", "own", tuple(turns))


def to_messages(system: str, said: Rounds) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in said:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def trained(tokenizer: Any, row: Any) -> list[str]:
    spans = row.label_spans
    return [
        tokenizer.decode(row.input_ids[a:b], clean_up_tokenization_spaces=False)
        for a, b in zip(spans[::2], spans[1::2], strict=True)
    ]


def as_written(tokenizer: Any, messages: list[dict[str, str]], source: str) -> list[int] | None:
    """transformers' ids; None where the template raises."""
    try:
        found = tokenizer.apply_chat_template(messages, chat_template=source, tokenize=True)
    except Exception:
        return None
    return found["input_ids"]


@pytest.mark.parametrize("manner", MANNERS)
@given(system=st.just("") | texts, said=rounds)
@settings(max_examples=50, deadline=None, suppress_health_check=SLOW)
def test_ids_are_those_of_apply_chat_template_or_the_record_is_refused(
    made: Any, manner: str, system: str, said: Rounds
) -> None:
    names = [t.content for t in made.backend_tokenizer.get_added_tokens_decoder().values()]
    assume(not any(name in text for pair in said for text in (system, *pair) for name in names))
    template = Template(name="own", chat=MANNERS[manner].source)
    expected = as_written(made, to_messages(system, said), template.chat)
    record = to_record(system, said)
    refusal = template_refusal(made, template)(record)
    if refusal:
        # it raises, leaves out text that is no thinking, or has nothing left of an answer
        looks = any("think>" in answer for _, answer in said)
        assert expected is None or looks, refusal
        return
    row = encode_batch([record], made, template)[0]
    assert row.input_ids == expected
    found = trained(made, row)
    assert len(found) == len(said)
    for number, ((_, answer), shown) in enumerate(zip(said, found, strict=True)):
        end, kept = MANNERS[manner].end, MANNERS[manner].shown(answer)
        assert shown.endswith(end)
        if manner == "thinking" and number == len(said) - 1:
            assert kept.strip() in shown
        else:
            assert shown.removesuffix(end).strip() == kept.strip()


@pytest.mark.parametrize("name", ["qwen3", "llama3"])
@given(system=st.just("") | texts, said=rounds)
@settings(max_examples=40, deadline=None, suppress_health_check=SLOW)
def test_ids_of_a_models_own_template(
    real_tokenizer: Callable[[str], Any], name: str, system: str, said: Rounds
) -> None:
    tokenizer = real_tokenizer(name)
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    names = [token.content for token in added if token.special]
    assume(not any(name in text for pair in said for text in (system, *pair) for name in names))
    template = Template(name="own", chat=tokenizer.chat_template)
    if refusal := template_refusal(tokenizer, template)(to_record(system, said)):
        assert any("think>" in answer for _, answer in said), refusal
        return
    (row,) = encode_batch([to_record(system, said)], tokenizer, template)
    assert row.input_ids == as_written(tokenizer, to_messages(system, said), template.chat)


THOUGHT = "<think>\nadd them\n</think>\n\n4"


@pytest.mark.parametrize(
    ("manner", "said", "expected"),
    [
        ("thinking", [("2+2?", "4")], ["4<|im_end|>"]),
        ("thinking", [("2+2?", THOUGHT)], [THOUGHT + "<|im_end|>"]),
        ("thinking", [("2+2?", "<think>add</think>4")], ["<think>\nadd\n</think>\n\n4<|im_end|>"]),
        ("thinking", [("Q", THOUGHT), ("R", THOUGHT)], ["4<|im_end|>", THOUGHT + "<|im_end|>"]),
        ("thinking", [("<tool_response>", THOUGHT), ("R", "4")], ["4<|im_end|>", "4<|im_end|>"]),
        ("split", [("Q", "a</think><think>b")], ["<think>b</s>"]),
        ("split", [("Q", THOUGHT), ("R", "5 </think> 6")], ["\n\n4</s>", " 6</s>"]),
        ("thinking", [("Q", "So\n</think>\n\n")], ["So\n</think>\n\n<|im_end|>"]),
        ("headers", [("Q", f" {THOUGHT}\n")], [THOUGHT + "<|eot_id|>"]),
        ("bars", [("Q", f"{THOUGHT}\n")], [THOUGHT + "\n<|end|>"]),
    ],
)
def test_what_a_template_shows_of_an_answer_is_trained(
    made: Any, manner: str, said: Rounds, expected: list[str]
) -> None:
    template = Template(name="own", chat=MANNERS[manner].source)
    (row,) = encode_batch([to_record("", said)], made, template)
    assert row.input_ids == as_written(made, to_messages("", said), template.chat)
    # the tokenizer puts a space before a text
    assert [text.lstrip(" ") for text in trained(made, row)] == [t.lstrip(" ") for t in expected]


def rich(*turns: Turn) -> Record:
    return Record("x", "own/x", "own", turns)


def asked(text: str) -> Turn:
    return Turn("user", (TextPart(text),))


def test_thinking_beside_an_answer_is_written_as_thinking_inside_it(made: Any) -> None:
    template = Template(name="own", chat=MANNERS["thinking"].source)
    beside = rich(asked("2+2?"), Turn("assistant", (TextPart("4"),), thinking="add them"))
    inside = to_record("", [("2+2?", THOUGHT)])
    one, other = encode_batch([beside, inside], made, template)
    assert (one.input_ids, one.label_spans) == (other.input_ids, other.label_spans)
    # of an earlier turn this template leaves it out, as transformers does
    twice = rich(*beside.turns, asked("R"), Turn("assistant", (TextPart("5"),)))
    (row,) = encode_batch([twice], made, template)
    assert trained(made, row) == ["4<|im_end|>", "5<|im_end|>"]
    for manner in ("headers", "split"):
        refused = template_refusal(made, Template(name="own", chat=MANNERS[manner].source))(beside)
        assert refused == "it leaves out the thinking of turn 1 (assistant)"


@pytest.mark.parametrize("manner", ["thinking", "headers"])
def test_an_answer_that_is_not_to_be_trained_is_not(made: Any, manner: str) -> None:
    template = Template(name="own", chat=MANNERS[manner].source)
    turns = (
        asked("Q"),
        Turn("assistant", (TextPart("one"),), trains=False),
        asked("R"),
        Turn("assistant", (TextPart("two"),)),
    )
    (row,) = encode_batch([rich(*turns)], made, template)
    assert trained(made, row) == ["two" + MANNERS[manner].end]
    said = [("Q", "one"), ("R", "two")]
    assert row.input_ids == as_written(made, to_messages("", said), template.chat)


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("answer", ["It is.", THOUGHT])
def test_images_keep_their_places(made: Any, manner: str, answer: str) -> None:
    parts: tuple[Part, ...] = (ImagePart(0), TextPart("\nWhich? "), ImagePart(1))
    turns = (
        Turn("user", parts),
        Turn("assistant", (TextPart(answer),)),
        Turn("user", (TextPart("And "), ImagePart(2))),
        Turn("assistant", (TextPart("5"),)),
    )
    template = Template(name="own", chat=MANNERS[manner].source)
    (row,) = encode_batch([Record("x", "own/x", "own", turns, ("i",) * 3)], made, template)
    said = [("\ue123\nWhich? \ue123", answer), ("And \ue123", "5")]
    whole = made.apply_chat_template(
        to_messages("", said), chat_template=template.chat, tokenize=False
    )
    expected: list[int] = []
    for number, piece in enumerate(whole.split("\ue123")):
        expected += [IMAGE_TOKEN_INDEX] if number else []
        expected += made(piece, add_special_tokens=False).input_ids
    assert row.input_ids == expected


@pytest.mark.parametrize("manner", ["thinking", "headers", "split"])
def test_a_special_token_in_a_text_stays_text(made: Any, manner: str) -> None:
    template = Template(name="own", chat=MANNERS[manner].source)
    end = made.convert_tokens_to_ids(MANNERS[manner].end)
    said = [(f"Say {MANNERS[manner].end}", f"<think>a</think>{MANNERS[manner].end}b"), ("Q", "c")]
    (row,) = encode_batch([to_record("", said)], made, template)
    plain = [(q.replace("<", "("), a.replace("<|", "(|").replace("</s", "(/s")) for q, a in said]
    expected = as_written(made, to_messages("", plain), template.chat)
    assert expected is not None
    assert row.input_ids.count(end) == expected.count(end)


@pytest.mark.parametrize(
    ("source", "refusal"),
    [
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}",
         "it changes what turn 0 (user) says"),
        ("{% for m in messages %}{{ m.content[:3] }}{% endfor %}", "it cuts or compares"),
        ("{{ messages[0].content }}", "it leaves out what turn 1 (assistant) says"),
        ("{% for m in messages %}{{ m.content + m.content }}{% endfor %}",
         "it repeats a text, or writes a part of it"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "it leaves out what turn 0"),
        ("{{ messages[1].content.missing.deep }}", "'str object' has no attribute"),
        ("{% for c in messages[0].content %}{{ c.text }}{% endfor %}", "it leaves out"),
        ("{{ raise_exception('never') }}", "never"),
        ("{% for m in messages %}{{ m.content }}{% if 'hello' in m.content %}"
         "{{ strftime_now('%d') }}{% endif %}{% endfor %}", "it writes today's date"),
        ("{% for a in range(1000000) %}{% endfor %}", "Range too big"),
    ],
)  # fmt: skip
def test_what_a_template_cannot_express_is_refused_with_the_reason(
    made: Any, source: str, refusal: str
) -> None:
    record = to_record("", [("What is it?", "It is hello.")])
    found = template_refusal(made, Template(name="own", chat=source))(record)
    assert refusal in found
    assert "\n" not in found


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth"),
        ("{{ messages.append(1) }}{% for m in messages %}{{ m.content }}{% endfor %}", "unsafe"),
    ],
)
def test_a_template_that_runs_away_every_time_ends_the_build(
    made: Any, source: str, reason: str
) -> None:
    record = to_record("", [("What is it?", "It is hello.")])
    with pytest.raises(DataError, match=f"chat template cannot be used: .*{reason}"):
        template_refusal(made, Template(name="own", chat=source))(record)


def test_a_template_that_only_could_write_a_date_is_used(made: Any) -> None:
    source = "{% if tools %}{{ strftime_now('%d') }}{% endif %}" + MANNERS["zephyr"].source
    template = Template(name="own", chat=source)
    (row,) = encode_batch([to_record("", [("Q", "A")])], made, template)
    assert row.input_ids == as_written(made, to_messages("", [("Q", "A")]), source)


LOOKING = [
    MANNERS["thinking"].source,
    MANNERS["split"].source,
    "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    "{% for m in messages %}{{ m.content[1:] }}{% endfor %}",
    "{% for m in messages %}{% if m.content %}{{ m.content }}{% endif %}{% endfor %}",
    "{% for m in messages %}{{ m.values() | join(' ') }}{% endfor %}",
    "{% for m in messages %}{{ m | tojson }}{% endfor %}",
    "{% for m in messages if m.content != 'a' %}{{ m.content }}{% endfor %}",
    "{% set t = messages[0].content %}{{ t | length }}",
    "{% set x = '' %}{% for m in messages %}{{ x | upper }}{% set x = m.content %}{% endfor %}",
    "{% for m in messages %}{{ m[m.role] }}{% endfor %}",
    "{% for m in messages %}{{ m.content if 'a' in m.content else '' }}{% endfor %}",
    "{% for m in messages %}{% set y = m.content ~ 'a' %}{{ y == 'ba' }}{% endfor %}",
    "{% macro f(m) %}{{ m.content }}{% endmacro %}{% for m in messages %}{{ f(m) }}{% endfor %}",
    "{% for m in messages %}{{ m.content.split('a')[0] }}{% endfor %}",
    "{% for m in messages %}{{ loop.previtem.content | length }}{% endfor %}",
    "{% for m in messages %}{{ loop.changed(m.content) }}{% endfor %}",
    "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = m.content %}{% endfor %}",
    "{% for m in messages %}{{ m == messages[0] }}{% endfor %}",
    "{{ messages | map(attribute='content') | join }}",
    "{% for m in messages %}{{ m.content ",
]


def test_which_templates_look_at_what_is_said() -> None:
    assert [looks_at_text(source) for source in LOOKING] == [True] * len(LOOKING)
    blind = [manner.source for name, manner in MANNERS.items() if name not in ("thinking", "split")]
    assert [looks_at_text(source) for source in blind] == [False] * len(blind)


class Counting:
    """A tokenizer that counts the messages its template is run for."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.messages = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        self.messages += len(messages)
        return self._tokenizer.apply_chat_template(messages, **options)


@pytest.mark.parametrize(("manner", "most"), [("headers", 2), ("thinking", 3)])
def test_a_template_runs_for_each_turn_a_fixed_number_of_times(
    made: Any, manner: str, most: int
) -> None:
    """However many numbers of turns there are: two for the first of each, none for the others."""
    counting = Counting(made)
    template = Template(name="own", chat=MANNERS[manner].source)
    records = [to_record("", [("Q", "A")] * number) for number in range(1, 41)]
    encode_batch(records, counting, template)  # type: ignore[arg-type]
    turns = 2 * sum(range(1, 41))
    assert counting.messages <= most * turns + 100  # and what is asked of the template at first
    before = counting.messages
    encode_batch(records, counting, template)  # type: ignore[arg-type]
    again = counting.messages - before
    assert again == (0 if manner == "headers" else turns)


def test_frames_are_kept_of_every_number_of_turns(made: Any) -> None:
    """Records whose numbers of turns come round again need no other frames."""
    counting = Counting(made)
    template = Template(name="own", chat=MANNERS["headers"].source)
    records = [to_record("", [("Q", "A")] * number) for number in range(1, 301)]
    encode_batch(records, counting, template)  # type: ignore[arg-type]
    before = counting.messages
    encode_batch(records[:20], counting, template)  # type: ignore[arg-type]
    assert counting.messages == before
