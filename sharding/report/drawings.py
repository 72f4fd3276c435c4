"""Pictures: devices along a mesh axis, memory in all and through a step, layouts by time and memory."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape

import numpy as np

from ..hardware.arrange import arrange
from ..hardware.topology import Topology
from ..words import gib, seconds

# Devices: the side of a square, what lies between squares and between planes.
_CELL, _GAP, _BETWEEN = 14, 3, 14
# More than this many planes, or hosts in a plane, say no more than the first few do.
_MOST_PLANES, _MOST_ROWS, _MOST_COLUMNS = 8, 32, 64

# Memory through the step: the area ends at `_AREA`; beside it stands what is held at the peak.
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 720, 260, 74, 26, 18
_AREA, _COLUMN, _COLUMN_WIDTH = 560, 620, 56
# A peak below this part of what a device has would be a flat line beside it.
_SEEN = 0.25
# More points than this are no sharper on any screen.
_POINTS = 400
_ART_WIDTH, _ART_HEIGHT, _LEVELS = 72, 4, " ▁▂▃▄▅▆▇█"

# Layouts: a plot of its own size.
_PLOT_WIDTH, _PLOT_HEIGHT, _PLOT_LEFT, _PLOT_BOTTOM, _PLOT_TOP = 720, 260, 84, 46, 14


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dot:
    """A layout in a plot of time and memory; `kind` is its colour, `words` what it is."""

    seconds: float
    bytes: float
    kind: str
    words: str


def mesh_drawings(mesh: Mapping[str, int], topology: Topology) -> Iterator[tuple[str, str, str]]:
    """Yield (axis, SVG, what is left out) for each mesh axis longer than 1.

    A torus is drawn as planes of its first two axes, one for each place on the third and for each slice; a
    switched topology as a row of devices for each host. Of many planes the first are drawn.
    """
    laid = arrange(mesh, topology)
    for number, axis in enumerate(mesh):
        size = laid.shape[number]
        if size == 1:
            continue
        place = np.empty(laid.size, int)
        along = np.arange(size).reshape([-1 if n == number else 1 for n in range(laid.ndim)])
        place[laid.reshape(-1)] = np.broadcast_to(along, laid.shape).reshape(-1)
        planes, left_out = _planes(place, topology)
        yield axis, _squares(planes, size, f"{axis}={size} over {topology}"), left_out


def _planes(place: np.ndarray, topology: Topology) -> tuple[np.ndarray, str]:
    """Return the places [planes, rows, columns] along an axis, and what is not among them."""
    left_out = []
    if topology.is_torus:
        place = place[:: topology.chip.devices_per_chip]
        shape = (*topology.shape, 1)[:3]
        by_slice = place.reshape(topology.num_slices, *shape)
        planes = by_slice.transpose(0, 3, 1, 2).reshape(-1, *shape[:2])
        if topology.chip.devices_per_chip > 1:
            left_out.append(f"{topology.chip.devices_per_chip - 1} more devices of each chip")
    else:
        planes = place.reshape(1, -1, topology.devices_per_host)
    rows = "rows" if topology.is_torus else "hosts"
    for count, most, what in zip(
        planes.shape, (_MOST_PLANES, _MOST_ROWS, _MOST_COLUMNS), ("planes", rows, "columns"), strict=True
    ):
        if count > most:
            left_out.append(f"{count - most} more {what}")
    return planes[:_MOST_PLANES, :_MOST_ROWS, :_MOST_COLUMNS], ", ".join(left_out)


def _squares(planes: np.ndarray, size: int, title: str) -> str:
    # Tall planes (many hosts) lie on their side.
    if planes.shape[1] > planes.shape[2]:
        planes = planes.transpose(0, 2, 1)
    count, rows, columns = planes.shape
    if not rows * columns:
        return ""
    step = _CELL + _GAP
    apart = columns * step + _BETWEEN
    cells = "".join(
        f'<rect x="{plane * apart + column * step}" y="{row * step}" width="{_CELL}" height="{_CELL}" '
        f'rx="3" fill="{_colour(int(place), size)}"><title>{place}</title></rect>'
        for (plane, row, column), place in np.ndenumerate(planes)
    )
    width, height = count * apart - _BETWEEN, rows * step
    return (
        f'<svg class="mesh" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">'
        f"<title>{escape(title)}</title>{cells}</svg>"
    )


def _colour(place: int, size: int) -> str:
    """Return a colour that goes from blue to orange with the place, the lightness alternating."""
    hue = 220 - 190 * place / max(size - 1, 1)
    return f"hsl({hue:.0f} 65% {48 + 8 * (place % 2)}%)"


def memory_stack(pieces: Sequence[tuple[str, float, str]], capacity_bytes: float | None) -> str:
    """Return an SVG of a device's memory, filled from the left with (what it is, bytes, colour)."""
    whole = max(capacity_bytes or 0.0, sum(size for _, size, _ in pieces)) or 1.0
    parts, left = [], 0.0
    for words, size, kind in pieces:
        width = 100 * size / whole
        parts.append(
            f'<rect class="{kind}" x="{left:.3f}" y="0" width="{width:.3f}" height="4">'
            f"<title>{escape(words)}</title></rect>"
        )
        left += width
    free = f"{gib(whole * (1 - left / 100))} stay free" if left < 99.95 else ""
    title = f"<title>{escape(free)}</title>" if free else ""
    return (
        '<svg class="stack" viewBox="0 0 100 4" preserveAspectRatio="none" role="img">'
        f'<rect class="free" x="0" y="0" width="100" height="4">{title}</rect>{"".join(parts)}</svg>'
    )


def memory_timeline(
    timeline: Sequence[float], largest: Sequence[tuple[str, float]], capacity_bytes: float | None
) -> str:
    """Return an SVG of the bytes alive through a step, the peak marked; empty without a timeline.

    `largest` are the largest buffers at the peak, drawn one on the other beside it.
    """
    sizes = _fullest(timeline, _POINTS)
    if not sizes:
        return ""
    peak = max(sizes)
    limit = _drawn_limit(peak, capacity_bytes)
    whole = max(limit or 0.0, peak) * 1.04 or 1.0
    floor = _HEIGHT - _BOTTOM

    def y(size: float) -> float:
        return floor - (floor - _TOP) * size / whole

    def x(place: int) -> float:
        return _LEFT + (_AREA - _LEFT) * place / max(len(sizes) - 1, 1)

    at = sizes.index(peak)
    points = " ".join(f"{x(n):.1f},{y(size):.1f}" for n, size in enumerate(sizes))
    parts = [
        f'<polygon class="area" points="{_LEFT},{floor} {points} {_AREA},{floor}">'
        f"<title>bytes alive through the step, {gib(peak)} at most</title></polygon>",
        f'<line class="axis" x1="{_LEFT}" y1="{floor}" x2="{_WIDTH}" y2="{floor}"/>',
        f'<line class="peak" x1="{x(at):.1f}" y1="{y(peak):.1f}" x2="{_COLUMN}" y2="{y(peak):.1f}"/>',
        f'<circle class="peak" cx="{x(at):.1f}" cy="{y(peak):.1f}" r="4">'
        f"<title>fullest: {gib(peak)}</title></circle>",
        _label(_LEFT - 8, floor + 4, "0", "end"),
        _label(_LEFT - 8, y(peak) + 4, gib(peak), "end"),
        _label(_LEFT, _HEIGHT - 6, "the step begins"),
        _label(_AREA, _HEIGHT - 6, "ends", "end"),
        _label(_COLUMN + _COLUMN_WIDTH / 2, _HEIGHT - 6, "when fullest", "middle"),
    ]
    if limit is not None:
        parts += _limit(y(limit), _LEFT, _WIDTH, f"a device has {gib(limit)}")
    elif capacity_bytes:
        words = f"a device has {gib(capacity_bytes)}, far above this picture"
        parts.append(_label(_LEFT + 4, _TOP - 6, words))
    parts += _held(largest, peak, y)
    return (
        f'<svg class="timeline" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">'
        f"<title>Memory of a device through a step</title>{''.join(parts)}</svg>"
    )


def timeline_art(timeline: Sequence[float], capacity_bytes: float | None) -> tuple[str, ...]:
    """Return the same in lines of text, the last of which says what stands against what."""
    sizes = _fullest(timeline, _ART_WIDTH)
    if not sizes:
        return ()
    peak = max(sizes)
    whole = max(_drawn_limit(peak, capacity_bytes) or 0.0, peak) or 1.0
    eighths = [max(1, round(size / whole * 8 * _ART_HEIGHT)) if size else 0 for size in sizes]
    rows = [
        "▏" + "".join(_LEVELS[min(max(level - 8 * row, 0), 8)] for level in eighths)
        for row in reversed(range(_ART_HEIGHT))
    ]
    of = f" of {gib(capacity_bytes)} that a device has" if capacity_bytes else ""
    scale = "" if whole == capacity_bytes else f"; drawn to {gib(whole)}"
    return (*rows, f"fullest: {gib(peak)}{of}{scale}")


def _fullest(timeline: Sequence[float], most: int) -> list[float]:
    """Return at most `most` points, each the fullest of its part: a peak is never averaged away."""
    count = min(len(timeline), most)
    edges = [number * len(timeline) // count for number in range(count + 1)] if count else []
    return [max(timeline[start:stop]) for start, stop in itertools.pairwise(edges)]


def _drawn_limit(peak: float, capacity_bytes: float | None) -> float | None:
    """Return what a device has where the step's memory can be seen beside it, else None."""
    return capacity_bytes if capacity_bytes and peak >= _SEEN * capacity_bytes else None


def _held(largest: Sequence[tuple[str, float]], peak: float, y: Callable[[float], float]) -> list[str]:
    """Draw the largest buffers at the peak one on the other, and the rest above them."""
    parts, below = [], 0.0
    rows = [(words, size, f"m{number % 8}") for number, (words, size) in enumerate(largest)]
    rest = peak - sum(size for _, size in largest)
    for words, size, kind in [*rows, ("everything else", rest, "else")]:
        # Buffers that share their place may add up to more than the peak.
        shown = min(size, peak - below)
        if shown <= 0.0:
            continue
        top = y(below + shown)
        parts.append(
            f'<rect class="{kind}" x="{_COLUMN}" y="{top:.1f}" width="{_COLUMN_WIDTH}" '
            f'height="{max(y(below) - top, 0.5):.1f}"><title>{escape(words)}: {gib(size)}</title></rect>'
        )
        below += shown
    return parts


def layouts_plot(dots: Sequence[Dot], capacity_bytes: float | None) -> str:
    """Return an SVG of layouts by seconds of a step and bytes of a device, and the line of what it has.

    Both scales are logarithmic: layouts differ by factors. The first dot lies above the others.
    """
    floor = _PLOT_HEIGHT - _PLOT_BOTTOM
    times = [dot.seconds for dot in dots]
    sizes = [dot.bytes for dot in dots] + ([capacity_bytes] if capacity_bytes else [])
    x, y = _scale(times, _PLOT_LEFT + 14, _PLOT_WIDTH - 30), _scale(sizes, floor - 12, _PLOT_TOP + 6)
    parts = [
        f'<line class="axis" x1="{_PLOT_LEFT}" y1="{floor}" x2="{_PLOT_WIDTH}" y2="{floor}"/>',
        f'<line class="axis" x1="{_PLOT_LEFT}" y1="{_PLOT_TOP}" x2="{_PLOT_LEFT}" y2="{floor}"/>',
        *(_label(x(time), floor + 17, seconds(time), "middle") for time in _ends(times)),
        *(_label(_PLOT_LEFT - 8, y(size) + 4, gib(size), "end") for size in _ends(sizes)),
        _label((_PLOT_LEFT + _PLOT_WIDTH) / 2, _PLOT_HEIGHT - 6, "seconds of a step", "middle"),
    ]
    if capacity_bytes:
        parts += _limit(y(capacity_bytes), _PLOT_LEFT, _PLOT_WIDTH, f"a device has {gib(capacity_bytes)}")
    for dot in reversed(dots):
        words = f"{dot.words}: {seconds(dot.seconds)}, {gib(dot.bytes)}"
        parts.append(
            f'<circle class="{dot.kind}" cx="{x(dot.seconds):.1f}" cy="{y(dot.bytes):.1f}" '
            f'r="{7 if dot is dots[0] else 5}"><title>{escape(words)}</title></circle>'
        )
    return (
        f'<svg class="layouts" viewBox="0 0 {_PLOT_WIDTH} {_PLOT_HEIGHT}" role="img">'
        "<title>Seconds of a step against memory of a device, for each layout</title>"
        f"{''.join(parts)}</svg>"
    )


def _label(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _limit(y: float, left: int, right: int, words: str) -> list[str]:
    line = f'<line class="limit" x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>'
    return [line, _label(right, y - 5, words, "end")]


def _ends(values: Sequence[float]) -> tuple[float, ...]:
    low, high = min(values), max(values)
    return (low, high) if high > 1.15 * low else (low,)


def _scale(values: Sequence[float], start: float, stop: float) -> Callable[[float], float]:
    """Return what maps the logarithm of a value to a place between `start` and `stop`."""
    low, high = math.log(min(values)), math.log(max(values))
    wide = max(high - low, 0.05)
    return lambda value: start + (math.log(value) - low) / wide * (stop - start)
