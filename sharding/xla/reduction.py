"""In which steps gradients are scattered over a mesh axis that lies over several torus axes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..hardware.arrange import arrange
from ..hardware.topology import Topology
from .options import scatters_over_several_axes


def reduction_steps(
    mesh: Mapping[str, int], topology: Topology, options: Mapping[str, Any] | None = None
) -> dict[str, tuple[int, ...]]:
    """Return mesh axis → factors of its size, major first, in which to scatter; other axes go at once.

    `options` are those of the compiler: some let it scatter over all three axes at once, which is better
    still (`meshwright.sharding.xla.options`).

    libtpu scatters over a whole three-dimensional torus by an all-reduce, of which it keeps a part: in units
    of the array over one link, 2 / 6 on six links. Over a plane of two equal torus axes it has a true
    reduce-scatter on four links: 1 / 4, and what is left for the third axis is small. Seen in libtpu 0.0.42
    and 0.0.50 on v4 and v5p; on a torus of two axes, where one after the other is no less than both at once
    by all-reduce, there is nothing to win.
    """
    if scatters_over_several_axes(options or {}):
        return {}
    return dict(_steps(tuple(mesh.items()), topology))


@functools.lru_cache(maxsize=256)
def _steps(mesh: tuple[tuple[str, int], ...], topology: Topology) -> tuple[tuple[str, tuple[int, ...]], ...]:
    if not topology.is_torus or len(topology.shape) < 3 or not all(topology.wrap):
        return ()
    # tpu7x, of two devices a chip, leaves collectives to its SparseCores, which go about them in another way.
    if topology.chip.devices_per_chip > 1:
        return ()
    laid = arrange(dict(mesh), topology)
    found = []
    for n, (axis, size) in enumerate(mesh):
        line = np.moveaxis(laid, n, 0).reshape(size, -1)[:, 0]
        digits = digits_of(line, topology)
        whole = [extent for extent, _ in digits] == sorted(topology.shape)
        if len(digits) == 3 and whole and digits[0][0] == digits[1][0]:
            found.append((axis, (digits[0][0] * digits[1][0], digits[2][0])))
    return tuple(found)


def digits_of(line: np.ndarray, topology: Topology) -> list[tuple[int, int]]:
    """Return (extent, torus axis) of each torus axis that `line`, positions in a slice, counts through, major
    first; empty where it does not count like digits or leaves the slice.
    """
    if int(line.max()) >= topology.devices_per_slice:
        return []
    where = np.stack(np.unravel_index(line, topology.shape))
    spanned = [axis for axis in range(len(where)) if len(np.unique(where[axis])) > 1]
    # What changes last is the major digit.
    spanned.sort(key=lambda axis: int((where[axis] != where[axis][0]).argmax()), reverse=True)
    extents = [len(np.unique(where[axis])) for axis in spanned]
    counted = np.stack(np.unravel_index(np.arange(len(line)), extents or [1]))
    same = extents and int(np.prod(extents)) == len(line)
    if not same or any((where[axis] != digit).any() for axis, digit in zip(spanned, counted, strict=True)):
        return []
    return list(zip(extents, spanned, strict=True))
