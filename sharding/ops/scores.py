"""Scores of attention by plain XLA: what queries may look at, all at once or in chunks of queries."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..errors import UserError, nearest_divisors
from .biases import BoundBias, sizes_of

# Below every real score, and far enough from the end of float32 that adding a score cannot overflow.
HIDDEN = -1e30


class View(NamedTuple):
    """What queries may look at: where queries and keys stand, their documents, and how far back to see.

    And what is made of scores and weights besides, see `attention`.
    """

    query_index: jax.Array
    """int32 ``[queries]``: place in the row, not position in the document."""
    key_index: jax.Array
    """int32 ``[keys]``."""
    query_segments: jax.Array | None = None
    """int32 ``[batch, queries]``; None when each row is one document."""
    key_segments: jax.Array | None = None
    """int32 ``[batch, keys]``."""
    window: jax.Array | int | None = None
    """A query sees itself and the window - 1 places before it; None sees all before it."""
    causal: bool = True
    """Whether what stands after a query is hidden from it."""
    ahead: int = 0
    """Places after a query that are not hidden."""
    prefix: int = 0
    """First keys that are never hidden by causality."""
    mask: jax.Array | None = None
    """bool ``[batch, heads, queries, keys]``, each of them or 1."""
    bias: jax.Array | None = None
    factor: jax.Array | None = None
    sink: jax.Array | None = None
    """``[heads]``"""
    fill: float = HIDDEN
    adds: bool = True
    placed: BoundBias | None = None
    """A bias that is worked out for the queries and keys in view."""


def visible(view: View) -> jax.Array | None:
    """Return which keys each query sees by places and segments.

    It is bool ``[queries, keys]`` or ``[batch, queries, keys]``, or None where it sees all.
    """
    seen = None
    if view.causal:
        distance = view.query_index[:, None] - view.key_index[None, :]
        seen = distance >= -view.ahead
        if view.prefix:
            seen |= view.key_index[None, :] < view.prefix
        if view.window is not None:
            seen &= distance < view.window
    if view.query_segments is not None and view.key_segments is not None:
        same = view.query_segments[:, :, None] == view.key_segments[:, None, :]
        seen = same if seen is None else seen & same
    return seen


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """Return cap · tanh(x / cap), or `x` without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    view: View,
    *,
    cap: float | None,
    precision: str | None = None,
) -> jax.Array:
    """Return softmax(query · key) · value over the keys in view, ``[batch, queries, heads, head_dim]``.

    `query` is scaled already. `key` and `value` are ``[batch, keys, kv_heads, head_dim]``; query head h reads
    kv head h // (heads / kv_heads). Scores and softmax are float32.
    """
    batch, queries, heads, head_dim = query.shape
    kv_heads, sizes = key.shape[2], sizes_of(query, key.shape[1])
    if heads != kv_heads:
        query = query.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)
    # Written as dot_general because einsum may swap operands and then transpose all the scores.
    last = query.ndim - 1
    dimensions = (((last,), (3,)), ((0, 2), (0, 2)))
    asked = {"preferred_element_type": jnp.float32, "precision": precision}
    scores = jax.lax.dot_general(query, key, dimensions, **asked)
    # [batch, kv_heads, queries, (heads / kv_heads,) keys]
    scores = soft_cap(scores, cap)
    if view.placed is not None:
        bias = view.placed.bias(view.placed.arrays, sizes)
        scores = scores + _by_head(bias, heads, kv_heads)
    scores = _hidden(scores, view, heads, kv_heads)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    sink = None if view.sink is None else _by_head(view.sink[None, :, None, None], heads, kv_heads)
    if sink is not None:
        top = jax.lax.stop_gradient(jnp.maximum(top, sink))
    # The division waits until after the product with value: fewer numbers to divide.
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sink is not None:
        total = total + jnp.exp(sink - top)
    if view.factor is not None:
        weights = weights * _by_head(view.factor, heads, kv_heads)
    dimensions = (((last,), (1,)), ((0, 1), (0, 2)))
    out = jax.lax.dot_general(weights.astype(value.dtype), value, dimensions, **asked)
    out = jnp.swapaxes((out / total).astype(value.dtype), 1, 2)
    return out.reshape(batch, queries, heads, value.shape[-1]) if heads != kv_heads else out


def _hidden(scores: jax.Array, view: View, heads: int, kv_heads: int) -> jax.Array:
    """Return scores with the bias added, and without those that are not in view."""
    if view.bias is not None:
        scores = scores + _by_head(view.bias.astype(jnp.float32), heads, kv_heads)
    seen = visible(view)
    if view.mask is not None:
        seen = _by_head(view.mask & (True if seen is None else _over_heads(seen)), heads, kv_heads)
        return _without(scores, seen, view)
    if seen is None:
        return scores
    if not view.adds:
        return _without(scores, _over_heads(seen, grouped=heads != kv_heads), view)
    return scores + _over_heads(_added(seen, view), grouped=heads != kv_heads)


def _without(scores: jax.Array, seen: jax.Array, view: View) -> jax.Array:
    return scores + _added(seen, view) if view.adds else jnp.where(seen, scores, jnp.float32(view.fill))


def _added(seen: jax.Array, view: View) -> jax.Array:
    """Return what is added to scores: gradients then pass without keeping the mask."""
    return jnp.where(seen, jnp.float32(0), jnp.float32(view.fill))


def _over_heads(array: jax.Array, *, grouped: bool = False) -> jax.Array:
    """Return an array of (batch,) queries and keys laid out as scores are."""
    array = array[:, None] if array.ndim == 3 else array
    return jnp.expand_dims(array, -2) if grouped else array


def _by_head(array: jax.Array, heads: int, kv_heads: int) -> jax.Array:
    """Return ``[batch, heads, queries, keys]``, each of them or 1, laid out as scores are."""
    if heads == kv_heads:
        return array.astype(jnp.float32) if array.dtype != jnp.bool_ else array
    batch, mine, queries, keys = array.shape
    groups = (kv_heads, heads // kv_heads) if mine > 1 else (1, 1)
    array = array.reshape(batch, *groups, queries, keys).swapaxes(2, 3)
    return array.astype(jnp.float32) if array.dtype != jnp.bool_ else array


def query_chunk(sequence: int, chosen: int | None, *, packed: bool = False) -> int | None:
    """Return how many queries to score at a time; None means all.

    The choice of the config if it made one. Otherwise all up to 4096 queries, and beyond that the largest
    divisor of the sequence from 1024 down to 128, so that scores take at most 1024 × sequence numbers a head;
    a longer sequence without such a divisor is scored whole. Of `packed` rows that XLA has to score it is a
    divisor up to an eighth of the sequence, from 1024 queries on. The values are the same either way.

    Raises `UserError` when the chosen number does not divide a longer sequence.
    """
    if chosen is not None:
        if chosen < sequence and sequence % chosen:
            raise UserError(
                f"attention_chunk={chosen} does not divide sequence={sequence}; "
                f"nearest: {nearest_divisors(sequence, chosen)}"
            )
        return chosen if chosen < sequence else None
    if sequence < 1024 or (sequence <= 4096 and not packed):
        return None
    most = min(1024, sequence // 8) if packed else 1024
    return next((chunk for chunk in range(most, 127, -1) if sequence % chunk == 0), None)


def attend_in_chunks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    view: View,
    *,
    cap: float | None,
    chunk: int,
    precision: str | None = None,
) -> jax.Array:
    """Return what `attend` does, holding scores for `chunk` queries at a time, also in the backward pass.

    A chunk takes every n-th query, so that a sequence sharded in contiguous parts stays sharded inside each
    chunk and every chunk costs the same.
    """
    batch, sequence, heads, _ = query.shape
    chunks = sequence // chunk

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(carry: None, xs: Any) -> tuple[None, jax.Array]:
        queries, own, *of_bias = xs
        mine = view._replace(**own)
        if mine.placed is not None:
            mine = mine._replace(placed=mine.placed.with_queries(*of_bias))
        return carry, attend(queries, key, value, mine, cap=cap, precision=precision)

    def split(x: jax.Array, axis: int) -> jax.Array:
        shape = (*x.shape[:axis], chunk, chunks, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis + 1, 0)

    # What is of each query by itself goes by chunks, all else is there for each of them. Equations keep their
    # order: saved plans know the program by it.
    own = {} if view.query_segments is None else {"query_segments": split(view.query_segments, 1)}
    queries = split(query, 1)
    own["query_index"] = split(view.query_index, 0)
    for name in ("mask", "bias", "factor"):
        array = getattr(view, name)
        if array is not None and array.shape[2] > 1:
            own[name] = split(array, 2)
    of_bias = () if view.placed is None else ([split(x, 1) for x in view.placed.of_queries],)
    _, out = jax.lax.scan(one, None, (queries, own, *of_bias))
    return jnp.moveaxis(out, 0, 2).reshape(batch, sequence, heads, value.shape[-1])
