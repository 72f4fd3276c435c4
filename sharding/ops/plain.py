"""Attention as plain functions of queries, keys and values."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..errors import UserError, nearest_divisors

# Below every real score, and far enough from the end of float32 that adding a score cannot overflow.
_HIDDEN = -1e30


class View(NamedTuple):
    """What queries may look at: where queries and keys stand, their documents, and how far back to see."""

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


def visible(view: View) -> jax.Array | None:
    """Return which keys each query sees, bool ``[queries, keys]`` or ``[batch, queries, keys]``.

    None where it sees all.
    """
    seen = None
    if view.causal:
        distance = view.query_index[:, None] - view.key_index[None, :]
        seen = distance >= 0
        if view.window is not None:
            seen &= distance < view.window
    if view.query_segments is not None and view.key_segments is not None:
        same = view.query_segments[:, :, None] == view.key_segments[:, None, :]
        seen = same if seen is None else seen & same
    return seen


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """Return cap · tanh(x / cap), or `x` without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(query: jax.Array, key: jax.Array, value: jax.Array, view: View, *, cap: float | None) -> jax.Array:
    """Return softmax(query · key) · value over the keys in view, ``[batch, queries, heads, head_dim]``.

    `query` is scaled already. `key` and `value` are ``[batch, keys, kv_heads, head_dim]``; query head h reads
    kv head h // (heads / kv_heads). Scores and softmax are float32.
    """
    batch, queries, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    if heads != kv_heads:
        query = query.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)
    # Written as dot_general because einsum may swap operands and then transpose all the scores.
    last = query.ndim - 1
    dimensions = (((last,), (3,)), ((0, 2), (0, 2)))
    scores = jax.lax.dot_general(query, key, dimensions, preferred_element_type=jnp.float32)
    # [batch, kv_heads, queries, (heads / kv_heads,) keys]
    scores = soft_cap(scores, cap)
    seen = visible(view)
    if seen is not None:
        # Added rather than selected: the gradient then passes without keeping the mask.
        hidden = jnp.where(seen, jnp.float32(0), jnp.float32(_HIDDEN))
        hidden = hidden[:, None] if seen.ndim == 3 else hidden
        scores = scores + (hidden if heads == kv_heads else jnp.expand_dims(hidden, -2))
    # The division waits until after the product with value: fewer numbers to divide.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    dimensions = (((last,), (1,)), ((0, 1), (0, 2)))
    out = jax.lax.dot_general(
        weights.astype(value.dtype), value, dimensions, preferred_element_type=jnp.float32
    )
    out = jnp.swapaxes((out / total).astype(value.dtype), 1, 2)
    return out.reshape(batch, queries, heads, value.shape[-1]) if heads != kv_heads else out


def query_chunk(sequence: int, chosen: int | None) -> int | None:
    """Return how many queries to score at a time; None means all.

    The choice of the config if it made one. Otherwise all up to 4096 queries, and beyond that the largest
    divisor of the sequence from 1024 down to 128, so that scores take at most 1024 × sequence numbers a head;
    a longer sequence without such a divisor is scored whole. The values are the same either way.

    Raises `UserError` when the chosen number does not divide a longer sequence.
    """
    if chosen is not None:
        if chosen < sequence and sequence % chosen:
            raise UserError(
                f"attention_chunk={chosen} does not divide sequence={sequence}; "
                f"nearest: {nearest_divisors(sequence, chosen)}"
            )
        return chosen if chosen < sequence else None
    if sequence <= 4096:
        return None
    return next((chunk for chunk in range(1024, 127, -1) if sequence % chunk == 0), None)


def attend_in_chunks(
    query: jax.Array, key: jax.Array, value: jax.Array, view: View, *, cap: float | None, chunk: int
) -> jax.Array:
    """Return what `attend` does, holding scores for `chunk` queries at a time, also in the backward pass.

    A chunk takes every n-th query, so that a sequence sharded in contiguous parts stays sharded inside each
    chunk and every chunk costs the same.
    """
    batch, sequence, heads, _ = query.shape
    chunks = sequence // chunk

    @partial(jax.checkpoint, prevent_cse=False)
    def one(carry: None, xs: tuple[jax.Array, jax.Array, jax.Array | None]) -> tuple[None, jax.Array]:
        queries, index, segments = xs
        part = view._replace(query_index=index, query_segments=segments)
        return carry, attend(queries, key, value, part, cap=cap)

    def split(x: jax.Array, axis: int) -> jax.Array:
        shape = (*x.shape[:axis], chunk, chunks, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis + 1, 0)

    segments = None if view.query_segments is None else split(view.query_segments, 1)
    parts = (split(query, 1), split(view.query_index, 0), segments)
    _, out = jax.lax.scan(one, None, parts)
    return jnp.moveaxis(out, 0, 2).reshape(batch, sequence, heads, value.shape[-1])
