"""Biases of scores that are worked out for any block of queries and keys.

Such a bias is a program of arrays that are of queries, of keys, or of neither: distances of positions times
a slope of each head, say. No array of all queries and keys is made of it, and its gradient is a sum over
blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# What a dimension of an array is of scores.
BATCH, HEADS, QUERIES, KEYS = "batch", "heads", "queries", "keys"
_ORDER = (BATCH, HEADS, QUERIES, KEYS)

# Of each dimension of an array what it is of scores, major to minor; nothing if that is none, or of size 1.
Roles = tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class BiasOperand:
    """An array that a bias is made of, and what its dimensions are: at most one of queries or of keys.

    An array of queries or of keys is handed on with its batch in front and these behind, as rows lie.
    """

    roles: Roles

    @property
    def along(self) -> str | None:
        """`QUERIES` or `KEYS` if it has one number, or several, for each of these."""
        return next((role for dim in self.roles for role in dim if role in (QUERIES, KEYS)), None)

    @property
    def laid(self) -> Roles:
        """What its dimensions are as it is handed on."""
        if self.along is None:
            return self.roles
        rest = tuple(dim for dim in self.roles if dim not in ((BATCH,), (self.along,)))
        return ((BATCH,) if (BATCH,) in self.roles else (), (self.along,), *rest)

    def _first(self) -> list[int]:
        return [self.roles.index(dim) for dim in ((BATCH,), (self.along,)) if dim in self.roles]

    def into(self, x: jax.Array) -> jax.Array:
        """Return the array as it is handed on."""
        if self.along is None:
            return x
        first = self._first()
        x = jnp.moveaxis(x, first, range(len(first)))
        return x if len(first) == 2 else x[None]

    def out_of(self, x: jax.Array) -> jax.Array:
        """Return what `into` was given."""
        if self.along is None:
            return x
        first = self._first()
        return jnp.moveaxis(x if len(first) == 2 else x[0], range(len(first)), first)


class Fixed(NamedTuple):
    """A number of a program, and its type."""

    value: Any
    dtype: str


class Distance(NamedTuple):
    """What gives how far queries stand behind keys, or before them: a sign, and what is added to it."""

    sign: int
    added: int

    @property
    def name(self) -> str:
        """What stands for a primitive's name."""
        return f"distance {self.sign} {self.added}"


@dataclasses.dataclass(frozen=True)
class BiasStep:
    """A primitive on earlier values, by their numbers, or fixed ones; its result's roles and whole shape."""

    primitive: Any
    params: Mapping[str, Any]
    inputs: tuple[int | Fixed, ...]
    roles: Roles
    shape: tuple[int, ...]

    @property
    def told(self) -> str:
        """All of it in words."""
        params = ", ".join(f"{name}={self.params[name]}" for name in sorted(self.params))
        return f"{self.primitive.name}[{params}] {self.inputs} {self.roles} {self.shape}"


@dataclasses.dataclass(frozen=True, eq=False)
class PlacedBias:
    """A bias as a program: its arrays, its steps, and the values that are summed, each with a factor.

    Equal ones have equal steps, whatever program they were found in. `places` are the operands that have the
    places of queries and of keys, if distances are made of them. With `by_line` it depends on distances
    alone, and is worked out once for each.
    """

    operands: tuple[BiasOperand, ...]
    steps: tuple[BiasStep, ...]
    sums: tuple[tuple[int, float], ...]
    places: tuple[int, int] | None = None
    by_line: bool = False

    @functools.cached_property
    def digest(self) -> str:
        """A word that tells it from others."""
        told = [*(str(one) for one in self.operands), *(one.told for one in self.steps), str(self.sums)]
        told.append(f"{self.places} {self.by_line}")
        return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PlacedBias) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def has(self, role: str) -> bool:
        """Whether it differs along this dimension of scores."""
        return any(role in dim for one in self.operands for dim in one.roles)

    @property
    def may_learn(self) -> bool:
        """Whether it is made of anything but places."""
        return len(self.operands) > len(self.places or ())

    def of(self, along: str | None, arrays: Sequence[Any]) -> list[Any]:
        """Return which of the operands are of queries, of keys, or of neither."""
        return [x for one, x in zip(self.operands, arrays, strict=True) if one.along == along]

    def joined(self, arrays: Mapping[str | None, Sequence[Any]]) -> tuple[Any, ...]:
        """Return the operands in order, of those of queries, of keys and of neither."""
        found = {along: iter(some) for along, some in arrays.items()}
        return tuple(next(found[one.along]) for one in self.operands)

    def fits(self, shapes: Sequence[tuple[int, ...]], sizes: Mapping[str, int]) -> bool:
        """Whether arrays of `shapes` are its operands, for scores of `sizes`."""
        return len(shapes) == len(self.operands) and all(
            len(shape) == len(one.laid)
            and all(size == _size(dim, sizes, size) for size, dim in zip(shape, one.laid, strict=True))
            for shape, one in zip(shapes, self.operands, strict=True)
        )

    def __call__(
        self, arrays: Sequence[jax.Array], sizes: Mapping[str, int], span: int | None = None
    ) -> jax.Array:
        """Return the bias for a block of scores of `sizes`: float32 ``[batch, heads, queries, keys]``, or 1.

        `arrays` are the operands as they are handed on, of the block's queries and keys. Keys follow one
        another, and so do queries; if not, they lie within `span` places.
        """
        if not self.by_line:
            return self._worth(arrays, sizes, None)
        line, queries = self._line(arrays, sizes, (span or sizes[QUERIES]) + sizes[KEYS] - 1)
        return _by_distance(line, queries - queries[0], sizes[KEYS], apart=span is not None)

    def of_block(self, arrays: Sequence[jax.Array], sizes: Mapping[str, int]) -> jax.Array:
        """Return what a call does, for queries that follow one another and that no mesh axis cuts."""
        if not self.by_line:
            return self._worth(arrays, sizes, None)
        line, _ = self._line(arrays, sizes, sizes[QUERIES] + sizes[KEYS] - 1)
        return _doubled(line, sizes[QUERIES])

    def _line(
        self, arrays: Sequence[jax.Array], sizes: Mapping[str, int], whole: int
    ) -> tuple[jax.Array, jax.Array]:
        """Return what each of the `whole` distances has, the largest first, and the places of queries."""
        assert self.places is not None
        queries, keys = (arrays[n][0] for n in self.places)
        line = queries[0] - keys[-1] + jnp.arange(whole, dtype=queries.dtype)
        found = self._worth(arrays, {**sizes, QUERIES: whole, KEYS: 1}, line)[..., 0]
        return found[..., ::-1], queries

    def _worth(
        self, arrays: Sequence[jax.Array], sizes: Mapping[str, int], line: jax.Array | None
    ) -> jax.Array:
        """Return the bias for scores of `sizes`; for a `line` of distances, with one key."""
        values = [one.out_of(x) for one, x in zip(self.operands, arrays, strict=True)]
        roles = [one.roles for one in self.operands] + [one.roles for one in self.steps]
        for step in self.steps:
            if isinstance(step.primitive, Distance):
                queries, keys = (values[n] for n in self.places or ())
                apart = queries[:, None] - keys[None] if line is None else line[:, None]
                values.append(_distances(step, apart, sizes))
                continue
            inputs = [
                np.asarray(x.value, x.dtype) if isinstance(x, Fixed) else values[x] for x in step.inputs
            ]
            values.append(step.primitive.bind(*inputs, **_params(step, inputs, roles, sizes)))
        found = [_over_scores(values[n].astype(jnp.float32), roles[n]) * by for n, by in self.sums]
        return functools.reduce(jnp.add, found)


class BoundBias(NamedTuple):
    """A bias and its operands, as they are handed on."""

    bias: PlacedBias
    arrays: tuple[jax.Array, ...]
    span: int | None = None
    """Within how many places queries lie that do not follow one another."""

    @property
    def of_queries(self) -> list[jax.Array]:
        """The operands that are of queries."""
        return self.bias.of(QUERIES, self.arrays)

    def with_queries(self, arrays: Sequence[jax.Array], span: int) -> BoundBias:
        """Return it with other operands that are of queries, which lie within `span` places."""
        others = {along: self.bias.of(along, self.arrays) for along in (KEYS, None)}
        return self._replace(arrays=self.bias.joined({QUERIES: arrays, **others}), span=span)


def _distances(step: BiasStep, apart: jax.Array, sizes: Mapping[str, int]) -> jax.Array:
    """Return distances ``[queries, keys]`` as the result of a step lies."""
    found = (apart * step.primitive.sign + step.primitive.added).astype(step.params["dtype"])
    places = [step.roles.index((role,)) for role in (QUERIES, KEYS)]
    found = found if places == sorted(places) else found.T
    return jax.lax.broadcast_in_dim(found, _shape(step, sizes), sorted(places))


def _by_distance(line: jax.Array, places: jax.Array, keys: int, *, apart: bool) -> jax.Array:
    """Return what a `line` of all distances, the largest first, has for each query and key.

    Queries are at `places` after the first of them, one after another if not `apart`.
    """
    *rest, whole = line.shape
    rows = len(places)
    if apart:
        begin = whole - keys - places
        cut = jax.vmap(lambda n: jax.lax.dynamic_slice_in_dim(line, n, keys, axis=-1), out_axes=-2)
        return cut(begin)
    # Each row begins one number before the last: what is laid end to end with one more lies so.
    line = jnp.pad(line, [(0, 0)] * len(rest) + [(0, 1)])
    line = jnp.broadcast_to(line[..., None, :], (*rest, rows, whole + 1)).reshape(*rest, rows * (whole + 1))
    return line[..., : rows * whole].reshape(*rest, rows, whole)[..., rows - 1 :]


def _doubled(line: jax.Array, rows: int) -> jax.Array:
    """Return what a `line` of all distances, the largest first, has for each of `rows` queries and each key.

    Twice as many rows are those that there are, and the same further on along the line. To a TPU that is
    half the work of laying rows end to end, whose numbers all change their places in registers. Where an
    axis cuts queries, their rows would be put together from those of other devices.
    """
    laid, width = line[..., None, :], line.shape[-1]
    while (there := laid.shape[-2]) < rows:
        more = min(rows - there, there)
        width -= more
        laid = jnp.concatenate([laid[..., :more, more:], laid[..., :width]], axis=-2)
    return laid


def _size(dim: Sequence[str], sizes: Mapping[str, int], own: int) -> int:
    return math.prod(sizes[role] for role in dim) if dim else own


def _shape(step: BiasStep, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(_size(dim, sizes, own) for dim, own in zip(step.roles, step.shape, strict=True))


def _params(
    step: BiasStep, inputs: Sequence[Any], roles: Sequence[Roles], sizes: Mapping[str, int]
) -> Mapping[str, Any]:
    """Return the parameters of a step whose result is of `sizes`."""
    name = step.primitive.name
    shape = _shape(step, sizes)
    if name == "broadcast_in_dim":
        return {**step.params, "shape": shape}
    if name == "reshape":
        return {**step.params, "new_sizes": shape}
    if name == "slice":
        first = step.params["start_indices"]
        last = tuple(
            begin + size if dim else end
            for begin, size, dim, end in zip(
                first, shape, step.roles, step.params["limit_indices"], strict=True
            )
        )
        return {**step.params, "limit_indices": last}
    if name == "gather":
        assert isinstance(step.inputs[0], int)
        lies = zip(roles[step.inputs[0]], inputs[0].shape, step.params["slice_sizes"], strict=True)
        return {**step.params, "slice_sizes": tuple(whole if dim else own for dim, whole, own in lies)}
    return step.params


def _over_scores(x: jax.Array, roles: Roles) -> jax.Array:
    """Return an array as ``[batch, heads, queries, keys]``, of size 1 what it has not."""
    places = [next((n for n, dim in enumerate(roles) if dim == (role,)), None) for role in _ORDER]
    there = [n for n in places if n is not None]
    x = x.transpose(*there, *(n for n in range(x.ndim) if n not in there))
    found = iter(x.shape)
    return x.reshape([1 if n is None else next(found) for n in places])
