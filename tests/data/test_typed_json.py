"""JSON of our own, read as types: what is of another form is one line that names the place."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapilli.data.io.typed_json import (
    Digest,
    FilePath,
    JsonError,
    Natural,
    as_type,
    from_json,
    is_file_path,
)


@dataclass(frozen=True)
class Inner:
    name: str
    size: Natural = 0

    def __post_init__(self) -> None:
        if self.size > 9:
            raise RuntimeError(f"size: {self.size}; expected at most 9")


class Row(TypedDict):
    step: int
    loss: NotRequired[float | None]


@dataclass(frozen=True)
class Outer:
    path: FilePath
    sha256: Digest
    kind: Literal["raw", "jpeg"]
    pair: tuple[int, float]
    many: tuple[Inner, ...] = ()
    named: dict[str, Inner] = field(default_factory=dict[str, Inner])
    rows: list[Row] = field(default_factory=list[Row])
    open: Annotated[dict[str, Any], Row] = field(default_factory=lambda: {"step": 1})
    flag: bool | None = None


GOOD: dict[str, Any] = {
    "path": "a/b.arrow", "sha256": "0" * 64, "kind": "raw", "pair": [1, 2.5],
    "many": [{"name": "x"}, {"name": "y", "size": 3}], "named": {"n": {"name": "é\ud800"}},
    "rows": [{"step": 1, "loss": 2}, {"step": 2, "loss": None, "more": {"a": [1]}}],
    "open": {"step": 4}, "flag": True,
}  # fmt: skip


def test_what_a_dataclass_was_written_from_comes_back() -> None:
    found = from_json(json.dumps(GOOD), Outer)
    assert found.many == (Inner("x"), Inner("y", 3))
    assert found.pair == (1, 2.5)
    assert found.rows[1] == {"step": 2, "loss": None, "more": {"a": [1]}}
    assert from_json(json.dumps(asdict(found)), Outer) == found


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"path": "/etc/passwd"}, "path: '/etc/passwd'; expected a path below the folder"),
        ({"path": "../x"}, "path: '../x'; expected a path below"),
        ({"path": 3}, "path: 3; expected a text"),
        ({"sha256": "x"}, "sha256: 'x'; expected a SHA-256 in hexadecimal"),
        ({"kind": "gif"}, "kind: 'gif'; expected one of raw, jpeg"),
        ({"kind": ["raw"]}, "kind: a list; expected one of raw, jpeg"),
        ({"pair": [1]}, "pair: a list; expected a list of 2"),
        ({"pair": [True, 1]}, r"pair\[0\]: true; expected a whole number"),
        ({"pair": [1, "2"]}, r"pair\[1\]: '2'; expected a number"),
        ({"pair": [10**30, 1]}, r"pair\[0\]: 1000000.*; expected a whole number of 64 bits"),
        ({"many": [{"name": "x", "size": -1}]}, r"many\[0\].size: -1; expected 0 or more"),
        ({"many": [{"name": "x", "size": 10}]}, r"many\[0\]: size: 10; expected at most 9"),
        ({"many": [{}]}, r"many\[0\].name: missing"),
        ({"many": {}}, "many: an object; expected a list"),
        ({"named": {"n": None}}, "named.n: null; expected an object"),
        ({"named": {"n": {"name": "x", "nmae": 1}}}, "named.n.nmae: unknown to this version"),
        ({"rows": [{"loss": 1.0}]}, r"rows\[0\].step: missing"),
        ({"rows": [{"step": 1, "loss": "1"}]}, r"rows\[0\].loss: '1'; expected a number"),
        ({"open": {"step": "1"}}, "open.step: '1'; expected a whole number"),
        ({"open": {"step": 1, "a\x1b": [10**30]}}, r"open.a\\x1b: 1000.*; expected a number of 64"),
        ({"flag": 1}, "flag: 1; expected true or false"),
    ],
)
def test_another_form_names_the_place(change: dict[str, Any], line: str) -> None:
    with pytest.raises(JsonError, match=f"^{line}") as caught:
        from_json(json.dumps({**GOOD, **change}), Outer)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        (b"\xff\xfe\xff", "no JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"a": ' + "[" * 80 + "]" * 80 + "}", "a: nested too deeply"),
        ("9" * 5_000, "no JSON"),
        ("null", "null; expected an object"),
    ],
)
def test_no_json_and_json_without_end(text: str | bytes, line: str) -> None:
    with pytest.raises(JsonError, match=f"^{line}"):
        from_json(text, dict[str, Any])


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(value=values, name=st.sampled_from([*GOOD]))
def test_any_value_is_of_the_type_or_an_error(value: Any, name: str) -> None:
    try:
        found = as_type({**GOOD, name: value}, Outer)
    except JsonError:
        return
    # what passes is what it says it is: it can be written and read again
    assert as_type(json.loads(json.dumps(asdict(found))), Outer) is not None


@given(parts=st.lists(st.text(alphabet="a.\\\x00/\n~", max_size=4), min_size=1, max_size=4))
def test_a_file_path_stays_below_its_folder(parts: list[str]) -> None:
    text = "/".join(parts)
    names = text.split("/")
    stays = all(name not in ("", ".", "..") for name in names)
    plain = not any(char in text for char in "\\\x00\n")
    assert is_file_path(text) == (stays and plain)
