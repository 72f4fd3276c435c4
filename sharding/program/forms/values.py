"""Values of an opened program: what makes them, and what they are where that can be told without data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend import core

from ..pointwise import POINTWISE, SAME, Untold
from .opened import Opening

# Of each dimension of an array, the index of an element: an array of them, all alike in shape.
Index = Sequence[Any]

# How many numbers of one array are put together at most, to tell some of another.
_MOST_PUT_TOGETHER = 1 << 24


class Sources:
    """What makes the values of a program, looked up through the bodies that they are handed into."""

    def __init__(self, opening: Opening) -> None:
        self.opening = opening
        self.consts = {var: one for scope in opening.top.scopes() for var, one in scope.consts.items()}
        self._digests: dict[Any, int] = {}
        self._interned: dict[Any, int] = {}
        self._kept: list[Any] = []

    def made(self, atom: Any, *names: str) -> core.JaxprEqn | None:
        """Return the equation that makes `atom`, if it is one of these primitives or none are given."""
        atom = self.opening.outside(atom)
        eqn = None if isinstance(atom, core.Literal) else self.opening.maker.get(atom)
        return eqn if eqn is not None and (not names or eqn.primitive.name in names) else None

    def plain(self, atom: Any) -> Any:
        """Return what `atom` is before changes of type and name."""
        atom = self.opening.outside(atom)
        while (eqn := self.made(atom, *SAME)) is not None:
            atom = self.opening.outside(eqn.invars[0])
        return atom

    def same(self, one: Any, other: Any) -> bool:
        """Whether two atoms are computed alike from the same values."""
        return self.digest(one) == self.digest(other)

    def digest(self, atom: Any, depth: int = 40) -> int:
        """Return a number that is equal for values that are computed alike from the same values.

        What lies more than `depth` equations back counts as given.
        """
        atom = self.opening.outside(atom)
        if isinstance(atom, core.Literal):
            value = np.asarray(atom.val)
            return self._number(("literal", value.tobytes(), str(value.dtype), value.shape))
        found = self._digests.get(atom)
        if found is None:
            found = self._digests[atom] = self._number(self._key(atom, depth))
        return found

    def _key(self, atom: core.Var, depth: int) -> Any:
        eqn = self.opening.maker.get(atom)
        if eqn is None:
            self._kept.append(self.consts.get(atom, atom))
            return "given", id(self._kept[-1])
        if depth == 0 or eqn.effects or id(eqn) in self.opening.home[atom].bodies:
            return "made", id(atom)
        params = tuple((name, self._word(value)) for name, value in eqn.params.items())
        place = next(n for n, var in enumerate(eqn.outvars) if var is atom)
        return eqn.primitive.name, params, tuple(self.digest(one, depth - 1) for one in eqn.invars), place

    def _word(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(self._word(one) for one in value)
        try:
            hash(value)
        except TypeError:
            value = id(value)
        self._kept.append(value)
        return value

    def _number(self, key: Any) -> int:
        return self._interned.setdefault(key, len(self._interned))

    def number(self, atom: Any) -> float | None:
        """Return the one number that `atom` holds everywhere, None if it cannot be told."""
        atom = self.opening.outside(atom)
        while (eqn := self.made(atom, "broadcast_in_dim", *SAME)) is not None:
            atom = self.opening.outside(eqn.invars[0])
        if shape(atom) != ():
            return None
        try:
            return float(self.points(atom, []))
        except (Untold, TypeError, ValueError, OverflowError):
            return None

    def points(self, atom: Any, at: Index) -> np.ndarray:
        """Return `atom` at some indices, of which None may be one that it does not depend on.

        Raises Untold if it depends on data, or on an index of which None is given.
        """
        atom = self.opening.outside(atom)
        if isinstance(atom, core.Literal):
            return np.asarray(atom.val)
        if atom in self.consts:
            if any(one is None for one in at):
                raise Untold
            return np.asarray(self.consts[atom])[tuple(at)]
        eqn = self.opening.maker.get(atom)
        if eqn is None:
            raise Untold
        name = eqn.primitive.name
        if name in _LAID:
            return _LAID[name](self, eqn, at)
        rule = POINTWISE.get(name)
        if rule is None and name not in SAME:
            raise Untold
        inputs = [self.points(one, at if shape(one) else []) for one in eqn.invars]
        if rule is None:
            return inputs[0].astype(eqn.params["new_dtype"]) if "new_dtype" in eqn.params else inputs[0]
        return np.asarray(rule(*inputs))


def shape(atom: Any) -> tuple[int, ...]:
    """Return the shape of an atom."""
    return tuple(getattr(atom.aval, "shape", ()))


def moved(eqn: core.JaxprEqn, of_result: Sequence[Any], absent: Any) -> list[Any] | None:
    """Return, for each dimension of what `eqn` lays out, what `of_result` has of it; None for others.

    Broadcasts, transposes and squeezes are followed; a dimension of size 1 that is stretched gets `absent`.
    """
    name, before = eqn.primitive.name, shape(eqn.invars[0])
    if name == "broadcast_in_dim":
        where, after = eqn.params["broadcast_dimensions"], eqn.params["shape"]
        return [of_result[d] if before[n] == after[d] else absent for n, d in enumerate(where)]
    if name == "transpose":
        order = list(eqn.params["permutation"])
        return [of_result[order.index(d)] for d in range(len(order))]
    if name == "squeeze":
        kept = iter(of_result)
        dimensions = eqn.params["dimensions"]
        return [absent if d in dimensions else next(kept) for d in range(len(before))]
    return None


def _moved(values: Sources, eqn: core.JaxprEqn, at: Index) -> np.ndarray:
    found = moved(eqn, at, 0)
    assert found is not None
    return values.points(eqn.invars[0], found)


def _iota(values: Sources, eqn: core.JaxprEqn, at: Index) -> np.ndarray:
    del values
    index = at[eqn.params["dimension"]]
    if index is None:
        raise Untold
    return np.asarray(index).astype(eqn.params["dtype"])


def _reshape(values: Sources, eqn: core.JaxprEqn, at: Index) -> np.ndarray:
    before, after = shape(eqn.invars[0]), shape(eqn.outvars[0])
    if any(one is None for one in at):
        # Sizes of 1 come and go without touching the rest.
        kept = [one for one, size in zip(at, after, strict=True) if size > 1]
        if [size for size in before if size > 1] != [size for size in after if size > 1]:
            raise Untold
        rest = iter(kept)
        return values.points(eqn.invars[0], [next(rest) if size > 1 else 0 for size in before])
    if not at:
        return values.points(eqn.invars[0], [0] * len(before))
    place = np.ravel_multi_index(np.broadcast_arrays(*at), after)
    return values.points(eqn.invars[0], list(np.unravel_index(place, before)) if before else [])


def _slice(values: Sources, eqn: core.JaxprEqn, at: Index) -> np.ndarray:
    if any(one is None for one in at):
        raise Untold
    strides = eqn.params["strides"] or (1,) * len(at)
    starts = eqn.params["start_indices"]
    places = [np.asarray(i) * s + b for i, s, b in zip(at, strides, starts, strict=True)]
    return values.points(eqn.invars[0], places)


def _begun(values: Sources, eqn: core.JaxprEqn, at: Index) -> np.ndarray:
    """Return points of a slice that begins where numbers say, which XLA moves so that it lies within."""
    before, after = shape(eqn.invars[0]), shape(eqn.outvars[0])
    starts = [values.number(one) for one in eqn.invars[1:]]
    if any(one is None for one in starts) or any(one is None for one in at):
        raise Untold
    places = [
        np.asarray(i) + min(max(int(begin or 0), 0), whole - size)
        for i, begin, whole, size in zip(at, starts, before, after, strict=True)
    ]
    return values.points(eqn.invars[0], places)


def _joined(values: Sources, eqn: core.JaxprEqn, at: Index) -> np.ndarray:
    axis = eqn.params["dimension"]
    place = at[axis]
    if place is None:
        raise Untold
    found, begin = None, 0
    for one in eqn.invars:
        size = shape(one)[axis]
        if size:
            index = [
                np.clip(np.asarray(place) - begin, 0, size - 1) if n == axis else i for n, i in enumerate(at)
            ]
            here = values.points(one, index)
            found = here if found is None else np.where(np.asarray(place) >= begin, here, found)
        begin += size
    if found is None:
        raise Untold
    return found


def _reversed(values: Sources, eqn: core.JaxprEqn, at: Index) -> np.ndarray:
    sizes, turned = shape(eqn.invars[0]), eqn.params["dimensions"]
    if any(at[d] is None for d in turned):
        raise Untold
    return values.points(eqn.invars[0], [sizes[d] - 1 - i if d in turned else i for d, i in enumerate(at)])


def _padded(values: Sources, eqn: core.JaxprEqn, at: Index) -> np.ndarray:
    around, sizes = eqn.params["padding_config"], shape(eqn.invars[0])
    if any(one is None for one in at) or any(between for _, _, between in around) or 0 in sizes:
        raise Untold
    places = [np.asarray(i) - before for i, (before, _, _) in zip(at, around, strict=True)]
    index = [np.clip(i, 0, size - 1) for i, size in zip(places, sizes, strict=True)]
    within = np.all([i == j for i, j in zip(np.broadcast_arrays(*places), index, strict=True)], axis=0)
    return np.where(within, values.points(eqn.invars[0], index), values.points(eqn.invars[1], []))


def _together(values: Sources, eqn: core.JaxprEqn, at: Index, axes: Sequence[int]) -> np.ndarray:
    """Return the operand at the indices `at`, where `axes` are whole and come last, as one."""
    sizes = [shape(eqn.invars[0])[axis] for axis in axes]
    known = [one for one in at if one is not None]
    points = np.broadcast_shapes(*(np.shape(one) for one in known))
    if math.prod(points) * math.prod(sizes) > _MOST_PUT_TOGETHER or not _exact(eqn):
        raise Untold
    rest = iter(at)
    whole = dict(zip(axes, np.indices(sizes).reshape(len(axes), -1), strict=True))
    index: list[Any] = []
    for axis in range(len(shape(eqn.invars[0]))):
        one = whole[axis] if axis in whole else next(rest)
        index.append(one if one is None or axis in whole else np.asarray(one)[..., None])
    found = values.points(eqn.invars[0], index)
    # What depends on no index of its own is the same number at all of them.
    last = found if found.ndim else found[None]
    return np.broadcast_to(last, (*(points if last.ndim > 1 else ()), math.prod(sizes)))


def _exact(eqn: core.JaxprEqn) -> bool:
    """Whether an operand has whole numbers or truth values, of which no sum is rounded."""
    kind = eqn.invars[0].aval.dtype  # pyright: ignore[reportAttributeAccessIssue]
    return kind == np.bool_ or np.issubdtype(kind, np.integer)


def _reduced(rule: Callable[..., Any]) -> Callable[[Sources, core.JaxprEqn, Index], np.ndarray]:
    def reduce(values: Sources, eqn: core.JaxprEqn, at: Index) -> np.ndarray:
        found = rule(_together(values, eqn, at, eqn.params["axes"]), axis=-1)
        return np.asarray(found).astype(eqn.outvars[0].aval.dtype)  # pyright: ignore[reportAttributeAccessIssue]

    return reduce


def _running(rule: Callable[..., Any]) -> Callable[[Sources, core.JaxprEqn, Index], np.ndarray]:
    def run(values: Sources, eqn: core.JaxprEqn, at: Index) -> np.ndarray:
        axis, place = eqn.params["axis"], at[eqn.params["axis"]]
        if place is None:
            raise Untold
        whole = _together(values, eqn, [one for n, one in enumerate(at) if n != axis], [axis])
        way = slice(None, None, -1 if eqn.params["reverse"] else 1)
        found = rule(whole[..., way], axis=-1).astype(whole.dtype)[..., way]
        shaped = np.broadcast_shapes(np.shape(place), found.shape[:-1])
        found = np.broadcast_to(found, (*shaped, found.shape[-1]))
        return np.take_along_axis(found, np.broadcast_to(place, shaped)[..., None], -1)[..., 0]

    return run


_LAID: Mapping[str, Callable[[Sources, core.JaxprEqn, Index], np.ndarray]] = {
    "iota": _iota,
    "broadcast_in_dim": _moved,
    "transpose": _moved,
    "squeeze": _moved,
    "reshape": _reshape,
    "slice": _slice,
    "dynamic_slice": _begun,
    "concatenate": _joined,
    "pad": _padded,
    "rev": _reversed,
    "argmax": _reduced(np.argmax),
    "argmin": _reduced(np.argmin),
    "cummax": _running(np.maximum.accumulate),
    "cummin": _running(np.minimum.accumulate),
    "cumsum": _running(np.cumsum),
    "reduce_and": _reduced(np.all),
    "reduce_max": _reduced(np.max),
    "reduce_min": _reduced(np.min),
    "reduce_or": _reduced(np.any),
    "reduce_sum": _reduced(np.sum),
}
