"""Files of a folder as somebody else may have made them: wrong values, flipped bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lapilli.data.errors import DataError
from lapilli.model.errors import ModelError
from lapilli.train.errors import TrainError

__all__ = ["OURS", "WRONG", "flipped", "is_one_line", "refuses", "replaced", "vouch"]

OURS = (DataError, ModelError, TrainError)
MISSING = object()
DEEP: Any = json.loads("[" * 100 + "]" * 100)
WRONG: tuple[Any, ...] = (
    MISSING, None, True, [], {}, "", "x", "../../x", "/etc/passwd", "a\x1b[2J\nb", -1, 10**30,
    0.5, float("nan"), [None], {"x": None}, DEEP,
)  # fmt: skip


def refuses(look: Callable[[], object], what: object) -> bool:
    """Whether a look at something ends with a line of ours; any other error is the test's."""
    try:
        look()
    except OURS as error:
        if not is_one_line(error):
            raise AssertionError(f"{what}: more than a line") from error
        return True
    return False


def is_one_line(error: BaseException) -> bool:
    """Whether a message is a line, as a command prints it: white space of any kind is a space."""
    return 0 < len(" ".join(str(error).split())) < 2000


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where each value of a JSON value stands; of a long list or mapping the first three."""
    if place:
        yield place
    if isinstance(value, dict):
        for key in [*value][:40]:
            yield from _places(value[key], (*place, key))
    elif isinstance(value, list):
        for number in range(min(3, len(value))):
            yield from _places(value[number], (*place, number))


def replaced(text: str) -> Iterator[tuple[str, str]]:
    """The JSON text with each value of it in turn replaced by each wrong one: what, and the text.

    The whole text is replaced too, by what is no JSON and by JSON without end.
    """
    for whole in ("", "{", "[]", "null", "3", "[" * 100_000, '{"a":' * 5_000, "1" * 5_000, "\x00"):
        yield f"all: {whole[:10]}", whole
    for place in _places(json.loads(text)):
        for wrong in WRONG:
            changed = json.loads(text)
            holder = changed
            for key in place[:-1]:
                holder = holder[key]
            if wrong is MISSING:
                del holder[place[-1]]
            else:
                holder[place[-1]] = wrong
            yield (
                f"{place}: {'missing' if wrong is MISSING else str(wrong)[:20]}",
                json.dumps(changed),
            )


def flipped(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """The bytes with a few of them changed, `count` times; lengths stay."""
    generator = np.random.default_rng(seed)
    for _ in range(count):
        changed = np.frombuffer(data, np.uint8).copy()
        places = generator.integers(0, len(data), int(generator.integers(1, 6)))
        changed[places] = generator.choice(np.array([0, 1, 127, 128, 255], np.uint8), len(places))
        yield changed.tobytes()


def vouch(dataset: Path, name: str) -> None:
    """Let a dataset's manifest say of a file what it is now, as who changes the file can."""
    data = (dataset / name).read_bytes()
    now = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest = json.loads((dataset / "manifest.json").read_text())

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if value.get("path") == name:
                value.update(now)
            for each in value.values():
                walk(each)
        elif isinstance(value, list):
            for each in value:
                walk(each)

    walk(manifest)
    (dataset / "manifest.json").write_text(json.dumps(manifest))
