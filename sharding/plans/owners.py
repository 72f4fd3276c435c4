"""Arrays that belong to parameters, such as an optimizer's: whose each is, and how it lies by that."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from ..paths import endings_of
from .specs import Spec, axes_in, by_dimension, cut_into, spec_of

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Owned:
    """An array that belongs to the parameter at path `owner`, to all of them (``*``) or to none (None).

    `dims` has, for each dimension of the array, the dimension of the parameter that it is, None where it is
    none. A `flat` array has the elements of its owner in another shape.
    """

    owner: str | None = None
    dims: tuple[int | None, ...] = ()
    flat: bool = False


ALL = "*"


class Owners:
    """Finds the parameter that an array belongs to, among `params`, path → shape.

    It is the parameter whose path the array's own ends with (``0/mu/layers/wq``), if their shapes have to do
    with each other. Without one it is a parameter of that shape, at the array's place in a list if the array
    stands in one; a vector of as many elements as all parameters have belongs to all.

    >>> owners = Owners({"up": (64, 256), "bias": (256,)})
    >>> owners.of("0/mu/up", (64, 256))
    Owned(owner='up', dims=(0, 1), flat=False)
    >>> owners.of("0/v_col/up", (256,)), owners.of("0/memory/up", (10, 64, 256))
    (Owned(owner='up', dims=(1,), flat=False), Owned(owner='up', dims=(None, 0, 1), flat=False))
    >>> owners.of("0/mu", (64 * 256 + 256,))
    Owned(owner='*', dims=(None,), flat=True)
    """

    def __init__(self, params: Mapping[str, Shape]) -> None:
        self._params = params
        self._paths = tuple(params)
        self._elements = sum(math.prod(shape) for shape in params.values())
        self._known: dict[tuple[str, Shape], Owned] = {}
        self._by_shape: dict[Shape, list[str]] = {}
        for path, shape in params.items():
            self._by_shape.setdefault(shape, []).append(path)

    def of(self, path: str, shape: Shape) -> Owned:
        """Return whose the array at `path` is."""
        if (path, shape) not in self._known:
            self._known[path, shape] = self._found(path, shape)
        return self._known[path, shape]

    def _found(self, path: str, shape: Shape) -> Owned:
        if math.prod(shape) <= 1:
            return Owned()
        named = [owner for owner in endings_of(path) if owner in self._params]
        related = [one for owner in named if (one := related_to(owner, self._params[owner], shape))]
        whole = [one for one in related if len({*one.dims} - {None}) == len(self._params[one.owner or ""])]
        if related:
            return (whole or related)[0]
        for start in range(len(shape)):
            if owners := self._by_shape.get(shape[start:]):
                owner = self._in_list(path, owners)
                return Owned(owner=owner, dims=(None,) * start + tuple(range(len(shape) - start)))
        if len(shape) == 1 and shape[0] == self._elements:
            return Owned(owner=ALL, dims=(None,), flat=True)
        return Owned()

    def _in_list(self, path: str, owners: Sequence[str]) -> str:
        last = path.rsplit("/", 1)[-1]
        own = self._paths[int(last)] if last.isdecimal() and int(last) < len(self._paths) else None
        return own if own is not None and own in owners else owners[0]


def related_to(owner: str, whole: Shape, shape: Shape) -> Owned | None:
    """Return how an array of `shape` has to do with a parameter of shape `whole`, None if it has not.

    Dimensions are matched in order, by their sizes: factored moments lack some, histories have one more, and
    projections one in place of another.
    """
    if shape == whole:
        return Owned(owner=owner, dims=tuple(range(len(whole))))
    for lost in range(len(whole)):
        if whole[:lost] + whole[lost + 1 :] == shape:
            return Owned(owner=owner, dims=tuple(n for n in range(len(whole)) if n != lost))
    start = len(shape) - len(whole)
    if start > 0 and shape[start:] == whole:
        return Owned(owner=owner, dims=(None,) * start + tuple(range(len(whole))))
    if len(shape) != len(whole) and math.prod(shape) == math.prod(whole):
        return Owned(owner=owner, dims=(None,) * len(shape), flat=True)
    dims: list[int | None] = []
    for place, size in enumerate(shape):
        after = max((n for n in dims if n is not None), default=-1)
        ahead = range(after + 1, len(whole))
        # Its own place first, where there is one: several may have its size.
        order = [place, *ahead] if len(shape) == len(whole) and place in ahead else ahead
        dims.append(next((n for n in order if size > 1 and whole[n] == size), None))
    if all(dim is None for dim in dims):
        return None
    return Owned(owner=owner, dims=tuple(dims))


def spec_by_owner(owned: Owned, shape: Shape, spec: Spec, mesh: Mapping[str, int]) -> Spec:
    """Return the spec of an array of `shape` whose owner has `spec`."""
    if owned.flat:
        return spread(shape, axes_in(spec), mesh)
    have = by_dimension(spec, max((n for n in owned.dims if n is not None), default=-1) + 1)
    cut: list[tuple[str, ...]] = [() if n is None else have[n] for n in owned.dims]
    return spec_of(
        axes if size % cut_into(axes, mesh) == 0 else () for size, axes in zip(shape, cut, strict=True)
    )


def spread(shape: Shape, axes: Iterable[str], mesh: Mapping[str, int]) -> Spec:
    """Return the spec of an array that is cut over as many of `axes` as divide one of its dimensions.

    >>> spread((6, 1024), ("data", "fsdp"), {"data": 2, "fsdp": 4})
    (None, ('data', 'fsdp'))
    """
    best: tuple[int, int, tuple[str, ...]] = (1, 0, ())
    for n in sorted(range(len(shape)), key=lambda n: -shape[n]):
        taken: list[str] = []
        for axis in axes:
            if shape[n] % (cut_into(taken, mesh) * mesh[axis]) == 0:
                taken.append(axis)
        if cut_into(taken, mesh) > best[0]:
            best = (cut_into(taken, mesh), n, tuple(taken))
    return spec_of([best[2] if n == best[1] else () for n in range(len(shape))])
