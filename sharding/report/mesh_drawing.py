"""The devices of a topology drawn where they stand, coloured by their place along one mesh axis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape

import numpy as np

from ..hardware.arrange import arrange
from ..hardware.topology import Topology

_CELL, _GAP, _BETWEEN = 14, 3, 14
# More than this many planes, or hosts in a plane, say no more than the first few do.
_MOST_PLANES = 8
_MOST_ROWS = 32
_MOST_COLUMNS = 64


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
        place[laid.reshape(-1)] = np.broadcast_to(
            np.arange(size).reshape([-1 if n == number else 1 for n in range(laid.ndim)]), laid.shape
        ).reshape(-1)
        planes, left_out = _planes(place, topology)
        yield axis, _svg(planes, size, f"{axis}={size} over {topology}"), left_out


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
    count, rows, columns = planes.shape
    if count > _MOST_PLANES:
        left_out.append(f"{count - _MOST_PLANES} more planes")
    if rows > _MOST_ROWS:
        left_out.append(f"{rows - _MOST_ROWS} more {'rows' if topology.is_torus else 'hosts'}")
    if columns > _MOST_COLUMNS:
        left_out.append(f"{columns - _MOST_COLUMNS} more columns")
    return planes[:_MOST_PLANES, :_MOST_ROWS, :_MOST_COLUMNS], ", ".join(left_out)


def _svg(planes: np.ndarray, size: int, title: str) -> str:
    count, rows, columns = planes.shape
    step = _CELL + _GAP
    if not rows * columns:
        return ""
    # Tall planes (many hosts) lie on their side.
    if rows > columns:
        planes = planes.transpose(0, 2, 1)
        count, rows, columns = planes.shape
    width = count * columns * step + (count - 1) * _BETWEEN
    height = rows * step
    cells = []
    for plane in range(count):
        left = plane * (columns * step + _BETWEEN)
        for row in range(rows):
            for column in range(columns):
                place = int(planes[plane, row, column])
                cells.append(
                    f'<rect x="{left + column * step}" y="{row * step}" width="{_CELL}" height="{_CELL}" '
                    f'rx="3" fill="{_colour(place, size)}"><title>{place}</title></rect>'
                )
    return (
        f'<svg class="mesh" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">'
        f"<title>{escape(title)}</title>{''.join(cells)}</svg>"
    )


def _colour(place: int, size: int) -> str:
    """Return a colour that goes from blue to orange with the place, the lightness alternating."""
    part = place / max(size - 1, 1)
    hue = 220 - 190 * part
    return f"hsl({hue:.0f} 65% {48 + 8 * (place % 2)}%)"
