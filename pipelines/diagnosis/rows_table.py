"""The table of what a machine has, a row a finding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

__all__ = ["rows_table"]


def rows_table(rows: Sequence[Any], colours: Mapping[str, str]) -> Table:
    """The rows with their states in colour.

    Args:
        rows: What was found: each has `what`, `found` and `state`.
        colours: rich's style by state.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, highlight=False)
    table.add_column("what", style="cyan", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("found", overflow="fold")
    for row in rows:
        state = f"[{colours[row.state]}]{row.state}[/]"
        table.add_row(escape(row.what), state, escape(row.found))
    return table
