"""Two plans side by side in a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .compare import Both, Comparison, Costs
from .compare_view import choices, items, texts
from .compiled_view import size_text, time_text

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

# As many rows of one table (parameters, dimensions, …) as say more than their number does.
_CHOICES, _FINDINGS = 12, 8
_NAME = 30


def comparison_table(shown: Comparison) -> RenderableType:
    """Return a renderable of rich that shows `shown`."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [_sides(shown)]
    parts += [Text(f"{sentence}", style="yellow") for sentence in shown.unlike]
    parts += [_title("what they do differently"), _choices(shown)] if shown.differs else []
    if not shown.differs:
        parts.append(Text("\nthey choose alike", style="bold"))
    for words, costs in (("estimated", shown.estimated), ("compiled", shown.compiled)):
        if costs is not None:
            parts += [_title(words), _costs(costs)]
    if shown.collectives:
        parts += [_title("collectives as compiled, of one device in a step"), _collectives(shown)]
    for letter, mine, others in zip("AB", shown.findings, reversed(shown.findings), strict=True):
        if own := [what for what in mine if what not in others]:
            more = [f"and {len(own) - _FINDINGS} more"] if len(own) > _FINDINGS else []
            parts.append(_title(f"found in {letter} alone"))
            parts += [Text(f"  {what}") for what in [*own[:_FINDINGS], *more]]
    return Group(*parts)


def _title(words: str) -> RenderableType:
    from rich.text import Text

    return Text(f"\n{words}", style="bold")


def _sides(shown: Comparison) -> RenderableType:
    """Say which plan is A and which B, and what each is."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(width=1)
    table.add_column(ratio=1, overflow="fold")
    for letter, name, layout in zip("AB", shown.names, shown.layouts, strict=True):
        words = layout if name == letter else f"{name}\n{layout}"
        table.add_row(Text(letter, style="bold"), Text(words))
    return table


def _choices(shown: Comparison) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for ratio in (4, 3, 3):
        table.add_column(ratio=ratio, overflow="fold")
    table.add_row(Text(""), Text("A", style="dim"), Text("B", style="dim"))
    rows = list(choices(shown))
    for kind in dict.fromkeys(row[0] for row in rows):
        of_kind = [row for row in rows if row[0] == kind]
        for _, label, one, other in of_kind[:_CHOICES]:
            table.add_row(Text(f"  {label}"), Text(one), Text(other))
        if len(of_kind) > _CHOICES:
            table.add_row(Text(f"  and {len(of_kind) - _CHOICES} more {kind}"), Text(""), Text(""))
    return table


def _costs(costs: Costs) -> RenderableType:
    table = _grid("A", "B", "B - A", "B / A")
    for name, whole, kind, write in (
        ("step", costs.step_seconds, "time", time_text),
        ("memory", costs.peak_bytes, "memory", size_text),
    ):
        _row(table, f"  {name}", whole, write, style="bold")
        for item, pair in items(costs, kind, whole):
            _row(table, f"    {item}", pair, write)
    return table


def _collectives(shown: Comparison) -> RenderableType:
    table = _grid("A", "B", "B - A", "B / A")
    by_seconds = sorted(
        shown.collectives.items(), key=lambda row: -max(size or 0.0 for size in row[1]["seconds"])
    )
    for name, sums in by_seconds:
        _row(table, f"  {name}", sums["seconds"], time_text)
        _row(table, "    exposed", sums["exposed_seconds"], time_text, style="dim")
        _row(table, "    bytes", sums["bytes"], size_text, style="dim")
        _row(table, "    times", sums["count"], "{:,.0f}".format, style="dim")
    return table


def _row(table: Table, name: str, pair: Both, write: Callable[[float], str], style: str = "") -> None:
    from rich.text import Text

    table.add_row(*(Text(cell, style=style) for cell in (name, *texts(pair, write))))


def _grid(*heads: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, overflow="ellipsis", min_width=_NAME)
    for _ in heads:
        table.add_column(no_wrap=True, justify="right")
    table.add_row(Text(""), *(Text(head, style="dim") for head in heads))
    return table
