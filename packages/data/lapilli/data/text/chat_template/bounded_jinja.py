"""Render untrusted chat templates with bounds on steps, time and memory.

The sandbox of transformers blocks access to files and code. It does not bound nested loops, texts
that double at each step, or numbers with a billion digits.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.visitor import NodeTransformer

from lapilli.data.text.chat_template.transformers_internals import (
    template_environment,
    with_reasoning_aliases,
)

__all__ = ["BoundedTemplate", "TemplateBound"]

MOST_STEPS = 200_000  # turns of loops and calls, and some more for each character
STEPS_EACH = 4
MOST_SECONDS = 20.0
MOST_OUTPUT = 16 << 20  # characters, and as many again for each of the conversation
TIMES_INPUT = 8
LARGEST_NUMBER = 1 << 20  # that a method of a text or a filter is given
PER_ITEM = 16  # characters that an item of a list counts for
MOST_BITS = 1 << 14  # of a whole number
LONGEST_SOURCE = 4 << 20
WIDTH = re.compile(r"\d{6,}|\*")
HANDED = (jinja2.Environment, nodes.EvalContext, jinja2.runtime.Context)  # to some filters, first
Operator = Callable[[Any, Any], Any]


class TemplateBound(SecurityError):
    """A template takes more steps, time or memory than any conversation needs."""


class _Meter:
    """What one run has used so far."""

    def __init__(self) -> None:
        self.start(0)

    def start(self, characters: int) -> None:
        """A run over a conversation of so many characters begins."""
        self._steps = MOST_STEPS + STEPS_EACH * characters
        self._end = time.monotonic() + MOST_SECONDS
        self._most = MOST_OUTPUT + TIMES_INPUT * characters

    def step(self) -> None:
        self._steps -= 1
        if self._steps < 0:
            raise TemplateBound(f"it takes more than {MOST_STEPS} steps for one conversation")
        if self._steps % 256 == 0 and time.monotonic() > self._end:
            raise TemplateBound(f"it takes more than {MOST_SECONDS:g} s for one conversation")

    def size(self, characters: int) -> None:
        if characters > self._most:
            raise TemplateBound(f"it writes more than {self._most} characters")

    def concat(self, pieces: Iterable[str]) -> str:
        kept: list[str] = []
        total = 0
        for piece in pieces:
            total += len(piece)
            self.size(total)
            kept.append(piece)
        return "".join(kept)

    def checked(self, value: Any) -> Any:
        """A value that is not too large, however often it holds the same."""
        if isinstance(value, int) and value.bit_length() > MOST_BITS:
            raise TemplateBound("it computes a number of too many digits")
        self.size(_weight(value, {}))
        return value


def _weight(value: Any, known: dict[int, int]) -> int:
    """Characters of a value, about; what a list holds twice counts twice, and is looked at once."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if not isinstance(value, (list, tuple, dict)):
        return 1
    if id(value) not in known:  # pyright: ignore[reportUnknownArgumentType]
        inner: Any = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 2 + sum(_weight(one, known) + PER_ITEM for one in inner)
    return known[id(value)]


class _Metered(NodeTransformer):
    """Lists, concatenations and loops of a template, with a call that counts what they make."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        super().generic_visit(node, *args, **kwargs)
        if isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock)):
            node.body.insert(0, nodes.ExprStmt(_named("lapilli_step", [])).set_lineno(node.lineno))
        if isinstance(node, nodes.Concat):
            return _named("lapilli_joined", node.nodes)
        if isinstance(node, (nodes.List, nodes.Dict)) and any(
            True for _ in node.iter_child_nodes()
        ):
            return _named("lapilli_checked", [node])
        if isinstance(node, nodes.Tuple) and node.ctx == "load" and node.items:
            return _named("lapilli_checked", [node])
        return node


def _named(name: str, values: list[Any]) -> nodes.Call:
    return nodes.Call(nodes.Name(name, "load"), values, [], None, None)


class BoundedTemplate:
    """A compiled chat template."""

    def __init__(self, source: str) -> None:
        """Compile it.

        Raises:
            jinja2.TemplateError, RecursionError: It is no template; `TemplateBound` if too long.
        """
        if len(source) > LONGEST_SOURCE:
            raise TemplateBound(f"it has {len(source)} characters")
        self._meter = meter = _Meter()
        environment: Any = template_environment()  # with all of transformers' own names
        environment.intercepted_binops = frozenset(environment.default_binop_table)
        environment.binop_table = {
            sign: _operator(sign, apply, meter) for sign, apply in environment.binop_table.items()
        }
        environment.filters = {
            name: _filter(name, apply, meter) for name, apply in environment.filters.items()
        }
        environment.call = functools.partial(_call, environment.call, meter)
        environment.concat = meter.concat
        environment.globals["lipsum"] = _no_text
        tree = _Metered().visit(environment.parse(source))
        tree.set_environment(environment)
        environment.globals |= {
            "lapilli_step": _nothing,
            "lapilli_checked": meter.checked,
            "lapilli_joined": lambda *values: meter.concat(map(str, values)),
        }
        code = environment.compile(tree)
        self._template = jinja2.Template.from_code(
            environment, code, environment.make_globals(None)
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        names: Mapping[str, Any],
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """What it writes for a conversation.

        Args:
            messages: Role and content each.
            names: Further names it may use, the special tokens.
            add_generation_prompt: Whether the beginning of an answer follows.

        Raises:
            TemplateBound: It takes too much.
            Exception: Whatever a template raises.
        """
        self._meter.start(sum(len(str(v)) for message in messages for v in message.values()))
        return self._template.render(
            messages=with_reasoning_aliases(messages), tools=None, documents=None,
            add_generation_prompt=add_generation_prompt, **names,
        )  # fmt: skip


def _nothing() -> str:
    return ""


def _no_text(*_: Any, **__: Any) -> str:
    raise TemplateBound("it asks for blind text")


def _operator(sign: str, apply: Operator, meter: _Meter) -> Operator:
    def bounded(left: Any, right: Any) -> Any:
        meter.step()
        numbers = isinstance(left, int) and isinstance(right, int)
        if sign == "**" and numbers and left.bit_length() * abs(right) > MOST_BITS:
            raise TemplateBound("it computes a number of too many digits")
        if sign == "*" and not numbers:
            for one, times in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(one, Sized):
                    meter.size(len(one) * max(0, times))
            meter.size(_weight(left, {}) * right if isinstance(right, int) and right > 0 else 0)
        elif sign == "+" and isinstance(left, Sized) and isinstance(right, Sized):
            meter.size(len(left) + len(right))
        elif sign == "%" and isinstance(left, (str, bytes)):
            _check_widths(left)
        return meter.checked(apply(left, right))

    return bounded


def _check_widths(form: str | bytes) -> None:
    text = form if isinstance(form, str) else form.decode("latin-1")
    if WIDTH.search(text):
        raise TemplateBound("it writes to a width of more than 99999 characters")


def _check_values(name: str, values: Sequence[Any], meter: _Meter) -> None:
    """The arguments of a method of a text or list, or of a filter, that itself in front."""
    for value in values:
        if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
            raise TemplateBound(f"it gives {name} the number {str(value)[:12]}...")
    own = values[0] if values else ""
    if name in ("format", "format_map") and isinstance(own, str):
        _check_widths(own)
    if name == "replace" and len(values) > 2 and isinstance(own, str):
        old, new = str(values[1]), str(values[2])
        meter.size(len(own) + (own.count(old) if old else len(own) + 1) * len(new))
    if name == "join" and len(values) > 1:  # of a method the separator comes first
        pieces, separator = (own, values[1]) if not isinstance(own, str) else (values[1], own)
        if isinstance(pieces, Sized):
            meter.size(
                _weight([*cast("Iterable[Any]", pieces)], {}) + len(pieces) * len(str(separator))
            )
    if name in ("indent", "tojson"):
        widest = max((v if isinstance(v, int) else len(str(v)) for v in values[1:]), default=0)
        lines = own.count("\n") + 1 if isinstance(own, str) else _weight(own, {})
        meter.size(lines * widest)


def _listed(values: Iterable[Any], meter: _Meter) -> list[Any]:
    kept: list[Any] = []
    for value in values:
        meter.step()
        kept.append(value)
    return kept


def _filter(name: str, apply: Callable[..., Any], meter: _Meter) -> Callable[..., Any]:
    @functools.wraps(apply)  # what says which contexts it takes stays
    def bounded(*values: Any, **named: Any) -> Any:
        meter.step()
        first = sum(isinstance(v, HANDED) for v in values[:1])
        if name == "join" and not isinstance(values[first], Sized):
            values = (*values[:first], _listed(values[first], meter), *values[first + 1 :])
        _check_values(name, [*values[first:], *named.values()], meter)
        return meter.checked(apply(*values, **named))

    return bounded


def _call(
    call: Callable[..., Any], meter: _Meter, context: Any, what: Any, *values: Any, **named: Any
) -> Any:
    meter.step()
    owner = getattr(getattr(what, "__wrapped__", what), "__self__", None)
    if isinstance(owner, (str, bytes, list, tuple, dict, int)):
        name = str(getattr(what, "__name__", ""))
        if name == "join":
            values = tuple(v if isinstance(v, Sized) else _listed(v, meter) for v in values)
        _check_values(name, [owner, *values, *named.values()], meter)
    return meter.checked(call(context, what, *values, **named))
