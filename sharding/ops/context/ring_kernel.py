"""A ring whose work is a kernel's: pieces of whole chunks or halves, put together by the sums of their rows.

In balanced order a kernel needs two masks that are known beforehand. A device's own chunks, low and high, are
causal as they stand. Of another device's the high queries see the low chunk in any case; besides that, the
low queries see the low chunk of a device before, the high queries the high chunk of one after. Both pieces
are halves without a mask, and which halves the second is made of is picked by operands.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..attention import AttentionCall
from .pieces import ChunkPiece, PieceKernel, piece_backward, piece_forward
from .ring import Ring, around, back_around


class RingWork(NamedTuple):
    """What the pieces of a ring are worked through by."""

    ring: Ring
    kernel: PieceKernel
    call: AttentionCall


class _Keys(NamedTuple):
    """A chunk as it travels."""

    key: jax.Array
    value: jax.Array
    ids: jax.Array | None


class _Rows(NamedTuple):
    """What is there of each query: its result, the result's gradient, its sums ``[batch, heads, rows]``."""

    out: jax.Array
    d_out: jax.Array
    sums: jax.Array


def kernel_forward(
    work: RingWork,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_ids: jax.Array | None,
    key_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Return the result of a device's queries, float32, and the logarithms of their sums."""
    causal, here = work.call.causal, _Keys(key, value, key_ids)

    def forward(query: jax.Array, keys: _Keys, ids: Any, *, causal: bool = False) -> Any:
        piece = ChunkPiece(query, keys.key, keys.value, ids, keys.ids)
        out, sums = piece_forward(work.kernel, work.call, piece, causal=causal)
        return out.astype(jnp.float32), sums

    def away(found: Any, there: _Keys, before: jax.Array) -> Any:
        if not causal:
            return _merged(found, forward(query, there, query_ids))
        queries, keys, ids = _two(query, before), _two_of_keys(there, before), _two(query_ids, before)
        (first, second) = _apart(forward(queries, keys, ids))
        low, high = _halves(found)
        high = _merged(high, first)
        low, high = _picked(before, (_merged(low, second), high), (low, _merged(high, second)))
        return _joined(low, high)

    return around(work.ring, here, lambda: forward(query, here, query_ids, causal=causal), away)


def kernel_backward(
    work: RingWork,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_ids: jax.Array | None,
    key_ids: jax.Array | None,
    out: jax.Array,
    sums: jax.Array,
    d_out: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of a device's queries, keys and values, float32."""
    causal, here = work.call.causal, _Keys(key, value, key_ids)

    def backward(query: jax.Array, keys: _Keys, ids: Any, rows: _Rows, *, causal: bool = False) -> Any:
        piece = ChunkPiece(query, keys.key, keys.value, ids, keys.ids)
        told = (rows.out, rows.sums, rows.d_out)
        grads = piece_backward(work.kernel, work.call, piece, *told, causal=causal)
        return tuple(x.astype(jnp.float32) for x in grads)

    rows = _Rows(out, d_out, sums)

    def home() -> tuple[jax.Array, Any]:
        d_query, *d_keys = backward(query, here, query_ids, rows, causal=causal)
        return d_query, tuple(d_keys)

    def away(d_query: jax.Array, there: _Keys, before: jax.Array) -> tuple[jax.Array, Any]:
        if not causal:
            own, *d_keys = backward(query, there, query_ids, rows)
            return d_query + own, tuple(d_keys)
        twice = _Rows(_two(out, before), _two(d_out, before), _two(sums, before, axis=2))
        queries, keys, ids = _two(query, before), _two_of_keys(there, before), _two(query_ids, before)
        (own, *d_keys) = (jnp.split(x, 2) for x in backward(queries, keys, ids, twice))
        # The second piece's queries are the low ones, or the high ones once more; so are its keys.
        none = jnp.zeros_like(own[1])
        mine = _picked(before, (own[1], own[0]), (none, own[0] + own[1]))
        theirs = (_picked(before, (one + two, jnp.zeros_like(two)), (one, two)) for one, two in d_keys)
        return d_query + jnp.concatenate(mine, 1), tuple(jnp.concatenate(x, 1) for x in theirs)

    d_query, d_keys = back_around(work.ring, here, home, away)
    return d_query, *d_keys


def _two(x: Any, before: jax.Array, axis: int = 1) -> Any:
    """Return the high half, and in a second batch the low one for what comes from before, else the high."""
    if x is None:
        return None
    low, high = jnp.split(x, 2, axis=axis)
    return jnp.concatenate([high, jnp.where(before, low, high)])


def _two_of_keys(keys: _Keys, before: jax.Array) -> _Keys:
    """Return the low half of keys, and in a second batch the low or the high one."""

    def twice(x: Any) -> Any:
        if x is None:
            return None
        low, high = jnp.split(x, 2, axis=1)
        return jnp.concatenate([low, jnp.where(before, low, high)])

    return _Keys(*(twice(x) for x in keys))


def _merged(found: Any, more: Any) -> Any:
    """Return the result over keys of both, and the logarithm of their sums."""
    (out, sums), (own, of_own) = found, more
    both = jnp.logaddexp(sums, of_own)

    def share(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(jnp.exp(x - both), 1, 2)[..., None]

    return out * share(sums) + own * share(of_own), both


def _apart(found: Any) -> tuple[Any, Any]:
    out, sums = (jnp.split(x, 2) for x in found)
    return (out[0], sums[0]), (out[1], sums[1])


def _halves(found: Any) -> tuple[Any, Any]:
    out, sums = jnp.split(found[0], 2, axis=1), jnp.split(found[1], 2, axis=2)
    return (out[0], sums[0]), (out[1], sums[1])


def _joined(low: Any, high: Any) -> Any:
    return jnp.concatenate([low[0], high[0]], 1), jnp.concatenate([low[1], high[1]], 2)


def _picked(before: jax.Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(before, a, b), yes, no)
