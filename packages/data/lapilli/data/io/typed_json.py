"""Read JSON into typed dataclasses, with errors that name the field.

A folder may come from somebody else. Every JSON file of a dataset, a run or an export is read
here: a wrong type, a missing or unknown field, a number that does not fit and nesting without end
become one line that names the place. Dataclasses and TypedDicts are the schemas.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    Required,
    TypeAlias,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from lapilli.data.record import excerpt

__all__ = ["Digest", "FilePath", "JsonError", "Natural", "as_type", "from_json", "is_file_path"]

T = TypeVar("T")
Read: TypeAlias = Callable[[Any, str], Any]  # a value and its place to the value as it is typed

MOST_DEPTH = 64  # of values whose type is open
LARGEST = 2**63
_FILE_PATH = re.compile(r"[^/\\\x00-\x1f\x7f]+(/[^/\\\x00-\x1f\x7f]+)*")


class JsonError(ValueError):
    """What is wrong in a JSON text, with its path: `tokens[3].rows: 'x'; expected ...`."""


def from_json(text: bytes | str, kind: type[T]) -> T:
    """Parse a JSON text of a known form.

    Args:
        text: UTF-8.
        kind: A dataclass, a TypedDict, or any type made of them, of JSON's own, `list`, `tuple`,
            `dict`, `Literal`, `Annotated` and unions. Fields that a dataclass does not have are an
            error; those of a TypedDict pass, with open types.

    Raises:
        JsonError: No JSON, or of another form.
    """
    try:
        value: object = json.loads(text)
    except RecursionError:
        raise JsonError("nested too deeply") from None
    except ValueError as error:
        raise JsonError(f"no JSON ({excerpt(str(error))})") from None
    return as_type(value, kind)


def as_type(value: object, kind: type[T], place: str = "") -> T:
    """A parsed JSON value as a type; see `from_json`. `place` is its path, for the error."""
    return _reader(kind)(value, place)


def is_file_path(text: str) -> bool:
    """Whether a text names a file below a folder: relative, with `/`, and never upwards."""
    return bool(_FILE_PATH.fullmatch(text)) and not {".", ".."} & {*text.split("/")}


def _file_path(value: str) -> str:
    return "" if is_file_path(value) else "a path below the folder, relative and without '..'"


def _natural(value: int) -> str:
    return "" if value >= 0 else "0 or more"


def _digest(value: str) -> str:
    return "" if re.fullmatch(r"[0-9a-f]{64}", value) else "a SHA-256 in hexadecimal"


# A check beyond the type: a function that returns what is expected, or an empty text.
FilePath = Annotated[str, _file_path]
Natural = Annotated[int, _natural]
Digest = Annotated[str, _digest]


@lru_cache(maxsize=512)
def _reader(kind: Any) -> Read:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return _open
    if kind in _SCALARS:
        return _SCALARS[kind]
    if origin is Annotated:
        return _annotated(arguments[0], arguments[1:])
    if origin in (Required, NotRequired):
        return _reader(arguments[0])
    if origin is Literal:
        return _literal(arguments)
    if origin in (Union, types.UnionType):
        return _union(arguments)
    if origin is list:
        return _list(_reader(arguments[0]))
    if origin is tuple:
        return _tuple(arguments)
    if origin in (dict, Mapping):
        return _dict(_reader(arguments[0]), _reader(arguments[1]))
    if is_typeddict(kind):
        return _typed_dict(kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass(cast("type[Any]", kind))
    raise TypeError(f"no reader for {kind!r}")


def _wrong(place: str, value: object, expected: str) -> JsonError:
    """The error for a value: shown where it is short, called by its kind where it is not."""
    if isinstance(value, dict):
        shown = "an object"
    elif isinstance(value, list):
        shown = "a list"
    elif isinstance(value, str):
        shown = repr(value[:60]) + "..." * (len(value) > 60)
    else:
        shown = {None: "null", True: "true", False: "false"}.get(cast(Any, value), "a number")
        if not isinstance(value, (bool, type(None))):
            shown = excerpt(repr(value), 30)
    return JsonError(f"{place + ': ' if place else ''}{shown}; expected {expected}")


def _below(place: str, name: object) -> str:
    if isinstance(name, int):
        return f"{place}[{name}]"
    shown = excerpt(str(name), 60)
    return f"{place}.{shown}" if place else shown


def _open(value: Any, place: str, depth: int = 0) -> Any:
    """A value of any form, of a depth that everything can walk."""
    if depth > MOST_DEPTH:
        raise JsonError(f"{place}: nested too deeply")
    if isinstance(value, dict):
        for each in cast("dict[str, Any]", value).values():
            _open(each, place, depth + 1)
    elif isinstance(value, list):
        for each in cast("list[Any]", value):
            _open(each, place, depth + 1)
    elif isinstance(value, int) and abs(value) >= LARGEST:
        raise _wrong(place, value, "a number of 64 bits")
    return value


def _bool(value: Any, place: str) -> bool:
    if value is True or value is False:
        return value
    raise _wrong(place, value, "true or false")


def _int(value: Any, place: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST:
        return value
    raise _wrong(place, value, "a whole number of 64 bits")


def _float(value: Any, place: str) -> float:
    if isinstance(value, float) or (type(value) is int and abs(value) < LARGEST):
        return value  # a whole number stays one: it is written as it was read
    raise _wrong(place, value, "a number")


def _str(value: Any, place: str) -> str:
    if isinstance(value, str):
        return value
    raise _wrong(place, value, "a text")


def _none(value: Any, place: str) -> None:
    if value is not None:
        raise _wrong(place, value, "null")


_SCALARS: dict[Any, Read] = {
    bool: _bool, int: _int, float: _float, str: _str, type(None): _none,
}  # fmt: skip


def _annotated(kind: Any, checks: tuple[Any, ...]) -> Read:
    """A type with checks: functions that say what is expected, or other types it has to be too."""
    read = _reader(kind)
    others = [_reader(check) for check in checks if is_typeddict(check)]
    functions: list[Callable[[Any], str]] = [c for c in checks if isinstance(c, types.FunctionType)]

    def annotated(value: Any, place: str) -> Any:
        found = read(value, place)
        for other in others:
            other(found, place)
        for check in functions:
            if expected := check(found):
                raise _wrong(place, value, expected)
        return found

    return annotated


def _literal(values: tuple[Any, ...]) -> Read:
    expected = f"one of {', '.join(map(str, values))}"

    def literal(value: Any, place: str) -> Any:
        if not isinstance(value, (str, int)) or value not in values:
            raise _wrong(place, value, expected)
        return value

    return literal


def _union(kinds: tuple[Any, ...]) -> Read:
    reads = [_reader(kind) for kind in kinds]

    def union(value: Any, place: str) -> Any:
        problems: list[JsonError] = []
        for read in reads:
            try:
                return read(value, place)
            except JsonError as error:
                problems.append(error)
        raise problems[0]

    return union


def _list(read: Read) -> Read:
    def read_list(value: Any, place: str) -> list[Any]:
        if not isinstance(value, (list, tuple)):  # a tuple was read before
            raise _wrong(place, value, "a list")
        items = cast("list[Any]", value)
        return [read(item, _below(place, number)) for number, item in enumerate(items)]

    return read_list


def _tuple(kinds: tuple[Any, ...]) -> Read:
    if kinds[-1] is Ellipsis:
        every = _list(_reader(kinds[0]))
        return lambda value, place: tuple(every(value, place))
    reads = [_reader(kind) for kind in kinds]

    def read_tuple(value: Any, place: str) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)) or len(cast("list[Any]", value)) != len(reads):
            raise _wrong(place, value, f"a list of {len(reads)}")
        items = zip(reads, cast("list[Any]", value), strict=True)
        return tuple(read(item, _below(place, n)) for n, (read, item) in enumerate(items))

    return read_tuple


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(place, value, "an object")
    return cast("dict[str, Any]", value)


def _dict(name: Read, read: Read) -> Read:
    return lambda value, place: {
        name(key, place): read(item, _below(place, key))
        for key, item in _object(value, place).items()
    }


def _typed_dict(kind: Any) -> Read:
    hints = get_type_hints(kind, include_extras=True)
    # not `__required_keys__`: that cannot see `NotRequired` in annotations kept as text
    usual = Required if kind.__total__ else NotRequired
    marks = {name: get_origin(hint) for name, hint in hints.items()}
    marks = {n: mark if mark in (Required, NotRequired) else usual for n, mark in marks.items()}
    required = sorted(name for name, mark in marks.items() if mark is Required)
    reads: dict[str, Read] = {name: _reader(hint) for name, hint in hints.items()}

    def read_typed_dict(value: Any, place: str) -> dict[str, Any]:
        fields = _object(value, place)
        for name in required:
            if name not in fields:
                raise JsonError(f"{_below(place, name)}: missing")
        return {
            name: reads.get(name, _open)(item, _below(place, name)) for name, item in fields.items()
        }

    return read_typed_dict


def _dataclass(kind: type[Any]) -> Read:
    hints = get_type_hints(kind, include_extras=True)
    fields = {one.name: one for one in dataclasses.fields(kind)}
    reads = {name: _reader(hints[name]) for name in fields}
    required = {
        name
        for name, one in fields.items()
        if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
    }

    def read_dataclass(value: Any, place: str) -> Any:
        found = _object(value, place)
        for name in sorted(required - found.keys()):
            raise JsonError(f"{_below(place, name)}: missing")
        for name in sorted(found.keys() - fields.keys()):
            raise JsonError(f"{_below(place, name)}: unknown to this version")
        values = {name: reads[name](item, _below(place, name)) for name, item in found.items()}
        try:
            return kind(**values)
        except JsonError:
            raise
        except Exception as error:  # what the class itself checks, in its package's own error
            raise JsonError(
                f"{place + ': ' if place else ''}{' '.join(str(error).split())}"
            ) from None

    return read_dataclass
