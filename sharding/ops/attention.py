"""Attention: plain functions of queries, keys and values, and a call that stays one equation of a program.

The equation, which a plan may carry out by a kernel of the chip, is a jitted function whose body is the plain
maths: whoever does not know it sees through it, and without a plan XLA compiles just that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from ..errors import UserError, nearest_divisors
from .biases import BATCH, HEADS, KEYS, QUERIES, BoundBias
from .calls import WEIGHING, AttentionCall, query_chunk

# Below every real score, and far enough from the end of float32 that adding a score cannot overflow.
HIDDEN = -1e30


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
    causal: bool = True,
    window: jax.Array | int | None = None,
    cap: float | None = None,
    scale: float | None = None,
    chunk: int | None = None,
    ahead: int = 0,
    prefix: int = 0,
    mask: jax.Array | None = None,
    bias: jax.Array | BoundBias | None = None,
    sink: jax.Array | None = None,
    factor: jax.Array | None = None,
    fill: float | None = None,
    adds: bool = True,
    precision: str | None = None,
) -> jax.Array:
    """Return softmax(scale · query · keyᵀ) · value, ``[batch, queries, heads, value_dim]``.

    Under a plan it is computed by the kernel that the plan names, if that can; else by XLA, in chunks of
    queries where sequences are long. Scores and softmax are float32 either way. What a query gets that sees
    no key at all is not defined, unless `fill` is given.

    Args:
        query: ``[batch, queries, heads, head_dim]``.
        key: ``[batch, keys, kv_heads, head_dim]``; query head h reads kv head h // (heads / kv_heads).
        value: ``[batch, keys, kv_heads, value_dim]``.
        segment_ids: int32 ``[batch, queries]``: only what has the same number is seen.
        key_segment_ids: int32 ``[batch, keys]``; `segment_ids` if not given.
        causal: a query sees the keys up to its own place.
        window: a causal query sees itself and the window - 1 places before it.
        cap: scores become cap · tanh(score / cap).
        scale: of scores; head_dim ** -0.5 if not given.
        chunk: queries that XLA scores at a time; None decides by length, see `query_chunk`.
        ahead: places after its own that a causal query sees too.
        prefix: keys that a causal query sees wherever it stands.
        mask: bool ``[batch, heads, queries, keys]``, each of them or 1: what is false is hidden.
        bias: of the same shape, added to scores; or what gives it for any block of them.
        sink: ``[heads]``, a score that is in the sum of weights and has no value.
        factor: of the mask's shape, multiplied with weights, such as what a dropout keeps.
        fill: what every hidden score becomes, or what is added to it where it `adds`.
        adds: whether scores are hidden by adding a number rather than by being replaced.
        precision: of products of float32, such as ``highest``.

    Raises:
        UserError: shapes that do not go together, or a window, `ahead` or `prefix` without `causal`.
    """
    _check(query, key, value, causal=causal, window=window, widened=bool(ahead or prefix))
    placed = bias if isinstance(bias, BoundBias) else None
    weighing = {"mask": mask, "bias": bias if placed is None else None, "sink": sink, "factor": factor}
    given = tuple(name for name in WEIGHING if weighing[name] is not None)
    _check_weighing(query, key, {name: weighing[name] for name in given})
    ids = [ids for ids in (segment_ids, key_segment_ids) if ids is not None]
    if segment_ids is None and key_segment_ids is not None:
        raise UserError("key_segment_ids without segment_ids say nothing; give both")
    if segment_ids is not None and key_segment_ids is None and query.shape[1] != key.shape[1]:
        raise UserError(
            f"{query.shape[1]} queries and {key.shape[1]} keys cannot share segment_ids; give key_segment_ids"
        )
    static = window is None or isinstance(window, int)
    call = AttentionCall(
        causal=causal,
        window=window if isinstance(window, int) else None,
        windowed=not static,
        cap=None if cap is None else float(cap),
        scale=float(query.shape[-1] ** -0.5 if scale is None else scale),
        # GPUs' kernels take neither a soft cap nor float32, and XLA is to score no packed row whole.
        chunk=query_chunk(
            query.shape[1], chunk, packed=bool(ids) and (cap is not None or query.dtype == jnp.float32)
        ),
        segments=len(ids),
        ahead=ahead,
        prefix=prefix,
        given=given,
        fill=None if fill is None else float(fill),
        adds=adds,
        precision=precision,
        placed=None if placed is None else placed.bias,
    )
    arrays = [*(weighing[name] for name in given), *(() if placed is None else placed.arrays)]
    return _jitted(call)(query, key, value, *ids, *([] if static else [window]), *arrays)


def attention_call(eqn: core.JaxprEqn) -> AttentionCall | None:
    """Return what `eqn` asks for if it is a call of `attention`, None if it is anything else.

    A call that was batched by `jax.vmap`, or differentiated, is something else.
    """
    call = _CALLS.get(eqn.params.get("name", "")) if eqn.primitive.name == "jit" else None
    if call is None or len(eqn.invars) != call.operands or len(eqn.outvars) != 1:
        return None
    query, key, value, *others = [_shape(atom) for atom in eqn.invars]
    if any(len(shape) != 4 for shape in (query, key, value)):
        return None
    ids = [array[:2] for array in (query, key)][: call.segments]
    scores = (query[0], query[2], query[1], key[1])
    expected = [*ids, *([()] if call.windowed else [])]
    others, of_bias = others[: call.before_placed - 3], others[call.before_placed - 3 :]
    if call.placed is not None:
        sizes = {BATCH: scores[0], HEADS: scores[1], QUERIES: scores[2], KEYS: scores[3]}
        if not call.placed.fits(of_bias, sizes):
            return None
    for name, found in zip(call.given, others[len(expected) :], strict=True):
        fits = found == query[2:3] if name == "sink" else _fits(found, scores)
        if not fits:
            return None
        expected.append(found)
    if others != expected:
        return None
    return call if _shape(eqn.outvars[0]) == (*query[:3], value[3]) else None


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(getattr(atom.aval, "shape", ()))


def scaled(query: jax.Array, scale: float) -> jax.Array:
    """Return `query` times `scale`, rounded once."""
    return query if scale == 1 else (query.astype(jnp.float32) * scale).astype(query.dtype)


# Equation name → call, for every call that was traced in this process.
_CALLS: dict[str, AttentionCall] = {}


@functools.cache
def _jitted(call: AttentionCall) -> Callable[..., jax.Array]:
    def computed(query: jax.Array, key: jax.Array, value: jax.Array, *others: jax.Array) -> jax.Array:
        ids = others[: call.segments]
        after, last = call.segments + call.windowed, call.before_placed - 3
        weighing = dict(zip(call.given, others[after:last], strict=True))
        bound = None if call.placed is None else BoundBias(call.placed, others[last:])
        view = View(
            query_index=jnp.arange(query.shape[1], dtype=jnp.int32),
            key_index=jnp.arange(key.shape[1], dtype=jnp.int32),
            query_segments=ids[0] if ids else None,
            key_segments=ids[-1] if ids else None,
            window=others[call.segments] if call.windowed else call.window,
            causal=call.causal,
            ahead=call.ahead,
            prefix=call.prefix,
            fill=HIDDEN if call.fill is None else call.fill,
            adds=call.adds,
            placed=bound,
            **weighing,
        )
        query = scaled(query, call.scale)
        asked = {"cap": call.cap, "precision": call.precision}
        if call.chunk is None:
            return attend(query, key, value, view, **asked)
        return attend_in_chunks(query, key, value, view, chunk=call.chunk, **asked)

    computed.__name__ = computed.__qualname__ = call.name
    _CALLS[call.name] = call
    return jax.jit(computed)


def _fits(shape: tuple[int, ...], scores: Sequence[int]) -> bool:
    """Whether an array may be laid out over scores ``[batch, heads, queries, keys]``."""
    return len(shape) == 4 and all(mine in (1, size) for mine, size in zip(shape, scores, strict=True))


def _check_weighing(query: Any, key: Any, given: Mapping[str, Any]) -> None:
    scores = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    for name, array in given.items():
        if name == "sink":
            if array.shape != scores[1:2]:
                raise UserError(
                    f"sink has shape {array.shape}; expected one number for each of {scores[1]} heads"
                )
        elif not _fits(array.shape, scores):
            raise UserError(
                f"{name} has shape {array.shape}; expected [batch, heads, queries, keys]: {scores}, or 1"
            )


def _check(query: Any, key: Any, value: Any, *, causal: bool, window: Any, widened: bool) -> None:
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim != 4:
            raise UserError(f"{name} has shape {array.shape}; expected [batch, sequence, heads, head_dim]")
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise UserError(
            f"query {query.shape}, key {key.shape} and value {value.shape} do not go together; "
            "batch and head_dim of query and key must be equal, and all but the last of key and value"
        )
    heads, kv_heads = query.shape[2], key.shape[2]
    if heads % kv_heads:
        raise UserError(
            f"kv_heads={kv_heads} does not divide heads={heads}; nearest: {nearest_divisors(heads, kv_heads)}"
        )
    if window is not None and not causal:
        raise UserError("a window reaches back from a causal query; leave it out, or set causal=True")
    if widened and not causal:
        raise UserError("ahead and prefix widen what a causal query sees; leave them out, or set causal=True")


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
    kv_heads = key.shape[2]
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
        sizes = {BATCH: batch, HEADS: heads, QUERIES: queries, KEYS: key.shape[1]}
        bias = view.placed.bias(view.placed.arrays, sizes, view.placed.span)
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
            mine = mine._replace(placed=mine.placed.with_queries(*of_bias, span=sequence))
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
