"""Attention as one named equation of a traced program, which a plan may carry out by a kernel of the chip.

The equation is a jitted function whose body is the plain maths: whoever does not know it sees through it, and
without a plan XLA compiles just that.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from ..errors import UserError, nearest_divisors
from .plain import View, attend, attend_in_chunks, query_chunk

_NAME = "meshwright_attention"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """What one call of `attention` asks for, apart from its arrays.

    `windowed` says that the window is an array, the last operand, and then `window` is None. `segments` is
    how many arrays of segment ids there are: one for queries and keys alike, or one of each.
    """

    causal: bool
    window: int | None
    windowed: bool
    cap: float | None
    scale: float
    chunk: int | None
    segments: int

    @property
    def name(self) -> str:
        """The name of the call's equation, which tells all of it."""
        told = {
            "causal": self.causal,
            "window": self.window if self.window is not None else self.windowed,
            "cap": self.cap or False,
            "scale": self.scale != 1 and self.scale,
            "chunk": self.chunk or False,
            "segments": self.segments,
        }
        words = [key if value is True else f"{key}={value}" for key, value in told.items() if value]
        return f"{_NAME}[{','.join(words)}]"

    def visible(self, queries: int, keys: int) -> float:
        """Return how many (query, key) pairs causality and a window leave; segments hide more."""
        return visible_pairs(queries, keys, causal=self.causal, window=self.window)

    @property
    def operands(self) -> int:
        """How many operands the call's equation has."""
        return 3 + self.segments + self.windowed


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
) -> jax.Array:
    """Return softmax(scale · query · keyᵀ) · value, ``[batch, queries, heads, value_dim]``.

    Under a plan it is computed by the kernel that the plan names; else by XLA, in chunks of queries where
    sequences are long. Scores and softmax are float32 either way. What a query gets that sees no key at all
    is not defined.

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
        chunk: queries that XLA scores at a time; None decides by length, see `plain.query_chunk`.

    Raises:
        UserError: shapes that do not go together, or a window without `causal`.
    """
    _check(query, key, value, causal=causal, window=window)
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
        chunk=query_chunk(query.shape[1], chunk),
        segments=len(ids),
    )
    return _jitted(call)(query, key, value, *ids, *([] if static else [window]))


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
    if others != [*ids, *([()] if call.windowed else [])]:
        return None
    return call if _shape(eqn.outvars[0]) == (*query[:3], value[3]) else None


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(getattr(atom.aval, "shape", ()))


def visible_pairs(queries: int, keys: int, *, causal: bool, window: int | None) -> float:
    """Return how many (query, key) pairs a causal mask leaves, within a window if there is one."""
    if not causal:
        return float(queries * keys)
    reach = min(keys if window is None else window, keys)
    rows = min(queries, reach)
    # The first rows see one key more each; from there on a row sees as many as it may.
    return rows * (rows + 1) / 2 + (queries - rows) * reach


def scaled(query: jax.Array, scale: float) -> jax.Array:
    """Return `query` times `scale`, rounded once."""
    return query if scale == 1 else (query.astype(jnp.float32) * scale).astype(query.dtype)


# Equation name → call, for every call that was traced in this process.
_CALLS: dict[str, AttentionCall] = {}


@functools.cache
def _jitted(call: AttentionCall) -> Callable[..., jax.Array]:
    def computed(query: jax.Array, key: jax.Array, value: jax.Array, *others: jax.Array) -> jax.Array:
        ids = others[: call.segments]
        view = View(
            query_index=jnp.arange(query.shape[1], dtype=jnp.int32),
            key_index=jnp.arange(key.shape[1], dtype=jnp.int32),
            query_segments=ids[0] if ids else None,
            key_segments=ids[-1] if ids else None,
            window=others[-1] if call.windowed else call.window,
            causal=call.causal,
        )
        query = scaled(query, call.scale)
        if call.chunk is None:
            return attend(query, key, value, view, cap=call.cap)
        return attend_in_chunks(query, key, value, view, cap=call.cap, chunk=call.chunk)

    computed.__name__ = computed.__qualname__ = call.name
    _CALLS[call.name] = call
    return jax.jit(computed)


def _check(query: Any, key: Any, value: Any, *, causal: bool, window: Any) -> None:
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
