"""Layouts as points: seconds of a step against bytes of a device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from ..words import gib, seconds
from .view import Rival

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 680, 260, 84, 46, 12


def scatter(rivals: Sequence[Rival], capacity_bytes: float | None) -> str:
    """Return an SVG of `rivals`, the first of which was chosen, and the line of what a device holds.

    Both scales are logarithmic: layouts differ by factors.
    """
    x = _scale([rival.step_seconds for rival in rivals], _LEFT + 12, _WIDTH - 16)
    floor = _HEIGHT - _BOTTOM
    sizes = [rival.peak_bytes for rival in rivals] + ([capacity_bytes] if capacity_bytes else [])
    y = _scale(sizes, floor - 10, _TOP)
    parts = [f'<line class="axis" x1="{_LEFT}" y1="{floor}" x2="{_WIDTH}" y2="{floor}"/>']
    for time in _ends([rival.step_seconds for rival in rivals]):
        parts.append(f'<text x="{x(time):.1f}" y="{floor + 16}" text-anchor="middle">{seconds(time)}</text>')
    for size in _ends(sizes):
        parts.append(f'<text x="{_LEFT - 8}" y="{y(size) + 4:.1f}" text-anchor="end">{gib(size)}</text>')
    middle = (_LEFT + _WIDTH) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">seconds of a step</text>')
    if capacity_bytes:
        line = y(capacity_bytes)
        parts += [
            f'<line class="limit" x1="{_LEFT}" y1="{line:.1f}" x2="{_WIDTH}" y2="{line:.1f}"/>',
            f'<text x="{_WIDTH}" y="{line - 5:.1f}" text-anchor="end">'
            f"memory of a device: {gib(capacity_bytes)}</text>",
        ]
    # The chosen one last, above the others.
    for rival in reversed(rivals):
        kind = "chosen" if not rival.lost else "rival" if rival.fits else "misfit"
        words = f"{rival.layout}: {seconds(rival.step_seconds)}, {gib(rival.peak_bytes)}"
        parts.append(
            f'<circle class="{kind}" cx="{x(rival.step_seconds):.1f}" cy="{y(rival.peak_bytes):.1f}" '
            f'r="{7 if kind == "chosen" else 5}"><title>{escape(words)}</title></circle>'
        )
    return (
        f'<svg class="scatter" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">'
        "<title>Seconds of a step against memory of a device, for each layout</title>"
        f"{''.join(parts)}</svg>"
    )


def _ends(values: Sequence[float]) -> tuple[float, ...]:
    low, high = min(values), max(values)
    return (low, high) if high > 1.15 * low else (low,)


def _scale(values: Sequence[float], start: float, stop: float) -> Callable[[float], float]:
    """Return what maps the logarithm of a value to a place between `start` and `stop`."""
    low, high = math.log(min(values)), math.log(max(values))
    wide = max(high - low, 0.05)
    return lambda value: start + (math.log(value) - low) / wide * (stop - start)
