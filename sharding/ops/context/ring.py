"""Chunks of keys and values that go round a mesh axis, each device working with what it has meanwhile.

In the backward pass the chunks go round once more, and the gradients of each follow a turn behind: what
others have added arrives while a device makes its own share, and the last hop brings them home. What work a
device does with a chunk, in blocks of plain XLA or by a kernel, is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .blocks import (
    Asked,
    Blocks,
    Pairs,
    State,
    Sums,
    block_of,
    cut,
    cut_ids,
    cut_rows,
    fold,
    no_gradients,
    places,
    starts,
    unfold,
    unseen,
)
from .order import chunks_of
from .turns import seen_at_home, seen_away


class Ring(NamedTuple):
    """The devices of a mesh axis, and whether their chunks are in balanced order."""

    axis: str
    parts: int
    balanced: bool

    def passed(self, x: Any) -> Any:
        """Return what the device before had."""
        return lax.ppermute(x, self.axis, [(own, (own + 1) % self.parts) for own in range(self.parts)])

    def before(self, turn: Any) -> jax.Array:
        """Return whether the chunk of `turn` is of a device before this one."""
        return lax.axis_index(self.axis) >= turn


# Of (what was found so far, a chunk, whether it is of a device before): what is found with it.
Work = Callable[[Any, Any, jax.Array], Any]


def around(ring: Ring, here: Any, found: Any, away: Work) -> Any:
    """Return what `away` finds in the chunks of all other devices, one after another.

    `here` is this device's chunk, and `found` is made of it: its sending is under way meanwhile.
    """
    there = ring.passed(here)
    found = found()

    def step(carry: Any, turn: jax.Array) -> tuple[Any, None]:
        here, found = carry
        there = ring.passed(here)
        return (there, away(found, here, ring.before(turn))), None

    (last, found), _ = lax.scan(step, (there, found), jnp.arange(1, ring.parts - 1))
    return away(found, last, ring.before(ring.parts - 1))


def back_around(ring: Ring, here: Any, home: Callable[[], tuple[Any, Any]], away: Work) -> tuple[Any, Any]:
    """Return the gradients of this device's queries and of its chunk, the sums over all devices.

    `home` gives both of its own chunk; `away` adds to the first and gives those of the chunk it is given.
    """
    there = ring.passed(here)
    d_query, d_keys = home()

    def work(d_query: Any, d_keys: Any, here: Any, turn: Any) -> tuple[Any, Any]:
        came = ring.passed(d_keys)
        d_query, own = away(d_query, here, ring.before(turn))
        return d_query, jax.tree.map(jnp.add, came, own)

    def step(carry: Any, turn: jax.Array) -> tuple[Any, None]:
        here, d_query, d_keys = carry
        there = ring.passed(here)
        return (there, *work(d_query, d_keys, here, turn)), None

    carry = there, d_query, d_keys
    (last, d_query, d_keys), _ = lax.scan(step, carry, jnp.arange(1, ring.parts - 1))
    d_query, d_keys = work(d_query, d_keys, last, ring.parts - 1)
    return d_query, ring.passed(d_keys)


class RingKeys(NamedTuple):
    """A device's keys and values, their segment ids, and what a bias is made of keys."""

    key: jax.Array
    value: jax.Array
    ids: jax.Array | None
    of_bias: tuple[jax.Array, ...] = ()


def ring_forward(asked: Asked, ring: Ring, queries: Blocks, keys: RingKeys) -> State:
    """Return the state of a device's queries after all keys, in blocks of plain XLA."""
    here = _keys(ring, keys)
    home, away = _home(asked, queries, here), _away(ring, queries, here)

    def first() -> State:
        return fold(asked, queries, here, home, unseen(queries, keys.value.shape[3]))

    def then(state: State, here: Blocks, before: jax.Array) -> State:
        return fold(asked, queries, here, _in_turn(away, before), state)

    return around(ring, here, first, then)


def ring_backward(
    asked: Asked, ring: Ring, queries: Blocks, keys: RingKeys, sums: tuple[jax.Array, ...], delta: jax.Array
) -> Sums:
    """Return the gradients of a device's queries, keys and values, in blocks and float32."""
    here = _keys(ring, keys)
    home, away = _home(asked, queries, here), _away(ring, queries, here)
    none = no_gradients(asked, queries, here)

    def first() -> tuple[Any, Any]:
        return _apart(unfold(asked, queries, here, sums, delta, home, none))

    def then(of_queries: Any, here: Blocks, before: jax.Array) -> tuple[Any, Any]:
        query, of_bias, of_neither, of_pairs = of_queries
        grads = none._replace(query=query, of_queries=of_bias, of_neither=of_neither, of_pairs=of_pairs)
        return _apart(unfold(asked, queries, here, sums, delta, _in_turn(away, before), grads))

    (query, of_queries, of_neither, of_pairs), of_chunk = back_around(ring, here, first, then)
    key, value, of_keys = of_chunk
    return Sums(query, key, value, of_queries, of_keys, of_neither, of_pairs)


def _apart(sums: Sums) -> tuple[Any, Any]:
    """Return gradients of what stays on a device, and of what goes round."""
    stays = (sums.query, sums.of_queries, sums.of_neither, sums.of_pairs)
    return stays, (sums.key, sums.value, sums.of_keys)


def _keys(ring: Ring, keys: RingKeys) -> Blocks:
    """Return a device's keys as they travel; their places, which are few, travel with them."""
    order = chunks_of(ring.parts, balanced=ring.balanced)
    chunk = keys.key.shape[1] // order.shape[1]
    rows = block_of(chunk)
    first = jnp.asarray(starts(order, chunk, rows))[lax.axis_index(ring.axis)]
    of_bias = tuple(cut_rows(x, rows) for x in keys.of_bias)
    arrays = cut(keys.key, rows), cut(keys.value, rows)
    return Blocks(*arrays, places(first, rows), cut_ids(keys.ids, rows), of_bias)


def _home(asked: Asked, queries: Blocks, keys: Blocks) -> Pairs:
    """Return the pairs of a device's own chunks: in order, whichever chunks these are."""
    told = seen_at_home(asked.call, *queries.at.shape, *keys.at.shape)
    return Pairs(*told, most=int(told[1].sum()))


def _away(ring: Ring, queries: Blocks, keys: Blocks) -> tuple[Any, Any, int]:
    """Return the pairs with chunks of a device after, and of one before; as many either way."""
    count = seen_away(len(queries.at), len(keys.at), balanced=ring.balanced)
    return jnp.zeros(count.shape, jnp.int32), jnp.asarray(count), int(count[0].sum())


def _in_turn(away: tuple[Any, Any, int], before: jax.Array) -> Pairs:
    first, count, most = away
    row = before.astype(jnp.int32)
    return Pairs(first[row], count[row], most)
