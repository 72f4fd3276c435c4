"""Steps of a reduce-scatter over a mesh axis that covers several torus axes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..hardware.arrange import arrange
from ..hardware.topology import Topology
from .compiler import compiler_of
from .options import scatters_over_several_axes


def reduction_steps(
    mesh: Mapping[str, int], topology: Topology, options: Mapping[str, Any] | None = None
) -> dict[str, tuple[int, ...]]:
    """Return the mesh axes over which to reduce-scatter in steps: axis → factors of its size, major first.

    Axes that are left out are scattered over in one step.

    libtpu compiles a reduce-scatter over a whole three-dimensional torus to an all-reduce and a slice. In
    units of the time that the array takes over one link, that is 2/6 on the six links of a chip. Over a plane
    of two torus axes of equal size libtpu has a true reduce-scatter on four links, which takes 1/4; what is
    left to scatter over the third axis is small. On a torus
    of two axes, steps gain nothing: one axis after the other takes no less than an all-reduce over both.

    Args:
      mesh: axis → size.
      topology: that the mesh is laid over.
      options: of the compiler; with some it scatters over three axes at once, so that no steps are needed.
    """
    if scatters_over_several_axes(options or {}):
        return {}
    return dict(_steps(tuple(mesh.items()), topology))


@functools.lru_cache(maxsize=256)
def _steps(mesh: tuple[tuple[str, int], ...], topology: Topology) -> tuple[tuple[str, tuple[int, ...]], ...]:
    if not compiler_of(topology).scatters_planes or not all(topology.wrap):
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
    """Return (extent, torus axis) of each torus axis that the positions `line` run over, major first.

    Empty where the positions do not count through the axes like digits, or leave the first slice.
    """
    if int(line.max()) >= topology.devices_per_slice:
        return []
    where = np.stack(np.unravel_index(line, topology.shape))
    spanned = [axis for axis in range(len(where)) if len(np.unique(where[axis])) > 1]
    # The major digit is the one that changes last.
    spanned.sort(key=lambda axis: int((where[axis] != where[axis][0]).argmax()), reverse=True)
    extents = [len(np.unique(where[axis])) for axis in spanned]
    counted = np.stack(np.unravel_index(np.arange(len(line)), extents or [1]))
    same = extents and int(np.prod(extents)) == len(line)
    if not same or any((where[axis] != digit).any() for axis, digit in zip(spanned, counted, strict=True)):
        return []
    return list(zip(extents, spanned, strict=True))
