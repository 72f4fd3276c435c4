"""Memory through a step as an area, what a device has as a line, and what is held when it is fullest."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..words import gib
from .compiled_view import Compiled

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 720, 260, 74, 26, 18
# The area ends here; beside it stands what is held at the peak.
_RIGHT, _COLUMN, _COLUMN_WIDTH = 560, 620, 56
# A peak below this part of what a device has would be a flat line beside it.
_SEEN = 0.25
# More points than this are no sharper on any screen.
_POINTS = 400


def memory_drawing(shown: Compiled, capacity_bytes: float | None) -> str:
    """Return an SVG of `shown.timeline`, its peak marked and its buffers named; empty without one."""
    sizes = _most(shown.timeline)
    if not sizes:
        return ""
    peak = max(sizes)
    limit = drawn_limit(peak, capacity_bytes)
    whole = max(limit or 0.0, peak) * 1.04 or 1.0
    floor = _HEIGHT - _BOTTOM

    def y(size: float) -> float:
        return floor - (floor - _TOP) * size / whole

    def x(place: int) -> float:
        return _LEFT + (_RIGHT - _LEFT) * place / max(len(sizes) - 1, 1)

    at = sizes.index(peak)
    points = " ".join(f"{x(n):.1f},{y(size):.1f}" for n, size in enumerate(sizes))
    parts = [
        f'<polygon class="area" points="{_LEFT},{floor} {points} {_RIGHT},{floor}">'
        f"<title>bytes alive through the step, {gib(peak)} at most</title></polygon>",
        f'<line class="axis" x1="{_LEFT}" y1="{floor}" x2="{_WIDTH}" y2="{floor}"/>',
        f'<line class="peak" x1="{x(at):.1f}" y1="{y(peak):.1f}" x2="{_COLUMN}" y2="{y(peak):.1f}"/>',
        f'<circle class="peak" cx="{x(at):.1f}" cy="{y(peak):.1f}" r="4">'
        f"<title>fullest: {gib(peak)}</title></circle>",
        f'<text x="{_LEFT - 8}" y="{floor + 4}" text-anchor="end">0</text>',
        f'<text x="{_LEFT - 8}" y="{y(peak) + 4:.1f}" text-anchor="end">{gib(peak)}</text>',
        f'<text x="{_LEFT}" y="{_HEIGHT - 6}">the step begins</text>',
        f'<text x="{_RIGHT}" y="{_HEIGHT - 6}" text-anchor="end">ends</text>',
        f'<text x="{_COLUMN + _COLUMN_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle">when fullest</text>',
    ]
    if capacity_bytes and limit is None:
        words = f"a device has {gib(capacity_bytes)}, far above this picture"
        parts.append(f'<text x="{_LEFT + 4}" y="{_TOP - 6}">{words}</text>')
    elif limit is not None:
        line = y(limit)
        parts += [
            f'<line class="limit" x1="{_LEFT}" y1="{line:.1f}" x2="{_WIDTH}" y2="{line:.1f}"/>',
            f'<text x="{_LEFT + 4}" y="{line - 5:.1f}">a device has {gib(limit)}</text>',
        ]
    parts += _column(shown, peak, y)
    return (
        f'<svg class="timeline" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">'
        f"<title>Memory of a device through a step</title>{''.join(parts)}</svg>"
    )


def drawn_limit(peak: float, capacity_bytes: float | None) -> float | None:
    """Return what a device has where the step's memory can be seen beside it, else None."""
    return capacity_bytes if capacity_bytes and peak >= _SEEN * capacity_bytes else None


def _column(shown: Compiled, peak: float, y) -> list[str]:
    """Draw the largest buffers at the peak one on the other, and the rest above them."""
    parts, below = [], 0.0
    rows = [
        (f"{what} {where}".strip(), size, f"m{n % 8}") for n, (what, where, size) in enumerate(shown.buffers)
    ]
    rest = peak - sum(size for _, size, _ in rows)
    for words, size, kind in [*rows, ("everything else", rest, "else")]:
        # Buffers that share their place may add up to more than the peak.
        shown_size = min(size, peak - below)
        if shown_size <= 0.0:
            continue
        top = y(below + shown_size)
        parts.append(
            f'<rect class="{kind}" x="{_COLUMN}" y="{top:.1f}" width="{_COLUMN_WIDTH}" '
            f'height="{max(y(below) - top, 0.5):.1f}"><title>{escape(words)}: {gib(size)}</title></rect>'
        )
        below += shown_size
    return parts


def _most(timeline: Sequence[float]) -> list[float]:
    """Return at most so many points as are drawn, each the fullest of its part of the timeline."""
    count = min(len(timeline), _POINTS)
    return [
        max(timeline[n * len(timeline) // count : (n + 1) * len(timeline) // count]) for n in range(count)
    ]
