"""Attention: plain functions of queries, keys and values, and a call that stays one equation of a program.

The equation, which a plan may carry out by a kernel of the chip, is a jitted function whose body is the plain
maths: whoever does not know it sees through it, and without a plan XLA compiles just that.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from ..errors import UserError, nearest_divisors
from .biases import BATCH, HEADS, KEYS, QUERIES, BoundBias, PlacedBias
from .scores import HIDDEN, View, attend, attend_in_chunks, query_chunk

_NAME = "meshwright_attention"

# Arrays that change scores and weights beyond what places and segments say.
WEIGHING = ("mask", "bias", "sink", "factor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """What one call of `attention` asks for, apart from its arrays.

    `windowed` says that the window is an array, and then `window` is None. `segments` is how many arrays of
    segment ids there are: one for queries and keys alike, or one of each. `ahead` and `prefix` widen what
    causality shows. `given` names the arrays of `WEIGHING` that there are, in that order; behind them come
    the operands of a bias that is worked out by blocks, `placed`. `fill` and `adds` say what hides a score,
    `precision` what products of float32 ask for.
    """

    causal: bool
    window: int | None
    windowed: bool
    cap: float | None
    scale: float
    chunk: int | None
    segments: int
    ahead: int = 0
    prefix: int = 0
    given: tuple[str, ...] = ()
    fill: float | None = None
    adds: bool = True
    precision: str | None = None
    placed: PlacedBias | None = None

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
            "ahead": self.ahead,
            "prefix": self.prefix,
            **dict.fromkeys(self.given, True),
            "placed": self.placed is not None and self.placed.digest,
            "fill": self.fill is not None and str(self.fill),
            "replaces": not self.adds,
            "precision": self.precision or False,
        }
        words = [key if value is True else f"{key}={value}" for key, value in told.items() if value]
        return f"{_NAME}[{','.join(words)}]"

    def visible(self, queries: int, keys: int) -> float:
        """Return how many (query, key) pairs causality and a window leave; segments hide more."""
        return visible_pairs(
            queries, keys, causal=self.causal, window=self.window, ahead=self.ahead, prefix=self.prefix
        )

    @property
    def operands(self) -> int:
        """How many operands the call's equation has."""
        return self.before_placed + (len(self.placed.operands) if self.placed is not None else 0)

    @property
    def before_placed(self) -> int:
        """How many operands stand before those of a bias that is worked out by blocks."""
        return 3 + self.segments + self.windowed + len(self.given)


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


@functools.lru_cache(maxsize=1024)
def visible_pairs(
    queries: int, keys: int, *, causal: bool, window: int | None, ahead: int = 0, prefix: int = 0
) -> float:
    """Return how many (query, key) pairs a causal mask leaves, within a window if there is one.

    >>> visible_pairs(4, 4, causal=True, window=None), visible_pairs(4, 4, causal=True, window=2, ahead=1)
    (10.0, 10.0)
    """
    if not causal:
        return float(queries * keys)
    place = np.arange(queries)
    last = np.minimum(np.maximum(place + ahead, prefix - 1), keys - 1)
    first = 0 if window is None else np.maximum(place - window + 1, 0)
    return float(np.maximum(last - first + 1, 0).sum())


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
