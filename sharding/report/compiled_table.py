"""What the compiler made of a plan, in a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..words import gib, seconds
from .compiled_view import Compiled, Pair, cost, how, kind_of, over, place, size_text, time_text
from .memory_drawing import drawn_limit

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

# Columns that a terminal has at least.
_WIDTH = 80
_BAR_WIDTH, _TIMELINE_WIDTH, _TIMELINE_HEIGHT, _NAME_WIDTH = 14, 72, 4, 36
_COLLECTIVES, _FINDINGS, _BUFFERS, _LINES = 8, 8, 6, 6
_LEVELS = " ▁▂▃▄▅▆▇█"


def compiled_parts(shown: Compiled, capacity_bytes: float | None) -> list[RenderableType]:
    """Return what a terminal shows of `shown`, from the top down."""
    from rich.text import Text

    parts: list[RenderableType] = [Text(f"\n{shown.title}", style="bold"), _pairs(shown)]
    if shown.timeline:
        parts += [_title("memory through the step"), _timeline(shown.timeline, capacity_bytes)]
    if shown.collectives:
        parts += [_title("its collectives, of one device in a step"), _collectives(shown)]
    if shown.findings:
        parts += [_title("findings"), _findings(shown)]
    if shown.buffers:
        rows = [(gib(size), what, where) for what, where, size in shown.buffers]
        parts += [_title("largest when memory is fullest"), _costs(rows, _BUFFERS)]
    if shown.lines:
        rows = [(seconds(time), where, "") for where, time in shown.lines]
        parts += [_title("costliest lines"), _costs(rows, _LINES)]
    return parts


def _title(words: str) -> RenderableType:
    from rich.text import Text

    return Text(f"\n{words}", style="bold")


def _pairs(shown: Compiled) -> RenderableType:
    from rich.text import Text

    table = _grid("lrrrl")
    head = ("", "estimated", "compiled", "", "")
    table.add_row(*(Text(word, style="dim") for word in head))
    for total, items in zip(shown.totals, (shown.time, shown.memory), strict=True):
        table.add_row(*(Text(word, style="bold") for word in (f"  {total.name}", *total.texts(), "")))
        most = max((pair.largest for pair in items), default=0.0)
        for pair in items:
            table.add_row(*map(Text, (f"    {pair.name}", *pair.texts())), _bar(pair, most))
    return table


def _bar(pair: Pair, most: float) -> RenderableType:
    """Draw the compiled figure, what is hidden behind computing in another tone."""
    from rich.text import Text

    scale = _BAR_WIDTH / most if most else 0.0
    exposed = round((pair.compiled or 0.0) * scale)
    hidden = round(((pair.compiled or 0.0) + pair.hidden) * scale) - exposed
    return Text("█" * exposed).append("░" * hidden)


def _timeline(timeline: Sequence[float], capacity_bytes: float | None) -> RenderableType:
    from rich.text import Text

    width = min(_TIMELINE_WIDTH, len(timeline))
    # The fullest place of each part: a peak is never averaged away.
    most = [
        max(timeline[n * len(timeline) // width : (n + 1) * len(timeline) // width]) for n in range(width)
    ]
    whole = max(drawn_limit(max(most), capacity_bytes) or 0.0, max(most)) or 1.0
    eighths = [max(1, round(size / whole * 8 * _TIMELINE_HEIGHT)) if size else 0 for size in most]
    rows = [
        "".join(_LEVELS[min(max(level - 8 * row, 0), 8)] for level in eighths)
        for row in reversed(range(_TIMELINE_HEIGHT))
    ]
    drawn = "\n".join(f"  ▏{row}" for row in rows)
    of = f" of {gib(capacity_bytes)} that a device has" if capacity_bytes else ""
    scale = "" if whole == capacity_bytes else f"; drawn to {gib(whole)}"
    return Text(drawn).append(f"\n  fullest: {gib(max(most))}{of}{scale}", style="dim")


def _collectives(shown: Compiled) -> RenderableType:
    from rich.text import Text

    table = Text()
    table.append(_columns("", "times", "bytes", "links busy", "exposed"), style="dim")
    for row in shown.collectives[:_COLLECTIVES]:
        name = f"{row.kind}/{over(row.axes)}"
        figures = (
            f"{row.count:,.0f}",
            size_text(row.bytes),
            time_text(row.seconds),
            time_text(row.exposed_seconds),
        )
        table.append("\n" + _columns(name, *figures))
        notes = how(row) if row.source is None else f"{how(row)}\n{place(row.source)}"
        for note in notes.splitlines():
            table.append(f"\n    {note[: _WIDTH - 4]}", style="dim")
    left = shown.collectives[_COLLECTIVES:]
    if left:
        sums = (
            f"{sum(row.count for row in left):,.0f}",
            size_text(sum(row.bytes for row in left)),
            time_text(sum(row.seconds for row in left)),
            time_text(sum(row.exposed_seconds for row in left)),
        )
        table.append("\n" + _columns(f"and {len(left)} more", *sums))
    return table


def _columns(name: str, *figures: str) -> str:
    """Write a name, and figures below one another; a name too long for its column loses its end."""
    short = name if len(name) <= _NAME_WIDTH else name[: _NAME_WIDTH - 1] + "…"
    widths = (8, 11, 11, 10)
    return f"  {short:<{_NAME_WIDTH}}" + "".join(
        f"{text:>{w}}" for text, w in zip(figures, widths, strict=True)
    )


def _findings(shown: Compiled) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, justify="right", min_width=10)
    table.add_column(ratio=1, overflow="fold")
    said: set[str] = set()
    for row in shown.findings[:_FINDINGS]:
        sentence = Text(f"{kind_of(row)}: ", style="bold").append(row.what, style="not bold")
        if row.source is not None:
            sentence.append(f" ({place(row.source)})", style="dim")
        if row.remedy:
            sentence.append(f"\n→ {'as above' if row.remedy in said else row.remedy}", style="green")
            said.add(row.remedy)
        table.add_row(Text(cost(row)), sentence)
    left = len(shown.findings) - _FINDINGS
    if left > 0:
        table.add_row(Text(""), Text(f"and {left} that cost less"))
    return table


def _costs(rows: Iterable[tuple[str, str, str]], most: int) -> RenderableType:
    """Draw (cost, what, where): as many as `most`, folded where they are too long for a line."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, justify="right", min_width=10)
    table.add_column(ratio=1, overflow="fold")
    for size, what, where in list(rows)[:most]:
        table.add_row(Text(size), Text(what).append(f"  {where}" if where else "", style="dim"))
    return table


def _grid(justify: str) -> Table:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for side in justify:
        table.add_column(no_wrap=True, overflow="ellipsis", justify="right" if side == "r" else "left")
    return table
