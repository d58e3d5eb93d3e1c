"""Every setting that holds text is given an address: it is a place that may be one, or is refused.

Verbs, their configs and their arguments are found by running each verb up to the point where its
arguments are read. What is no place has to be named here.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli import command
from pipelines.cli.command import PLACES
from pipelines.cli.main import VERBS
from tests.pipelines.store_commands import ACCEPTED

ADDRESS = "s3://bucket/nothing/below"
# Leaf names of settings whose text names no file, folder or store.
WORDS = frozenset(
    {"aliases", "allow_code", "attention", "benchmarks", "category_pattern", "choices", "columns",
     "environment", "exclude", "format", "host", "image_suffixes", "label_selector", "layers",
     "leave_out", "limit", "lmms_eval", "mode", "model_type", "more", "name",
     "path_prefix", "prefix", "projector", "prompts", "question", "scorers", "shard_size", "system",
     "target", "teacher", "to", "tower", "trainer", "truth_patterns", "variables", "view",
     "warm_up"}
)  # fmt: skip
# Places that are looked at where they are used, which other tests do.
ELSEWHERE = {
    "annotations": "tests/data/test_annotation_files.py",
    "store": "tests/data/test_pools.py",
    "upload": "tests/train/test_uploads.py",
}


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a verb reads its arguments."""

    names: frozenset[str]
    addresses: frozenset[str]


class _Read(Exception):
    def __init__(self, reading: Reading) -> None:
        self.reading = reading


def texts_of(kind: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of the fields that hold text, of nested dataclasses too."""
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        yield from texts_in(hints[item.name], f"{prefix}{item.name}")


def texts_in(hint: Any, name: str) -> Iterator[str]:
    if dataclasses.is_dataclass(hint):
        yield from texts_of(hint, f"{name}.")
    elif hint in (str, Path):
        yield name
    else:
        inside = typing.get_args(hint)
        for one in inside[1:] if typing.get_origin(hint) is dict else inside:  # keys are names
            if not isinstance(one, (str, int, bool, float)) and one is not Ellipsis:
                yield from texts_in(one, name)


def reading_of(verb: str) -> Reading:
    """Run a verb up to where its arguments are read."""
    module = importlib.import_module(f"pipelines.{verb.replace('-', '_')}")

    def parse(
        kind: Any, argv: Any, description: str, addresses: Any = (), copied: Any = None
    ) -> None:
        del argv, description
        raise _Read(Reading(frozenset(texts_of(kind)), frozenset([*addresses, *(copied or {})])))

    def read(parser: Any, argv: Any, addresses: Any = (), copied: Any = None) -> None:
        del argv
        raise _Read(Reading(frozenset(options(parser)), frozenset([*addresses, *(copied or {})])))

    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in (("parse", parse), ("read_arguments", read)):
            if hasattr(module, name):
                patch.setattr(module, name, stand_in)
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda self, *_: read(self, ()))
        with pytest.raises(_Read) as found:
            module.main(["a"])
    return found.value.reading


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Names of the arguments of a parser that take text."""
    for action in parser._actions:  # pyright: ignore[reportPrivateUsage]
        is_switch = action.nargs == 0 or action.const is not None
        if action.dest not in ("help", "print_config") and not is_switch:
            hint = getattr(action, "_typehint", None) or action.type
            if hint in (str, Path, None):
                yield action.dest


READINGS = {verb: reading_of(verb) for verb in VERBS if verb != "simd"}  # which takes none
SETTINGS = [
    pytest.param(verb, name, id=f"{verb}-{name}")
    for verb, reading in READINGS.items()
    for name in sorted(reading.names)
]


def leaf(name: str) -> str:
    return name.rpartition(".")[2]


@pytest.mark.parametrize(("verb", "name"), SETTINGS)
def test_text_is_a_place_or_known_to_be_none(verb: str, name: str) -> None:
    known = PLACES | WORDS | ELSEWHERE.keys()
    assert leaf(name) in known, f"{verb}: {name} is new; is it a place? see PLACES of pipelines.cli"


def test_lists_have_nothing_that_is_gone() -> None:
    names = {leaf(name) for reading in READINGS.values() for name in reading.names}
    assert sorted((PLACES | WORDS | ELSEWHERE.keys()) - names) == []
    assert not PLACES & WORDS


def refused() -> Iterator[Any]:
    for verb, reading in READINGS.items():
        for name in sorted(reading.names):
            is_nested = name.startswith(("sources.", "validation.", "views.", "targets."))
            if leaf(name) in PLACES - reading.addresses and not is_nested:
                yield pytest.param(name, reading.addresses, id=f"{verb}-{name}")


@pytest.mark.parametrize(("name", "addresses"), refused())
def test_a_place_that_may_be_no_address_refuses_one(name: str, addresses: frozenset[str]) -> None:
    """By the function that all verbs read their arguments with, before anything else is done."""
    settings: Any = ADDRESS
    for part in reversed(name.split(".")):
        settings = {part: settings}
    with pytest.raises(command.DataError, match=f"{name}: '{ADDRESS}' is an address"):
        command.refuse_addresses("", settings, PLACES.difference(addresses))


def test_each_place_that_may_be_an_address_is_given_one() -> None:
    """Of a real store, in `test_life_in_store.py`; a kept step in `test_store_run.py`."""
    accepted = {
        (verb, leaf(name))
        for verb, reading in READINGS.items()
        for name in reading.names
        if leaf(name) in reading.addresses
    }
    assert accepted == {*ACCEPTED, ("replay", "step")}


@dataclasses.dataclass
class _Inner:
    text: str = ""


@dataclasses.dataclass
class _Outer:
    texts: list[str] | None = None
    number: int = 0
    named: dict[str, _Inner] = dataclasses.field(default_factory=dict[str, _Inner])
    inner: _Inner = dataclasses.field(default_factory=_Inner)


def test_text_is_found_wherever_it_stands() -> None:
    assert [*texts_of(_Outer)] == ["texts", "named.text", "inner.text"]
