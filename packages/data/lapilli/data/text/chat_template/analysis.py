"""Decide from its Jinja syntax tree whether a chat template depends on message contents.

A template that looks at roles and positions alone frames every conversation of one order of roles
alike, so its frames can be found once. Anything that is not understood counts as looking.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, TypeAlias

from jinja2 import TemplateSyntaxError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["looks_at_text"]

Kind: TypeAlias = Literal["plain", "text", "message", "messages"]
"""What an expression holds: nothing that is said, a text, a message, or a list of messages."""

# For any string these have one answer.
_TYPE_TESTS = frozenset({"defined", "undefined", "none", "string", "mapping", "boolean", "number"})


@lru_cache(maxsize=32)
def looks_at_text(source: str) -> bool:
    """Whether the output may depend on a message other than by containing it, trimmed or not.

    Args:
        source: The template's Jinja source. One that cannot be parsed counts as looking.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    reading = _TemplateReading()
    try:
        tree = environment.parse(source)
        for _ in range(3):  # a name may be read above the place where a loop assigns it
            for node in tree.body:
                reading.statement(node)
    except (_Looks, TemplateSyntaxError, RecursionError):
        return True
    return False


class _Looks(Exception):
    """The template inspects a message, or does something that is not analysed."""


class _TemplateReading:
    """What the names of a template hold, as far as it was read."""

    def __init__(self) -> None:
        self._names: dict[str, Kind] = {"messages": "messages"}

    def statement(self, node: nodes.Node) -> None:
        """Read a statement and what is inside it."""
        if isinstance(node, nodes.Output):
            for part in node.nodes:
                self._require(part, "plain", "text")
        elif isinstance(node, nodes.Assign):
            self._assign(node.target, self._kind(node.node))
        elif isinstance(node, nodes.If):
            self._truth(node.test)
            for part in (*node.body, *node.elif_, *node.else_):
                self.statement(part)
        elif isinstance(node, nodes.For):
            self._for(node)
        elif isinstance(node, nodes.ExprStmt):
            self._require(node.node, "plain")
        elif not isinstance(node, (nodes.Break, nodes.Continue)):
            raise _Looks

    def _for(self, node: nodes.For) -> None:
        if node.recursive or node.test is not None:
            raise _Looks
        kind = self._require(node.iter, "plain", "messages")
        self._assign(node.target, "message" if kind == "messages" else "plain")
        for part in (*node.body, *node.else_):
            self.statement(part)

    def _assign(self, target: nodes.Node, kind: Kind) -> None:
        if isinstance(target, nodes.NSRef) and kind == "plain":
            return
        if not isinstance(target, nodes.Name):
            raise _Looks
        before = self._names.get(target.name, kind)
        if {before, kind} == {"plain", "text"}:
            kind = "text"
        elif before != kind:
            raise _Looks
        self._names[target.name] = kind

    def _require(self, node: nodes.Node, *kinds: Kind) -> Kind:
        kind = self._kind(node)
        if kind not in kinds:
            raise _Looks
        return kind

    def _truth(self, node: nodes.Node) -> None:
        """An expression whose truth is asked for: a list of messages and a message are true."""
        if isinstance(node, (nodes.And, nodes.Or)):
            self._truth(node.left)
            self._truth(node.right)
        elif isinstance(node, nodes.Not):
            self._truth(node.node)
        else:
            self._require(node, "plain", "message", "messages")

    def _kind(self, node: nodes.Node) -> Kind:
        if isinstance(node, nodes.Name):
            return self._names.get(node.name, "plain")
        if isinstance(node, (nodes.Const, nodes.TemplateData)):
            return "plain"
        if isinstance(node, (nodes.Getattr, nodes.Getitem)):
            return self._member(node)
        if isinstance(node, (nodes.Add, nodes.Concat)):
            parts = [node.left, node.right] if isinstance(node, nodes.Add) else node.nodes
            found = {self._require(part, "plain", "text") for part in parts}
            return "text" if "text" in found else "plain"
        if isinstance(node, nodes.Filter):
            return self._filter(node)
        if isinstance(node, nodes.Call):
            return self._call(node)
        if isinstance(node, nodes.CondExpr):
            return self._choice(node)
        if isinstance(node, nodes.Test):
            if node.name not in _TYPE_TESTS:
                self._require(node.node, "plain")
            self._kind(node.node)
            return self._all_plain(node.args)
        if isinstance(node, (nodes.And, nodes.Or, nodes.Not)):
            self._truth(node)
            return "plain"
        if isinstance(node, nodes.Compare):
            return self._compare(node)
        if isinstance(node, (nodes.BinExpr, nodes.UnaryExpr, nodes.List, nodes.Tuple)):
            return self._all_plain(list(node.iter_child_nodes()))
        raise _Looks

    def _all_plain(self, parts: list[nodes.Node] | list[nodes.Expr]) -> Kind:
        for part in parts:
            self._require(part, "plain")
        return "plain"

    def _member(self, node: nodes.Getattr | nodes.Getitem) -> Kind:
        owner = self._kind(node.node)
        key = node.attr if isinstance(node, nodes.Getattr) else node.arg
        if isinstance(key, nodes.Slice):
            self._all_plain([part for part in (key.start, key.stop, key.step) if part is not None])
            return self._require(node.node, "plain", "messages")
        name = key.value if isinstance(key, nodes.Const) else key
        if owner == "plain":
            if name in ("previtem", "nextitem"):  # of a loop
                return "message"
            if isinstance(key, nodes.Node):
                self._require(key, "plain")
            return "plain"
        if owner == "messages" and isinstance(node, nodes.Getitem):
            self._require(node.arg, "plain")
            return "message"
        if owner == "message" and isinstance(name, str) and not hasattr(dict, name):
            return "text" if name == "content" else "plain"  # the others are not about texts
        raise _Looks

    def _filter(self, node: nodes.Filter) -> Kind:
        if node.node is None or node.dyn_args or node.dyn_kwargs:
            raise _Looks
        kind = self._kind(node.node)
        self._all_plain([*node.args, *(pair.value for pair in node.kwargs)])
        if node.name == "trim" and kind == "text" and not (node.args or node.kwargs):
            return "text"
        if kind == "plain" or (kind == "messages" and node.name in ("length", "count")):
            return "plain"
        raise _Looks

    def _call(self, node: nodes.Call) -> Kind:
        if node.dyn_args or node.dyn_kwargs:
            raise _Looks
        arguments = [*node.args, *(pair.value for pair in node.kwargs)]
        called = node.node
        if isinstance(called, nodes.Getattr) and called.attr == "strip" and not arguments:
            return self._require(called.node, "plain", "text")
        self._require(called, "plain")
        return self._all_plain(arguments)

    def _choice(self, node: nodes.CondExpr) -> Kind:
        self._truth(node.test)
        kinds: set[Kind] = {
            self._kind(part) for part in (node.expr1, node.expr2) if part is not None
        }
        if kinds == {"plain", "text"}:
            return "text"
        if len(kinds) != 1:
            raise _Looks
        return kinds.pop()

    def _compare(self, node: nodes.Compare) -> Kind:
        self._require(node.expr, "plain")
        for operand in node.ops:
            kind = self._kind(operand.expr)
            is_key = operand.op in ("in", "notin") and isinstance(node.expr, nodes.Const)
            if kind != "plain" and not (kind == "message" and is_key):
                raise _Looks
        return "plain"
