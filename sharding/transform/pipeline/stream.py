"""What travels from stage to stage of one microbatch, and how the stages share its rows out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from ...program.jaxpr import is_extended
from ..meshes import by_device
from .slots import STAGE

Array = Any
# One array for each thing that travels, or the gradients of those that have one.
Stream = list[Array]

CONSTANT, CARRIED, GIVEN, PASSED = "constant", "carried", "given", "passed"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Travelling:
    """One thing that travels: its shape and type of a whole microbatch, and its named dimensions.

    kind: a CONSTANT of all layers, CARRIED from each to the next, or GIVEN by each for what is behind all:
      then its first dimension are the layers, and each fills in its own place. PASSED by all layers, as they
      are behind an earlier stack of layers, for what is behind these.
    rows: the dimension that holds the microbatch's rows, or None.
    summed: without rows, whether a microbatch's is the sum of its shares' rather than the same in all.
    """

    shape: tuple[int, ...]
    dtype: Any
    dims: Any
    kind: str
    rows: int | None
    summed: bool

    @property
    def is_read(self) -> bool:
        """Whether layers read it."""
        return self.kind in (CONSTANT, CARRIED)

    @property
    def differs(self) -> bool:
        """Whether it has a gradient."""
        return bool(jnp.issubdtype(self.dtype, jnp.inexact))

    def bare(self, value: Array) -> Array:
        """Return it as it is sent: random keys as their numbers."""
        return bare(value)

    def dressed(self, value: Array) -> Array:
        """Return it as layers take it."""
        return dressed(value, self.dtype)

    def blank(self) -> Array:
        """Return zeros, as it is sent."""
        of = jax.eval_shape(self.bare, jax.ShapeDtypeStruct(self.shape, self.dtype))
        return jnp.zeros(of.shape, of.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Stages:
    """`count` stages that hand on `items`, which lie over automatic axes of `mesh` as `lies` says.

    So many as `sharers` share a microbatch's rows out; where these are fewer than stages, each stage has the
    share of its number modulo `sharers`, and of stages with the same share the first counts.

    `on_cpu` sends nothing smaller than float32, and one array after another: there devices begin exchanges
    that do not wait for one another in different orders, and then wait for each other for ever. What was
    `received` last in a tick are numbers, all 0, that are there when it is; stages of several stacks have
    them in common.
    """

    count: int
    sharers: int
    items: Sequence[Travelling]
    lies: Sequence[PartitionSpec]
    mesh: Any
    on_cpu: bool
    received: list[Array] = dataclasses.field(default_factory=list)

    def begin(self) -> None:
        """Begin a tick."""
        self.received.clear()

    def after(self, value: Array) -> Array:
        """Return what a stage's work begins with, on CPUs when the work and the exchanges before are done.

        Attention over `context`, and what else exchanges in a stage's work, would begin beside them else.
        """
        if not self.received:
            return value
        nothing = functools.reduce(lax.bitwise_or, self.received)
        return lax.select(jnp.broadcast_to(nothing == 0, value.shape), value, jnp.zeros_like(value))

    def done(self, values: Iterable[Array]) -> None:
        """Have what a stage exchanges next wait on CPUs for what its work has given."""
        if self.on_cpu:
            self.received.extend(_nothing(bare(value)) for value in values if value.size)

    @property
    def index(self) -> Array:
        """Which stage a device has."""
        return lax.axis_index(STAGE)

    def blank(self) -> Stream:
        """Return zeros for all that travels."""
        return [one.blank() for one in self.items]

    def learning(self, stream: Stream) -> Stream:
        """Return what of a stream has a gradient."""
        return [value for value, one in zip(stream, self.items, strict=True) if one.differs]

    def joined(self, learning: Stream, others: Stream) -> Stream:
        """Return a stream with other values of what has a gradient."""
        found = iter(learning)
        return [next(found) if one.differs else value for value, one in zip(others, self.items, strict=True)]

    def entering(self, learning: Stream) -> Stream:
        """Return the gradients of what is there before the layers."""
        kinds = [one.kind for one in self.items if one.differs]
        return [value for value, kind in zip(learning, kinds, strict=True) if kind != GIVEN]

    def hand_on(self, stream: Stream, way: int, learning: bool = False) -> Stream:
        """Send to the next stage, or to the one before."""
        pairs = [(n, (n + way) % self.count) for n in range(self.count)]
        return self._each(lambda value, _: lax.ppermute(value, STAGE, pairs), stream, learning)

    def put_together(self, shares: Stream) -> Stream:
        """Return what enters a microbatch's layers, of the stages' shares, and room for what they give."""

        def together(value: Array, one: Travelling) -> Array:
            if one.rows is not None:
                return self._gather(value, one.rows)
            return self._sum(self.counted(value)) if one.summed else value

        found = iter(shares)
        full = [one.blank() if one.kind == GIVEN else next(found) for one in self.items]
        return self._each(lambda v, one: v if one.kind == GIVEN else together(v, one), full)

    def shared_out(self, stream: Stream, owner: Array) -> Stream:
        """Give each stage its share of what the stage that is `owner` has."""

        def share(value: Array, one: Travelling) -> Array:
            if one.rows is not None:
                return self._scatter(value, one.rows)
            if not one.summed:
                return self._sum(value)
            # Of a sum, one of the shares may be all of it.
            return (
                value if self._all_count else jnp.where(self.index % self.sharers == 0, self._sum(value), 0)
            )

        return self._each(share, self._of_owner(stream, owner))

    def gradient_of_shares(self, gradient: Stream, owner: Array) -> Stream:
        """Return the gradient of what `shared_out` took."""

        def whole(value: Array, one: Travelling) -> Array:
            if one.rows is not None:
                return self._gather(value, one.rows)
            # What all have, each has a part of the gradient of.
            return self._sum(self.counted(value))

        learning = [one for one in self.items if one.differs]
        # All of a sum is the owner's share, or the first stage's.
        owner = owner if self._all_count else self.index == 0
        own = [
            jnp.where(owner, value, 0) if one.summed else value
            for value, one in zip(gradient, learning, strict=True)
        ]
        return self._each(whole, own, learning=True)

    def shares_of_gradient(self, gradient: Stream, owner: Array) -> Stream:
        """Return each stage's gradient of what it gave `put_together`, of that which the `owner` has."""

        def share(value: Array, one: Travelling) -> Array:
            if one.rows is not None:
                return self._scatter(value, one.rows)
            # Of what all have one stage's gradient is enough: those of all are summed.
            return self._sum(value) if one.summed else value

        return self.entering(self._each(share, self._of_owner(gradient, owner), learning=True))

    @property
    def _all_count(self) -> bool:
        return self.sharers == self.count

    @property
    def counts(self) -> Array | bool:
        """Whether a device's share counts, which another may have too."""
        return self._all_count or self.index < self.sharers

    def counted(self, value: Array) -> Array:
        """Return a value of a share, 0 where the share does not count."""
        return value if self._all_count else jnp.where(self.counts, value, jnp.zeros_like(value))

    def _of_owner(self, stream: Stream, owner: Array) -> Stream:
        return [jnp.where(owner, value, jnp.zeros_like(value)) for value in stream]

    def _sum(self, value: Array) -> Array:
        return lax.psum(self._sent(value), STAGE).astype(value.dtype)

    def _gather(self, value: Array, rows: int) -> Array:
        found = lax.all_gather(value, STAGE, axis=rows, tiled=True)
        return (
            found
            if self._all_count
            else lax.slice_in_dim(found, 0, value.shape[rows] * self.sharers, axis=rows)
        )

    def _scatter(self, value: Array, rows: int) -> Array:
        if not self._all_count:
            each = value.shape[rows] // self.sharers
            place = self.index % self.sharers * each
            return lax.dynamic_slice_in_dim(self._sum(value), place, each, rows)
        found = lax.psum_scatter(self._sent(value), STAGE, scatter_dimension=rows, tiled=True)
        return found.astype(value.dtype)

    def _sent(self, value: Array) -> Array:
        if value.dtype == jnp.bool_:
            return value.astype(jnp.int8)
        if not (self.on_cpu and jnp.issubdtype(value.dtype, jnp.floating)):
            return value
        return value.astype(jnp.promote_types(value.dtype, jnp.float32))

    def _each(
        self, function: Callable[[Array, Travelling], Array], stream: Stream, learning: bool = False
    ) -> Stream:
        pairs = [
            (one, spec)
            for one, spec in zip(self.items, self.lies, strict=True)
            if one.differs or not learning
        ]
        found = []
        for value, (one, spec) in zip(stream, pairs, strict=True):
            sent = self.after(value)
            found.append(by_device(lambda v, one=one: function(v, one), self.mesh, (spec,), spec)(sent))
            self.received.clear()
            self.done(found[-1:])
        return found


def bare(value: Array) -> Array:
    """Return random keys as their numbers, and anything else as it is."""
    return jax.random.key_data(value) if is_extended(value.dtype) else value


def dressed(value: Array, dtype: Any) -> Array:
    """Return what `bare` was given, of such a type."""
    if not is_extended(dtype):
        return value
    kinds: list[Any] = []
    jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct((), dtype))
    return jax.random.wrap_key_data(value, impl=kinds[0])


def _nothing(value: Array) -> Array:
    """Return a number that is always 0, and there when `value` is."""
    first = lax.slice(value, (0,) * value.ndim, (1,) * value.ndim).reshape(()).astype(jnp.float32)
    sign = lax.shift_right_logical(lax.bitcast_convert_type(first, jnp.uint32), jnp.uint32(31))
    return lax.shift_right_logical(sign, jnp.uint32(1))
