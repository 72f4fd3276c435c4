"""A Plan in a terminal: what was chosen, its costs, the compiler's word on it, what it was preferred to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..words import gib, seconds
from .compiled_table import compiled_parts
from .compiled_view import compiled_view
from .view import Bar, View, view, written

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from ..plans.record import Record

_BAR_WIDTH = 24
_RIVALS = 6
_PARAMETERS = 16
_PATH = 25


def plan_table(plan: Record) -> RenderableType:
    """Return a renderable of rich that shows `plan` in 80 columns."""
    from rich.console import Group
    from rich.text import Text

    shown, compiled = view(plan), compiled_view(plan)
    parts: list[RenderableType] = [Text(f"{shown.topology}: {shown.layout}", style="bold")]
    parts += [Text(f"  {line}") for line in shown.links]
    # Two figures of one thing are told apart.
    by = "" if compiled is None else "estimated: "
    if shown.time:
        parts += [
            Text(f"\n{by}a step takes {shown.step} at {shown.mfu} of the peak", style="bold"),
            _bars(shown.time),
            Text(f"\n{by}{_memory_title(shown)}", style="bold"),
            _bars(shown.memory),
        ]
    if compiled is not None:
        parts += compiled_parts(compiled, shown.capacity_bytes)
    parts += [Text("\nparameters, and how much of each a device holds", style="bold"), _parameters(shown)]
    if len(shown.rivals) > 1:
        parts += [Text("\npreferred to", style="bold"), _rivals(shown)]
    parts += [Text(f"\nnote: {note}") for note in shown.notes]
    return Group(*parts)


def _memory_title(shown: View) -> str:
    if shown.capacity_bytes is None:
        return f"a device holds {shown.peak} at most"
    part = shown.peak_bytes / shown.capacity_bytes
    return f"a device holds {shown.peak} at most, {part:.0%} of {gib(shown.capacity_bytes)}"


def _bars(bars: Sequence[Bar]) -> RenderableType:
    table = _grid()
    for bar in bars:
        filled = "█" * round(_BAR_WIDTH * bar.share) or "▏"
        _row(table, f"  {bar.name}", bar.text, f"{bar.share:6.1%}", filled)
    return table


def _parameters(shown: View) -> RenderableType:
    table = _grid()
    by_size = sorted(shown.parameters, key=lambda row: -row.bytes_whole)
    for row in by_size[:_PARAMETERS]:
        shape = "x".join(map(str, row.shape))
        _row(table, f"  {_ending(row.path)}", shape, written(row), gib(row.bytes_device))
    left = len(by_size) - _PARAMETERS
    if left > 0:
        _row(table, f"  and {left} smaller", "", "", "")
    return table


def _rivals(shown: View) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    # An empty column keeps folded lines as far in as the first one.
    table.add_column(width=0)
    table.add_column(ratio=2, overflow="fold")
    table.add_column(no_wrap=True, justify="right")
    table.add_column(ratio=3, overflow="fold")
    for rival in shown.rivals[1 : 1 + _RIVALS]:
        _row(table, "", f"{rival.layout}, {rival.storage}", seconds(rival.step_seconds), rival.lost)
    return table


def _row(table: Table, *cells: str) -> None:
    """Add a row of plain text: rich would take ``[fsdp]`` for markup."""
    from rich.text import Text

    table.add_row(*map(Text, cells))


def _ending(path: str) -> str:
    """Return a path without what comes first where it is too long for a line."""
    return path if len(path) <= _PATH else "…" + path[1 - _PATH :]


def _grid() -> Table:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, overflow="ellipsis")
    table.add_column(no_wrap=True, justify="right")
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, overflow="crop")
    return table
