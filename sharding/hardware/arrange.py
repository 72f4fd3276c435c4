"""Positions of a topology's devices in a mesh: arithmetic on the topology alone, no device is touched."""

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
    """Return the position (as `attached.by_position` counts them) of each device of a mesh: [*axis sizes].

    Slices are split over the axes with the lightest traffic. Inside a slice of a torus each axis, from the
    heaviest on, gets whole torus axes where its size allows. Members of an axis that sends to neighbours
    (`_NEIGHBOURS`) follow one another one hop apart; those of an axis that gathers and reduces count through
    the torus axes like the digits of a number. Without a torus the heaviest axis runs over consecutive
    devices: inside a host, then inside the NVLink domain.

    >>> arrange({"data": 2, "tensor": 4}, Topology.parse("h100:8")).tolist()
    [[0, 1, 2, 3], [4, 5, 6, 7]]

    Args:
      axes: axis → size; one may be -1.
      topology: the devices.

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
    """The attributes that `mesh_utils` reads of a device.

    `device_kind` is empty so that `mesh_utils` applies its general assignment, and not the one that it has
    for some shapes of some chips.
    """

    id: int
    coords: tuple[int, ...]
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = ""


def _torus_positions(names: Sequence[str], sizes: Sequence[int], topology: Topology) -> np.ndarray:
    """Return the positions of one slice's devices [*sizes], the axes from the lightest to the heaviest."""
    from jax.experimental import mesh_utils

    cores = topology.chip.devices_per_chip
    # The link between the cores of a chip is the fastest: the heaviest axis that it divides gets it.
    inside = max((i for i, size in enumerate(sizes) if size % cores == 0), default=len(sizes) - 1)
    chip_sizes = [size // cores if i == inside else size for i, size in enumerate(sizes)]
    shape = topology.shape + (1,) * (3 - len(topology.shape))
    places = [_Place(id=i, coords=coords) for i, coords in enumerate(np.ndindex(*shape))]
    laid = mesh_utils.create_device_mesh(chip_sizes, places, allow_split_physical_axes=True)
    chips = np.vectorize(lambda place: place.id, otypes=[int])(laid)
    # XLA recognises an all-gather over several torus axes if its members count like digits, and then sends
    # over the links of all of them. In another order it pads with zeros and all-reduces, 4 times the bytes.
    # A fact of libtpu, which alone compiles for a torus, so that no other compiler's plans have the order.
    for axis, name in enumerate(names):
        order = _snake if name in _NEIGHBOURS else _count
        chips = np.take(chips, order(chips, axis, shape), axis=axis)
    by_core = chips[..., None] * cores + np.arange(cores)
    return np.moveaxis(by_core, -1, inside + 1).reshape(sizes)


def _count(chips: np.ndarray, axis: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return the order along `axis` that counts through its torus axes, two of equal size first.

    XLA has a reduce-scatter over a plane of two torus axes of equal size (`sharding.xla.reduction`).
    """
    where = np.stack(np.unravel_index(_line(chips, axis), shape))
    extents = [len(np.unique(row)) for row in where]
    pairs = [n for n in extents if n > 1 and extents.count(n) > 1]
    major_first = sorted(range(len(shape)), key=lambda n: (extents[n] not in pairs, n))
    return np.lexsort([where[n] for n in reversed(major_first)])


def _line(chips: np.ndarray, axis: int) -> np.ndarray:
    return np.moveaxis(chips, axis, 0).reshape(chips.shape[axis], -1)[:, 0]


def _snake(chips: np.ndarray, axis: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return the order along `axis` that turns round at each edge of the torus instead of starting again.

    `mesh_utils` counts through the torus axes of a mesh axis like digits. At each carry, neighbours along the
    mesh axis, which exchange blocks in a ring or a pipeline, would then be far apart.
    """
    line = _line(chips, axis)
    rank = np.zeros(len(line), int)
    for coordinate in np.unravel_index(line, shape):
        steps, digit = np.unique(coordinate, return_inverse=True)
        turned = np.where(rank % 2, len(steps) - 1 - digit, digit)
        rank = rank * len(steps) + turned
    return np.argsort(rank)
