"""How a gradient comes from where it was computed to where it is stored: at once, or axis by axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec


class Scattering:
    """Scatters gradients over the axes of `mesh`; over those in `steps`, in steps of their factors.

    The factors of an axis are those of its index, major first: after the first step a device has the part of
    the array that its index's major digit numbers, and scatters that over the next.
    """

    def __init__(self, mesh: Mesh | AbstractMesh, steps: Mapping[str, Sequence[int]]) -> None:
        for axis, factors in steps.items():
            if math.prod(factors) != mesh.shape[axis]:
                raise ValueError(f"steps of {tuple(factors)} are not {axis}={mesh.shape[axis]}")
        self._mesh = mesh
        self._parts = {
            axis: [f"{axis}_{n}" for n in range(len(factors))] if len(factors) > 1 else [axis]
            for axis in mesh.shape
            for factors in [steps.get(axis, (mesh.shape[axis],))]
        }
        sizes = {
            part: size
            for axis, parts in self._parts.items()
            for part, size in zip(parts, steps.get(axis, (mesh.shape[axis],)), strict=True)
        }
        self._split = _reshaped(mesh, sizes) if len(sizes) > len(mesh.shape) else mesh

    def shardings(self, used: PartitionSpec, reduced: PartitionSpec) -> list[NamedSharding]:
        """Return the shardings to bring the gradient of an array to that is computed with as `used` says.

        The last is `reduced`. Without steps the first is where it was computed: asked for the stored sharding
        at once, XLA would move the activations.
        """
        last = NamedSharding(self._mesh, reduced)
        rank = max(len(used), len(reduced))
        before, after = _padded(used, rank), _padded(reduced, rank)
        gained = [tuple(axis for axis in b if axis not in a) for a, b in zip(before, after, strict=True)]
        count = max((len(self._parts[axis]) for axes in gained for axis in axes), default=1)
        if count == 1:
            return [NamedSharding(self._mesh, used), last]
        # Parts nest where the new axis comes after those that are there.
        if any(len(new) > 1 or a + new != b for a, new, b in zip(before, gained, after, strict=True)):
            return [NamedSharding(self._mesh, used), last]
        found = []
        for done in range(1, count):
            entries: list[Any] = [
                tuple(part for axis in a for part in self._parts[axis])
                + tuple(part for axis in axes for part in self._parts[axis][:done])
                for a, axes in zip(before, gained, strict=True)
            ]
            found.append(NamedSharding(self._split, PartitionSpec(*[entry or None for entry in entries])))
        return [*found, last]


def _padded(spec: PartitionSpec, rank: int) -> list[tuple[str, ...]]:
    entries = (*spec, *[None] * (rank - len(spec)))
    return [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in entries]


def _reshaped(mesh: Mesh | AbstractMesh, sizes: Mapping[str, int]) -> Mesh | AbstractMesh:
    """Return `mesh` with its devices in the same order under other axes."""
    from jax.sharding import AxisType

    types = (AxisType.Auto,) * len(sizes)
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=types)
    return Mesh(mesh.devices.reshape(tuple(sizes.values())), tuple(sizes), axis_types=types)
