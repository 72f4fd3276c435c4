"""Masks that depend on places only, as the stretch of keys that each query sees.

A mask is proved, never built: most are functions of how far a key lies behind a query, and are worked out at
each such distance; an equality of something of the query and something of the key is worked out along each.
What is neither is worked out at every point, some rows at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend import core

from ..pointwise import POINTWISE, SAME, Untold
from .values import Sources, moved, shape

# Points at which a mask is worked out at most, and at a time.
_MOST_POINTS = 1 << 26
_POINTS = 1 << 20

# What stands for the place of a query and of a key along a dimension of a mask.
ROW, KEY = "row", "key"


class NotThis(Exception):
    """What was found is not of the form, or of it in a way that it cannot be written in; says why."""


@dataclasses.dataclass(frozen=True, eq=False)
class Spans:
    """The keys that each query sees: from `low` to `high`, int64 ``[queries]``; none where that is less."""

    low: np.ndarray
    high: np.ndarray

    def within(self, other: Spans) -> Spans:
        """Return what both let through."""
        return Spans(np.maximum(self.low, other.low), np.minimum(self.high, other.high))

    @property
    def empty(self) -> bool:
        """Whether some query sees nothing."""
        return bool((self.low > self.high).any())


def all_of(queries: int, keys: int) -> Spans:
    """Return what hides nothing."""
    return Spans(np.zeros(queries, np.int64), np.full(queries, keys - 1, np.int64))


def spans(
    values: Sources, atom: Any, at: Sequence[Any], sizes: tuple[int, int], seen: Callable[[Any], Any]
) -> Spans | None:
    """Return what a mask lets through, None where queries do not each see one stretch of keys.

    Args:
        values: of the program.
        atom: the mask.
        at: of each of its dimensions `ROW`, `KEY`, 0 for one of size 1, or None for any other.
        sizes: how many queries and keys there are.
        seen: from the mask's numbers to whether they let through; raises Untold if they are no mask's.

    Raises:
        Untold: it depends on data, or on a dimension that is neither queries nor keys.
    """
    queries, keys = sizes
    if ROW not in at or KEY not in at:
        return _of_one(values, atom, at, sizes, seen)
    try:
        distance = np.arange(-(keys - 1), queries)
        visible = np.broadcast_to(seen(_Distance(values, distance).worth(atom, at)), distance.shape)
        return _of_distances(visible, sizes)
    except Untold:
        pass
    equal = values.made(atom, "eq")
    if equal is not None and len(at) == len(shape(atom)):
        found = _of_equality(values, equal, at, sizes)
        if found is not None and bool(seen(np.True_)) and not bool(seen(np.False_)):
            return found
    if queries * keys > _MOST_POINTS:
        raise Untold
    return _of_points(values, atom, at, sizes, seen)


def linear(values: Sources, atom: Any, at: Sequence[Any]) -> tuple[float, float, float] | None:
    """Return what a value is multiples of, the query's place and the key's, and what is added; None if not.

    `at` is as `spans` takes it.
    """
    try:
        found = _Distance(values, np.zeros(1, np.int64)).value(atom, at)
    except (Untold, TypeError, ValueError, IndexError):
        return None
    return (found.row, found.key, found.constant) if isinstance(found, _Affine) else None


def _of_one(
    values: Sources, atom: Any, at: Sequence[Any], sizes: tuple[int, int], seen: Callable[[Any], Any]
) -> Spans | None:
    """Return the spans of a mask of queries alone, of keys alone, or of neither."""
    queries, keys = sizes
    if ROW in at:
        visible = _line(values, atom, at, ROW, queries, seen)
        return Spans(np.zeros(queries, np.int64), np.where(visible, keys - 1, -1).astype(np.int64))
    visible = _line(values, atom, at, KEY, keys, seen)
    places = np.flatnonzero(visible)
    if not places.size:
        return Spans(np.zeros(queries, np.int64), np.full(queries, -1, np.int64))
    if places[-1] - places[0] + 1 != places.size:
        return None
    return Spans(np.full(queries, places[0], np.int64), np.full(queries, places[-1], np.int64))


def _line(
    values: Sources, atom: Any, at: Sequence[Any], along: str, size: int, seen: Callable[[Any], Any]
) -> np.ndarray:
    index = [np.arange(size) if one == along else one for one in at]
    return np.broadcast_to(seen(values.points(atom, index)), (size,))


def _of_distances(visible: np.ndarray, sizes: tuple[int, int]) -> Spans | None:
    queries, keys = sizes
    places = np.flatnonzero(visible)
    rows = np.arange(queries)
    if not places.size:
        return Spans(np.zeros(queries, np.int64), np.full(queries, -1, np.int64))
    nearest, furthest = places[0] - (keys - 1), places[-1] - (keys - 1)
    if places[-1] - places[0] + 1 != places.size:
        return None
    return Spans(np.maximum(rows - furthest, 0), np.minimum(rows - nearest, keys - 1))


def _of_equality(
    values: Sources, equal: core.JaxprEqn, at: Sequence[Any], sizes: tuple[int, int]
) -> Spans | None:
    """Return the spans of what has one number for a query and a key, where that makes stretches of keys."""
    queries, keys = sizes
    sides = []
    for one in equal.invars:
        found = {}
        for along, size in ((ROW, queries), (KEY, keys)):
            index = [np.arange(size) if d == along else None if d in (ROW, KEY) else d for d in at]
            try:
                found[along] = np.broadcast_to(values.points(one, index if shape(one) else []), (size,))
            except Untold:
                continue
        sides.append(found)
    for one, other in (sides, sides[::-1]):
        if ROW in one and KEY in other:
            return _stretches(one[ROW], other[KEY])
    return None


def _stretches(of_rows: np.ndarray, of_keys: np.ndarray) -> Spans | None:
    kinds, first, count = np.unique(of_keys, return_index=True, return_counts=True)
    last = len(of_keys) - 1 - np.unique(of_keys[::-1], return_index=True)[1]
    place = np.minimum(np.searchsorted(kinds, of_rows), len(kinds) - 1)
    known = kinds[place] == of_rows
    used = np.unique(place[known])
    if (last[used] - first[used] + 1 != count[used]).any():
        return None
    return Spans(np.where(known, first[place], 0), np.where(known, last[place], -1))


def _of_points(
    values: Sources, atom: Any, at: Sequence[Any], sizes: tuple[int, int], seen: Callable[[Any], Any]
) -> Spans | None:
    queries, keys = sizes
    low, high = np.zeros(queries, np.int64), np.full(queries, -1, np.int64)
    step = max(1, _POINTS // keys)
    for start in range(0, queries, step):
        rows = np.arange(start, min(start + step, queries))
        grid = np.broadcast_arrays(rows[:, None], np.arange(keys)[None])
        index = [grid[0] if d == ROW else grid[1] if d == KEY else d for d in at]
        visible = np.broadcast_to(seen(values.points(atom, index)), grid[0].shape)
        some = visible.any(1)
        first, last = visible.argmax(1), keys - 1 - visible[:, ::-1].argmax(1)
        if (visible.sum(1)[some] != (last - first + 1)[some]).any():
            return None
        low[rows], high[rows] = np.where(some, first, 0), np.where(some, last, -1)
    return Spans(low, high)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """What places alone let queries see, in the words of `ops.attention`.

    block: keys of the same block of so many places; first and last: keys from one place to another; ahead and
    prefix: what is seen beyond causality.
    """

    causal: bool = False
    window: int | None = None
    ahead: int = 0
    prefix: int = 0
    block: int | None = None
    first: int | None = None
    last: int | None = None


def seen_by(spans: Spans, keys: int) -> Seen:
    """Return what spans of `keys` are in the words of a call. Raises NotThis if they are none of them."""
    low, high = spans.low, spans.high
    if spans.empty:
        raise NotThis("some queries see no key by their place")
    if (low == low[0]).all() and (high == high[0]).all():
        return Seen(first=int(low[0]) or None, last=int(high[0]))
    found = _by_distance(low, high)
    # Keys at the end that nobody sees, though a query's place would let it.
    last = int(high.max())
    if last >= min(len(low) - 1 + found.ahead, keys - 1):
        return found
    if found.block is not None:
        raise NotThis("its mask by places has blocks, and keys that no query sees")
    return dataclasses.replace(found, last=last)


def _by_distance(low: np.ndarray, high: np.ndarray) -> Seen:
    queries, rows = len(low), np.arange(len(low))
    keys = int(high.max()) + 1
    if (high == np.minimum(rows, keys - 1)).all():
        if not low.any():
            return Seen(causal=True)
        window = int((rows - low).max()) + 1
        if (low == np.maximum(rows - window + 1, 0)).all():
            return Seen(causal=True, window=window)
        if (block := _block(low)) is not None:
            return Seen(causal=True, block=block)
    elif (block := _block(low)) is not None and (high == np.minimum(low + block, queries) - 1).all():
        return Seen(block=block)
    if (found := _band(low, high, keys)) is not None:
        return found
    if not low.any() and (high == np.minimum(np.maximum(rows, high[0]), keys - 1)).all():
        return Seen(causal=True, prefix=int(high[0]) + 1)
    raise NotThis("its mask by places is neither causal, nor a window or blocks")


def _band(low: np.ndarray, high: np.ndarray, keys: int) -> Seen | None:
    """Return keys from so many places before a query to so many after it, None if they are not that."""
    rows = np.arange(len(low))
    ahead, behind = int((high - rows).max()), int((rows - low).max())
    if ahead < 0 or behind < 0:
        return None
    if (high != np.minimum(rows + ahead, keys - 1)).any():
        return None
    if not low.any():
        return Seen(causal=True, ahead=ahead)
    if (low != np.maximum(rows - behind, 0)).any():
        return None
    return Seen(causal=True, ahead=ahead, window=behind + 1)


def _block(low: np.ndarray) -> int | None:
    """Return the size of equal blocks that begin at `low`, None if they do not."""
    starts = np.flatnonzero(low == np.arange(len(low)))
    size = int(starts[1]) if len(starts) > 1 else len(low)
    return size if (low == np.arange(len(low)) // size * size).all() else None


@dataclasses.dataclass(frozen=True)
class _Affine:
    """A number that is ``row`` times the query's place, plus ``key`` times the key's, plus ``constant``."""

    row: float
    key: float
    constant: float


_COMPARED = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})


class _Distance:
    """Works values out at each distance between a query and a key, where they depend on nothing else."""

    def __init__(self, values: Sources, distance: np.ndarray) -> None:
        self._values = values
        self._distance = distance

    def worth(self, atom: Any, at: Sequence[Any]) -> np.ndarray:
        """Return the value at each distance. Raises Untold if it depends on anything else."""
        return self._array(self.value(atom, at))

    def _array(self, value: Any) -> np.ndarray:
        if not isinstance(value, _Affine):
            return value
        if value.row != -value.key:
            raise Untold
        return value.row * self._distance + value.constant

    def value(self, atom: Any, at: Sequence[Any]) -> Any:
        """Return the value at each distance, or how it is made of the places themselves."""
        atom = self._values.opening.outside(atom)
        if isinstance(atom, core.Literal) or (atom in self._values.consts and not at):
            return self._values.points(atom, [])
        if ROW not in at and KEY not in at:
            return self._values.points(atom, at)
        eqn = self._values.made(atom)
        if eqn is None:
            raise Untold
        name = eqn.primitive.name
        if name == "iota":
            along = at[eqn.params["dimension"]]
            if along is None:
                raise Untold
            return np.asarray(0) if along == 0 else _Affine(float(along == ROW), float(along == KEY), 0.0)
        laid = moved(eqn, at, 0) if name != "reshape" else _reshaped(eqn, at)
        if laid is not None:
            return self.value(eqn.invars[0], laid)
        if name not in POINTWISE and name not in SAME:
            raise Untold
        inputs = [self.value(one, at if shape(one) else []) for one in eqn.invars]
        if name in SAME:
            kind = eqn.params.get("new_dtype")
            return inputs[0] if isinstance(inputs[0], _Affine) or kind is None else inputs[0].astype(kind)
        return self._pointwise(name, inputs)

    def _pointwise(self, name: str, inputs: Sequence[Any]) -> Any:
        if any(isinstance(one, _Affine) for one in inputs):
            if name in _COMPARED:
                gap = self._array(_sum(inputs[0], _times(inputs[1], -1.0)))
                return POINTWISE[name](gap, 0)
            if name in ("add", "sub", "neg", "mul"):
                with_sign = {"add": 1.0, "sub": -1.0}
                if name in with_sign:
                    return _sum(inputs[0], _times(inputs[1], with_sign[name]))
                if name == "neg":
                    return _times(inputs[0], -1.0)
                one, other = inputs if isinstance(inputs[0], _Affine) else inputs[::-1]
                if not isinstance(other, _Affine) and np.ndim(other) == 0:
                    return _times(one, float(other))
        return np.asarray(POINTWISE[name](*(self._array(one) for one in inputs)))


def _sum(one: Any, other: Any) -> Any:
    pair = [one, other]
    if not any(isinstance(x, _Affine) for x in pair):
        return one + other
    if any(not isinstance(x, _Affine) and np.ndim(x) for x in pair):
        raise Untold
    parts = [x if isinstance(x, _Affine) else _Affine(0.0, 0.0, float(x)) for x in pair]
    return _Affine(*(sum(getattr(x, part) for x in parts) for part in ("row", "key", "constant")))


def _times(one: Any, number: float) -> Any:
    if isinstance(one, _Affine):
        return _Affine(one.row * number, one.key * number, one.constant * number)
    return np.asarray(one) * number


def _reshaped(eqn: core.JaxprEqn, at: Sequence[Any]) -> list[Any] | None:
    """Return what a reshape that only adds and drops dimensions of size 1 has of each dimension before it."""
    before, after = shape(eqn.invars[0]), shape(eqn.outvars[0])
    if [size for size in before if size > 1] != [size for size in after if size > 1]:
        raise Untold
    rest = iter([one for one, size in zip(at, after, strict=True) if size > 1])
    return [next(rest) if size > 1 else 0 for size in before]
