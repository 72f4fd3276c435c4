"""Specs: one entry an array dimension, of the mesh axes that cut it. Their algebra, apart from any plan."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

# One entry an array dimension: no axis, one, or several with the major one first.
Spec = tuple[str | tuple[str, ...] | None, ...]


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the mesh axes that one entry of a spec names.

    >>> axes_of(None), axes_of("fsdp"), axes_of(("data", "fsdp"))
    ((), ('fsdp',), ('data', 'fsdp'))
    """
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def spec_of(storage: Iterable[Sequence[str]]) -> Spec:
    """Return the axes of each dimension as a spec, without trailing Nones.

    >>> spec_of([("data", "fsdp"), (), ("tensor",), ()])
    (('data', 'fsdp'), None, 'tensor')
    """
    entries = [None if not axes else axes[0] if len(axes) == 1 else tuple(axes) for axes in storage]
    while entries and entries[-1] is None:
        entries.pop()
    return tuple(entries)


def by_dimension(spec: Spec, rank: int) -> tuple[tuple[str, ...], ...]:
    """Return a spec as the axes of each of `rank` dimensions.

    >>> by_dimension((None, "tensor"), 3)
    ((), ('tensor',), ())
    """
    return tuple(axes_of(entry) for entry in spec) + ((),) * (rank - len(spec))


def axes_in(spec: Iterable[str | tuple[str, ...] | None]) -> tuple[str, ...]:
    """Return all mesh axes of a spec, or of a PartitionSpec, in its order."""
    return tuple(axis for entry in spec for axis in axes_of(entry))


def only(spec: Spec, axes: Collection[str]) -> Spec:
    """Return a spec with those of its axes that are among `axes`.

    >>> only((("data", "fsdp"), None, "tensor"), ["fsdp"]), only(("data", "tensor"), ["tensor"])
    (('fsdp',), (None, 'tensor'))
    """
    return spec_of(tuple(axis for axis in axes_of(entry) if axis in axes) for entry in spec)


def without(spec: Spec, axes: Collection[str]) -> Spec:
    """Return a spec with those of its axes that are not among `axes`.

    >>> without((("data", "fsdp"), None, "tensor"), ["fsdp"])
    ('data', None, 'tensor')
    """
    return spec_of(tuple(axis for axis in axes_of(entry) if axis not in axes) for entry in spec)


def while_computing(
    dims: Sequence[Sequence[int]],
    shape: Sequence[int],
    axes_of_dim: Mapping[int, tuple[str, ...]],
    mesh: Mapping[str, int],
    first: Collection[int],
) -> list[tuple[str, ...]]:
    """Return the mesh axes of each dimension of an array of a program while computing.

    An axis serves one dimension, those with a dim in `first` before others, and divides it. Of a merged
    dimension only the major part can be sharded.

    >>> mesh, axes = {"data": 2, "fsdp": 3}, {0: ("data",), 1: ("data", "fsdp")}
    >>> while_computing([(0,), (1,)], (8, 6), axes, mesh, {1})
    [(), ('data', 'fsdp')]
    """
    cut: list[tuple[str, ...]] = [()] * len(shape)
    taken: set[str] = set()
    majors = [(composition[0], n) for n, composition in enumerate(dims) if composition]
    for dim, n in sorted(majors, key=lambda place: place[0] not in first):
        axes = tuple(axis for axis in axes_of_dim.get(dim, ()) if axis not in taken)
        if axes and shape[n] % cut_into(axes, mesh) == 0:
            taken.update(axes)
            cut[n] = axes
    return cut


def cut_into(axes: Iterable[str], mesh: Mapping[str, int]) -> int:
    """Return the number of parts that `axes` of `mesh` cut into."""
    return math.prod(mesh[axis] for axis in axes)
