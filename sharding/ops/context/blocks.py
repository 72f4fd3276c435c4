"""A device's part of attention in blocks: pairs of a block of queries and one of keys, one after another.

Memory beside the operands is that of one pair of blocks, in the backward pass too, which makes the scores
once more. Which pairs there are is told by ranges: a block of queries sees blocks of keys that follow one
another, so that a pair's number says which it is, and no table of pairs is held.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..attention import HIDDEN, AttentionCall
from ..biases import BATCH, HEADS, KEYS, QUERIES
from .pairs import OfPairs, PairBlock

# Rows of a block at most: scores of a pair then take 1 MiB a head in float32.
_MOST = 512


class Blocks(NamedTuple):
    """Rows in blocks, the block in front: queries `x` and their result's gradient `y`, or keys and values."""

    x: jax.Array
    """``[blocks, batch, kv_heads, (heads / kv_heads,) rows, head_dim]``"""
    y: jax.Array | None
    at: jax.Array
    """int32 ``[blocks, rows]``, places in the whole sequence; below 0 is no row."""
    segments: jax.Array | None
    """int32 ``[blocks, batch, rows]``"""
    of_bias: tuple[jax.Array, ...] = ()
    """What a bias is made of them, ``[blocks, batch or 1, rows, …]``."""


class Pairs(NamedTuple):
    """Of each block of queries, the first block of keys that it sees and how many; int32 ``[blocks]``.

    `most` is the largest number of pairs that any device has.
    """

    first: Any
    count: Any
    most: int


class Asked(NamedTuple):
    """What a call asks for, its window where that is an array, and what a bias is made of besides rows.

    `of_pairs` has rows in the order in which a device's blocks of queries lie, and keys in their own.
    """

    call: AttentionCall
    window: jax.Array | int | None
    of_bias: tuple[jax.Array, ...] = ()
    of_pairs: OfPairs = OfPairs()


# Of each query: the largest score, the sum of exponentials over it, and the sum of values by these weights.
State = tuple[jax.Array, jax.Array, jax.Array]


class Sums(NamedTuple):
    """Gradients of queries, keys and values, in blocks and float32.

    `of_queries`, `of_keys` and `of_neither` are those of what a bias is made of, `of_pairs` of arrays of
    pairs: of the floats among these.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    of_queries: tuple[jax.Array, ...] = ()
    of_keys: tuple[jax.Array, ...] = ()
    of_neither: tuple[jax.Array, ...] = ()
    of_pairs: tuple[jax.Array, ...] = ()


def block_of(size: int) -> int:
    """Return how many rows of `size` make a block: the largest divisor up to 512.

    >>> block_of(4096), block_of(24), block_of(1000)
    (512, 24, 500)
    """
    return next(rows for rows in range(min(size, _MOST), 0, -1) if size % rows == 0)


def cut(x: jax.Array, rows: int, kv_heads: int | None = None) -> jax.Array:
    """Return ``[batch, sequence, heads, dim]`` in blocks, with `kv_heads` in groups of queries' heads."""
    batch, _, heads, dim = x.shape
    if kv_heads is None:
        return jnp.moveaxis(x.reshape(batch, -1, rows, heads, dim), (1, 3), (0, 2))
    x = x.reshape(batch, -1, rows, kv_heads, heads // kv_heads, dim)
    return jnp.moveaxis(x, (1, 3, 4), (0, 2, 3))


def joined(x: jax.Array) -> jax.Array:
    """Return the array that `cut` made blocks of."""
    if x.ndim == 6:
        x = jnp.moveaxis(x, (0, 2, 3), (1, 3, 4))
        return x.reshape(x.shape[0], x.shape[1] * x.shape[2], x.shape[3] * x.shape[4], x.shape[5])
    x = jnp.moveaxis(x, (0, 2), (1, 3))
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def cut_ids(ids: jax.Array | None, rows: int) -> jax.Array | None:
    """Return segment ids ``[batch, sequence]`` in blocks."""
    return None if ids is None else jnp.moveaxis(ids.reshape(ids.shape[0], -1, rows), 1, 0)


def cut_rows(x: jax.Array, rows: int) -> jax.Array:
    """Return ``[batch, sequence, …]`` in blocks."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, rows, *x.shape[2:]), 1, 0)


def joined_rows(x: jax.Array) -> jax.Array:
    """Return the array that `cut_rows` made blocks of."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def starts(chunks: Any, chunk: int, rows: int) -> Any:
    """Return the first places of the blocks of `chunks` ``[…, chunks]``, NumPy's or traced."""
    within = np.arange(0, chunk, rows)
    return (chunks[..., :, None] * chunk + within).reshape(*chunks.shape[:-1], -1)


def places(first: Any, rows: int) -> jax.Array:
    """Return the places of all rows of blocks that begin at `first`."""
    return (jnp.asarray(first)[:, None] + jnp.arange(rows)).astype(jnp.int32)


def seen_blocks(call: AttentionCall, queries: Any, rows: int, keys: Any, key_rows: int, blocks: int) -> Any:
    """Return the first blocks of keys that blocks of queries see, and how many, by places alone.

    Blocks of `rows` queries begin at the places `queries`; the `blocks` blocks of keys follow one another
    from the place `keys`. All may be NumPy's or traced.
    """
    of = np if isinstance(queries, np.ndarray) and not isinstance(keys, jax.Array) else jnp
    low, high = of.zeros_like(queries), of.full_like(queries, keys + blocks * key_rows - 1)
    if call.causal and not call.fills:
        high = of.minimum(high, of.maximum(queries + rows - 1 + call.ahead, call.prefix - 1))
        if call.window is not None:
            low = of.maximum(low, queries - call.window + 1)
    first = of.clip((low - keys) // key_rows, 0, blocks - 1)
    last = of.clip((high - keys) // key_rows, -1, blocks - 1)
    return first, of.maximum(last - first + 1, 0)


def _pair(pairs: Pairs, ends: jax.Array, turn: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the blocks of queries and keys of pair `turn`, and whether there is such a pair."""
    first, count = (jnp.asarray(x, jnp.int32) for x in pairs[:2])
    live = turn < ends[-1]
    a = jnp.minimum(jnp.sum(ends <= turn, dtype=jnp.int32), len(ends) - 1)
    return a, jnp.where(live, first[a] + turn - (ends[a] - count[a]), 0), live


def _ends(pairs: Pairs) -> jax.Array:
    return jnp.cumsum(jnp.asarray(pairs.count, jnp.int32), dtype=jnp.int32)


def _product(asked: Asked, subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    kinds = {"precision": asked.call.precision, "preferred_element_type": jnp.float32}
    return jnp.einsum(subscripts, a, b, **kinds)


def _scores(asked: Asked, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Return scores of a pair, and what a soft cap makes of their gradient."""
    raw = _product(asked, "bkgqd,bksd->bkgqs", q, k) * asked.call.scale
    if asked.call.cap is None:
        return raw, None
    bent = jnp.tanh(raw / asked.call.cap)
    return bent * asked.call.cap, 1 - bent * bent


def biased(
    asked: Asked, scores: jax.Array, q: Blocks, kv: Blocks, a: jax.Array, b: jax.Array
) -> tuple[jax.Array, Callable[[jax.Array], tuple[Any, ...]]]:
    """Return scores of blocks `a` and `b` with the bias of a call added, and the way back of their gradient.

    That gives the gradients of what the bias is made of, of queries, keys and neither.
    """
    bias = asked.call.placed
    if bias is None:
        return scores, lambda d_scores: ((), (), ())
    batch, kv_heads, groups, rows, keys = scores.shape
    sizes = {BATCH: batch, HEADS: kv_heads * groups, QUERIES: rows, KEYS: keys}
    parts = tuple(x[a] for x in q.of_bias), tuple(x[b] for x in kv.of_bias), asked.of_bias

    def added(*learnt: tuple[jax.Array, ...]) -> jax.Array:
        mine = (with_floats(*pair) for pair in zip(parts, learnt, strict=True))
        found = bias.of_block(bias.joined(dict(zip((QUERIES, KEYS, None), mine, strict=True))), sizes)
        heads = (kv_heads, groups) if found.shape[1] > 1 else (1, 1)
        return jnp.broadcast_to(found.reshape(found.shape[0], *heads, *found.shape[2:]), scores.shape)

    learnt = tuple(floats(some) for some in parts)
    return scores + added(*learnt), lambda d_scores: jax.vjp(added, *learnt)[1](d_scores)


def floats(arrays: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Return the arrays that have gradients."""
    return tuple(x for x in arrays if jnp.issubdtype(x.dtype, jnp.inexact))


def with_floats(arrays: Sequence[jax.Array], learnt: Sequence[Any]) -> tuple[Any, ...]:
    """Return `arrays` with others in the place of those that `floats` gives."""
    found = iter(learnt)
    return tuple(next(found) if jnp.issubdtype(x.dtype, jnp.inexact) else x for x in arrays)


def _place(q: Blocks, kv: Blocks, a: jax.Array, b: jax.Array) -> PairBlock:
    """Return where blocks `a` and `b` lie in arrays of pairs."""
    _, _, kv_heads, groups, rows, _ = q.x.shape
    return PairBlock(a * rows, kv.at[b, 0], rows, kv.at.shape[1], (kv_heads, groups))


def _with_bias(asked: Asked, scores: jax.Array, at: PairBlock) -> jax.Array:
    bias = asked.of_pairs.bias
    return scores if bias is None else scores + at.of(bias).astype(jnp.float32)


def _by_factor(asked: Asked, weights: jax.Array, at: PairBlock) -> jax.Array:
    factor = asked.of_pairs.factor
    return weights if factor is None else weights * at.of(factor).astype(jnp.float32)


def _filled(call: AttentionCall, scores: jax.Array, seen: jax.Array) -> jax.Array:
    """Return scores with a number for what is hidden, where a query that sees nothing gets weights of it."""
    if not call.fills:
        return scores
    fill = jnp.float32(call.fill)
    return scores + jnp.where(seen, 0.0, fill) if call.adds else jnp.where(seen, scores, fill)


def _visible(
    asked: Asked, q: Blocks, k: Blocks, a: jax.Array, b: jax.Array, live: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return which scores of a pair are seen, ``[batch or 1, kv_heads or 1, groups or 1, queries, keys]``.

    And which have weights, of what is not seen too where a number stands for it.
    """
    call, key_at = asked.call, k.at[b][None, :]
    distance = q.at[a][:, None] - key_at
    there = seen = jnp.broadcast_to(live & (key_at >= 0), distance.shape)
    if call.causal:
        before = distance >= -call.ahead
        if call.prefix:
            before |= key_at < call.prefix
        seen &= before
        if asked.window is not None:
            seen &= distance < asked.window
    seen = seen[None]
    if q.segments is not None and k.segments is not None:
        seen = seen & (q.segments[a][:, :, None] == k.segments[b][:, None, :])
    seen = seen[:, None, None]
    if asked.of_pairs.mask is not None:
        seen = seen & _place(q, k, a, b).of(asked.of_pairs.mask)
    return seen, there[None, None, None] if call.fills else seen


def unseen(q: Blocks, wide: int) -> State:
    """Return the state of queries before any key, for values so `wide`."""
    rows = q.x.shape[:-1]
    top = jnp.full(rows, HIDDEN, jnp.float32)
    return top, jnp.zeros(rows, jnp.float32), jnp.zeros((*rows, wide), jnp.float32)


def no_gradients(asked: Asked, q: Blocks, kv: Blocks) -> Sums:
    """Return sums of gradients of queries, keys and values before any pair."""
    assert kv.y is not None
    none = (jnp.zeros(x.shape, jnp.float32) for x in (q.x, kv.x, kv.y))
    of_queries, of_keys, of_neither = (
        tuple(jnp.zeros(x.shape, jnp.float32) for x in floats(some))
        for some in (q.of_bias, kv.of_bias, asked.of_bias)
    )
    of_pairs = tuple(jnp.zeros(x.shape, jnp.float32) for x in asked.of_pairs.learnt)
    return Sums(next(none), next(none), next(none), of_queries, of_keys, of_neither, of_pairs)


def _asked_now(asked: Asked, rows: Blocks) -> Asked:
    """Return `asked`, its arrays of pairs to be cut no sooner than rows are worked with, see `_of_now`."""
    if all(x is None for x in asked.of_pairs):
        return asked
    _, of_pairs = lax.optimization_barrier((rows.x.reshape(-1)[:1], asked.of_pairs))
    return asked._replace(of_pairs=of_pairs)


def _of_now(rows: Blocks) -> Blocks:
    """Return `rows`, their places and segments to be had no sooner than what is computed with them.

    JAX takes out of a loop over layers what of its body no layer changes. Of these that would be which scores
    count, or what is added to them, for all pairs and heads at once: an array of the sequence squared.
    """
    own = rows.x.reshape(-1)[:1]
    _, at, segments, of_bias = lax.optimization_barrier((own, rows.at, rows.segments, rows.of_bias))
    return rows._replace(at=at, segments=segments, of_bias=of_bias)


def _instead(keys: Blocks, turn: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return what is put for hidden scores and for their weights, of these keys and of this turn alone.

    What is the same for all layers, chunks of a ring or turns, JAX takes out of that loop where layers are
    run again, and each turn then reads it as an array of a pair's scores.
    """
    told = (keys.at[0, 0], turn, np.float32(HIDDEN), np.float32(0))
    _, _, hidden, none = lax.optimization_barrier(told)
    return hidden, none


def fold(asked: Asked, q: Blocks, kv: Blocks, pairs: Pairs, state: State) -> State:
    """Return `state` after the keys of `pairs`."""
    q, kv, asked = _of_now(q), _of_now(kv), _asked_now(asked, q)
    values = kv.y
    assert values is not None
    ends = _ends(pairs)

    def step(state: State, turn: jax.Array) -> tuple[State, None]:
        a, b, live = _pair(pairs, ends, turn)
        (seen, weighs), (hidden, none) = _visible(asked, q, kv, a, b, live), _instead(kv, turn)
        at, scores = _place(q, kv, a, b), _scores(asked, q.x[a], kv.x[b])[0]
        scores = _with_bias(asked, biased(asked, scores, q, kv, a, b)[0], at)
        scores = jnp.where(weighs, _filled(asked.call, scores, seen), hidden)
        top, total, out = (x[a] for x in state)
        new = jnp.maximum(top, scores.max(-1))
        weights = jnp.where(weighs, jnp.exp(scores - new[..., None]), none)
        shrink = jnp.exp(top - new)
        kept = _by_factor(asked, weights, at).astype(values.dtype)
        more = _product(asked, "bkgqs,bksd->bkgqd", kept, values[b])
        total, out = total * shrink + weights.sum(-1), out * shrink[..., None] + more
        return tuple(x.at[a].set(y) for x, y in zip(state, (new, total, out), strict=True)), None  # pyright: ignore

    return lax.scan(step, state, jnp.arange(pairs.most, dtype=jnp.int32))[0]


def finished(
    state: State, sink: jax.Array | None = None, unseeing: float = 0.0, *, apart: bool = False
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Return the result and the logarithm of the sum of exponentials; `unseeing` where nothing was seen.

    That is what several numbers come to: `apart` gives the largest score and the rest, whose sum would be
    rounded where the largest is a number that hides scores.

    `sink` ``[1, 1, kv_heads, groups, 1]`` is a score that is in the sum and has no value.
    """
    top, total, out = state
    if sink is not None:
        new = jnp.maximum(top, sink)
        total, out = total * jnp.exp(top - new), out * jnp.exp(top - new)[..., None]
        total, top = total + jnp.exp(sink - new), new
    if unseeing != 0.0:
        out = jnp.where(total[..., None] == 0, unseeing, out)
    total = jnp.where(total == 0, 1.0, total)
    out, rest = out / total[..., None], jnp.log(total)
    return out, (top, rest) if apart else (top + rest,)


def less(scores: jax.Array, sums: Sequence[jax.Array]) -> jax.Array:
    """Return scores less the logarithms of the sums of their exponentials."""
    for one in sums:
        scores = scores - one
    return scores


def _of_pairs(
    asked: Asked, sums: tuple[jax.Array, ...], at: PairBlock, d_bias: jax.Array, d_factor: jax.Array
) -> tuple[jax.Array, ...]:
    """Return `sums` of gradients of arrays of pairs with those of one pair of blocks added."""
    given, learnt = asked.of_pairs, asked.of_pairs.learnt
    both = ((given.bias, d_bias), (given.factor, d_factor))
    mine = (more for x, more in both if any(x is one for one in learnt))
    return tuple(at.added(x, more) for x, more in zip(sums, mine, strict=True))


def unfold(
    asked: Asked,
    q: Blocks,
    kv: Blocks,
    lse: tuple[jax.Array, ...],
    delta: jax.Array,
    pairs: Pairs,
    sums: Sums,
) -> Sums:
    """Add the gradients of `pairs` to `sums`, float32 and laid out as queries, keys and values.

    `lse` is what `finished` gives of each query's sum of exponentials over all keys, `delta` its result times
    the result's gradient: with these a pair's weights and their gradient need no other pair (Dao et al. 2022,
    arXiv:2205.14135, appendix B).
    """
    q, kv, asked = _of_now(q), _of_now(kv), _asked_now(asked, q)
    values, d_out = kv.y, q.y
    assert values is not None
    assert d_out is not None
    ends, product = _ends(pairs), functools.partial(_product, asked)

    def step(sums: Any, turn: jax.Array) -> tuple[Any, None]:
        a, b, live = _pair(pairs, ends, turn)
        (seen, weighs), (_, none) = _visible(asked, q, kv, a, b, live), _instead(kv, turn)
        at, (scores, slope) = _place(q, kv, a, b), _scores(asked, q.x[a], kv.x[b])
        scores, back = biased(asked, scores, q, kv, a, b)
        scores = _filled(asked.call, _with_bias(asked, scores, at), seen)
        weights = jnp.where(weighs, jnp.exp(less(scores, [x[a][..., None] for x in lse])), none)
        d_weights = product("bkgqd,bksd->bkgqs", d_out[a], values[b])
        d_scores = weights * (_by_factor(asked, d_weights, at) - delta[a][..., None])
        if asked.call.fills and not asked.call.adds:
            d_scores = jnp.where(seen, d_scores, none)
        of_pairs = _of_pairs(asked, sums.of_pairs, at, d_scores, weights * d_weights)
        of_queries, of_keys, of_neither = back(d_scores)
        d_scores = d_scores * asked.call.scale
        d_scores = d_scores if slope is None else d_scores * slope
        weights = _by_factor(asked, weights, at).astype(values.dtype)
        d_scores = d_scores.astype(q.x.dtype)
        return Sums(
            sums.query.at[a].add(product("bkgqs,bksd->bkgqd", d_scores, kv.x[b])),
            sums.key.at[b].add(product("bkgqs,bkgqd->bksd", d_scores, q.x[a])),
            sums.value.at[b].add(product("bkgqs,bkgqd->bksd", weights, d_out[a])),
            tuple(x.at[a].add(one) for x, one in zip(sums.of_queries, of_queries, strict=True)),
            tuple(x.at[b].add(one) for x, one in zip(sums.of_keys, of_keys, strict=True)),
            tuple(x + one for x, one in zip(sums.of_neither, of_neither, strict=True)),
            of_pairs,
        ), None

    return lax.scan(step, sums, jnp.arange(pairs.most, dtype=jnp.int32))[0]
