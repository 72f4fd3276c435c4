"""Which device stands where in a mesh, as pure arithmetic on a topology."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .axes import AXES_BY_WEIGHT, resolve_axes
from .topology import Topology

# Axes whose members send to the next one: pipeline stages, and blocks of keys and values around a ring.
_NEIGHBOURS = ("stage", "context")


def arrange(axes: Mapping[str, int], topology: Topology) -> np.ndarray:
    """Return which device stands where in the mesh: positions (`devices.by_position`) [*axis sizes].

    Slices are split over the lightest axes. Inside one, a torus gives each axis, from the heaviest on, whole
    torus axes where it can. An axis that passes blocks from neighbour to neighbour walks them one hop at a
    time; one that gathers and reduces counts through them like digits. Elsewhere the heaviest axis runs over
    consecutive devices: inside a host, then inside the NVLink domain.

    Raises:
      UserError: the axes do not fit the topology.
    """
    return _arrange(tuple(resolve_axes(axes, topology.num_devices).items()), topology)


@functools.lru_cache(maxsize=256)
def _arrange(axes: tuple[tuple[str, int], ...], topology: Topology) -> np.ndarray:
    names = [axis for axis, _ in axes]
    light_first = sorted(axes, key=lambda item: AXES_BY_WEIGHT.index(item[0]))
    sizes = [size for _, size in light_first]
    outer = split_over_slices(sizes, topology.num_slices)
    inner = [size // factor for size, factor in zip(sizes, outer, strict=True)]
    order = [axis for axis, _ in light_first]
    one_slice = _torus_positions(order, inner, topology) if topology.is_torus else _consecutive(inner)
    slices = np.arange(topology.num_slices).reshape(outer)
    whole = np.kron(slices, np.ones(inner, int)) * topology.devices_per_slice + np.tile(one_slice, outer)
    result = whole.transpose([order.index(name) for name in names])
    result.setflags(write=False)
    return result


def split_over_slices(sizes: Sequence[int], num_slices: int) -> list[int]:
    """Return the factor of each size that goes over the slices, taking from the first (lightest) on.

    >>> split_over_slices([2, 16, 4], 4)
    [2, 2, 1]
    """
    left, factors = num_slices, []
    for size in sizes:
        factors.append(math.gcd(size, left))
        left //= factors[-1]
    return factors


def _consecutive(sizes: Sequence[int]) -> np.ndarray:
    return np.arange(math.prod(sizes)).reshape(sizes)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A chip as `mesh_utils` looks at it; without a kind, so that every torus goes the general way."""

    id: int
    coords: tuple[int, ...]
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = ""


def _torus_positions(names: Sequence[str], sizes: Sequence[int], topology: Topology) -> np.ndarray:
    """Return the positions of one slice's devices [*sizes], the axes from the lightest to the heaviest."""
    from jax.experimental import mesh_utils

    cores = topology.chip.devices_per_chip
    # The link between the cores of a chip is the fastest: it goes inside the heaviest axis that it divides.
    inside = max((i for i, size in enumerate(sizes) if size % cores == 0), default=len(sizes) - 1)
    chip_sizes = [size // cores if i == inside else size for i, size in enumerate(sizes)]
    shape = topology.shape + (1,) * (3 - len(topology.shape))
    places = [_Place(id=i, coords=coords) for i, coords in enumerate(np.ndindex(*shape))]
    laid = mesh_utils.create_device_mesh(chip_sizes, places, allow_split_physical_axes=True)
    chips = np.vectorize(lambda place: place.id, otypes=[int])(laid)
    # XLA knows an all-gather over several torus axes by members that count like digits, and drives the links
    # of all of them; in any other order it fills with zeros and all-reduces, for four times the wire bytes.
    for axis, name in enumerate(names):
        order = _snake if name in _NEIGHBOURS else _count
        chips = np.take(chips, order(chips, axis, shape), axis=axis)
    by_core = chips[..., None] * cores + np.arange(cores)
    return np.moveaxis(by_core, -1, inside + 1).reshape(sizes)


def _count(chips: np.ndarray, axis: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return the order along `axis` that counts through its torus axes, two alike being the major ones.

    XLA has a reduce-scatter over a plane of two torus axes that are alike (`sharding.xla.reduction`).
    """
    where = np.stack(np.unravel_index(_line(chips, axis), shape))
    extents = [len(np.unique(row)) for row in where]
    pairs = [n for n in extents if n > 1 and extents.count(n) > 1]
    major_first = sorted(range(len(shape)), key=lambda n: (extents[n] not in pairs, n))
    return np.lexsort([where[n] for n in reversed(major_first)])


def _line(chips: np.ndarray, axis: int) -> np.ndarray:
    return np.moveaxis(chips, axis, 0).reshape(chips.shape[axis], -1)[:, 0]


def _snake(chips: np.ndarray, axis: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return the order along `axis` in which the walk turns at the torus' edges rather than jumping back.

    mesh_utils counts through the torus axes that a mesh axis covers like digits; neighbours along the mesh
    axis, which exchange blocks in a ring or a pipeline, would be far apart at each carry.
    """
    line = _line(chips, axis)
    rank = np.zeros(len(line), int)
    for coordinate in np.unravel_index(line, shape):
        steps, digit = np.unique(coordinate, return_inverse=True)
        turned = np.where(rank % 2, len(steps) - 1 - digit, digit)
        rank = rank * len(steps) + turned
    return np.argsort(rank)
