"""The attention that a program calls by name: its values, and that its equation is told from all others."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshwright.sharding import UserError
from meshwright.sharding.ops import attention
from meshwright.sharding.ops.attention import View, attend, attend_in_chunks, attention_call, query_chunk

pytestmark = pytest.mark.numerics

BATCH, QUERIES, KEYS, HEADS, HEAD_DIM = 2, 12, 16, 4, 8


def arrays(kv_heads: int = 2, value_dim: int = HEAD_DIM, keys: int = QUERIES) -> list[np.ndarray]:
    rng = np.random.default_rng(kv_heads)
    shapes = (
        (BATCH, QUERIES, HEADS, HEAD_DIM),
        (BATCH, keys, kv_heads, HEAD_DIM),
        (BATCH, keys, kv_heads, value_dim),
    )
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def reference(
    query: Any,
    key: Any,
    value: Any,
    *,
    segment_ids: Any = None,
    key_segment_ids: Any = None,
    causal: bool = True,
    window: Any = None,
    cap: float | None = None,
    scale: float | None = None,
    ahead: int = 0,
    prefix: int = 0,
    mask: Any = None,
    bias: Any = None,
    sink: Any = None,
    factor: Any = None,
) -> np.ndarray:
    """Return attention one query at a time."""
    shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    mask = None if mask is None else np.broadcast_to(mask, shape)
    key_segment_ids = segment_ids if key_segment_ids is None else key_segment_ids
    group = query.shape[2] // key.shape[2]
    out = np.zeros((*query.shape[:3], value.shape[3]))
    for row, at, head in np.ndindex(*query.shape[:3]):
        seen = [
            place
            for place in range(key.shape[1])
            if (not causal or place <= at + ahead or place < prefix)
            and (mask is None or mask[row, head, at, place])
            and (window is None or place > at - window)
            and (segment_ids is None or key_segment_ids[row, place] == segment_ids[row, at])
        ]
        scores = key[row, seen, head // group] @ query[row, at, head] * (scale or query.shape[-1] ** -0.5)
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        if bias is not None:
            scores = scores + np.broadcast_to(bias, shape)[row, head, at, seen]
        weights = np.exp(scores)
        weights /= weights.sum() + (0 if sink is None else np.exp(sink[head]))
        if factor is not None:
            weights *= np.broadcast_to(factor, shape)[row, head, at, seen]
        out[row, at, head] = weights @ value[row, seen, head // group]
    return out


def pairs(*shape: int) -> np.ndarray:
    """Return a mask in which each query sees its own place and others at random."""
    return (np.random.default_rng(7).random(shape) < 0.6) | np.eye(shape[-2], shape[-1], dtype=bool)


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(8).normal(size=shape).astype(np.float32)


def ids(keys: int) -> np.ndarray:
    return np.array([[1] * 5 + [2] * (keys - 5), [1] * (keys - 3) + [0] * 3], np.int32)


CASES = {
    "plain": ({}, {}),
    "one kv head": ({"kv_heads": 1}, {}),
    "as many kv heads": ({"kv_heads": HEADS}, {"scale": 1.0}),
    "segments": ({}, {"segment_ids": ids(QUERIES)}),
    "window, cap": ({}, {"window": 4, "cap": 1.5}),
    "window in an array": ({}, {"window": jnp.int32(4), "segment_ids": ids(QUERIES)}),
    "chunks": ({}, {"chunk": 3, "window": 4, "segment_ids": ids(QUERIES)}),
    "not causal": ({"keys": KEYS}, {"causal": False}),
    "values of another width": ({"value_dim": 6}, {}),
    "cross": (
        {"keys": KEYS},
        {"causal": False, "segment_ids": ids(QUERIES), "key_segment_ids": ids(KEYS), "chunk": 4},
    ),
    "window of both sides": ({}, {"window": 3, "ahead": 2}),
    "only ahead": ({"keys": KEYS}, {"ahead": 4}),
    "prefix": ({}, {"prefix": 5, "chunk": 3}),
    "mask of pairs": ({}, {"mask": pairs(BATCH, 1, QUERIES, QUERIES), "window": 4}),
    "mask, in chunks": (
        {},
        {"mask": pairs(1, HEADS, QUERIES, QUERIES), "chunk": 3, "segment_ids": ids(QUERIES)},
    ),
    "bias of heads": ({}, {"bias": numbers(1, HEADS, QUERIES, QUERIES), "chunk": 4, "cap": 2.0}),
    "bias of keys": ({"kv_heads": HEADS}, {"bias": numbers(BATCH, 1, 1, QUERIES)}),
    "sink": ({}, {"sink": numbers(HEADS), "chunk": 6}),
    "factor": ({"kv_heads": 1}, {"factor": pairs(BATCH, HEADS, QUERIES, QUERIES), "chunk": 2}),
    "all at once": (
        {"keys": KEYS},
        {
            "causal": False,
            "bias": numbers(1, 1, QUERIES, KEYS),
            "mask": pairs(BATCH, HEADS, QUERIES, KEYS),
            "factor": numbers(BATCH, HEADS, QUERIES, KEYS),
            "sink": numbers(HEADS),
            "chunk": 3,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_values(case: str) -> None:
    shapes, options = CASES[case]
    got = attention(*arrays(**shapes), **options)
    options = {name: option for name, option in options.items() if name != "chunk"}
    np.testing.assert_allclose(got, reference(*arrays(**shapes), **options), atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_call_is_one_equation_that_tells_all_of_it(case: str) -> None:
    shapes, options = CASES[case]
    traced = {name: option for name, option in options.items() if not isinstance(option, (int, float, bool))}
    static = {name: option for name, option in options.items() if name not in traced}

    def function(qkv: Any, traced: Any) -> Any:
        return attention(*qkv, **traced, **static)

    (eqn,) = jax.make_jaxpr(function)(arrays(**shapes), traced).eqns
    call = attention_call(eqn)
    assert call is not None
    assert (call.causal, call.cap, call.chunk) == (
        options.get("causal", True),
        options.get("cap"),
        options.get("chunk"),
    )
    assert (call.window, call.windowed) == (static.get("window"), "window" in traced)
    assert call.scale == options.get("scale", HEAD_DIM**-0.5)
    assert call.segments == len([name for name in options if name.endswith("segment_ids")])
    assert set(call.given) == options.keys() & {"mask", "bias", "sink", "factor"}
    assert (call.ahead, call.prefix) == (options.get("ahead", 0), options.get("prefix", 0))


@pytest.mark.parametrize(("adds", "fill"), [(True, -1e9), (False, -1e9), (False, -np.inf)])
@pytest.mark.parametrize("chunk", [None, 4])
def test_a_query_that_sees_nothing_gets_what_its_fill_makes_of_it(
    adds: bool, fill: float, chunk: int | None
) -> None:
    query, key, value = map(jnp.asarray, arrays())
    mask = jnp.asarray(pairs(BATCH, 1, QUERIES, QUERIES)).at[0, :, 3].set(False)

    def plain(query: Any, key: Any, value: Any) -> Any:
        key, value = (jnp.repeat(x, 2, 2) for x in (key, value))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * HEAD_DIM**-0.5
        scores = scores + jnp.where(mask, 0.0, fill) if adds else jnp.where(mask, scores, fill)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)

    def ours(query: Any, key: Any, value: Any) -> Any:
        return attention(query, key, value, causal=False, mask=mask, fill=fill, adds=adds, chunk=chunk)

    np.testing.assert_allclose(ours(query, key, value), plain(query, key, value), atol=1e-6)
    if np.isfinite(fill):
        one, two = (jax.grad(lambda *x, f=f: jnp.sum(jnp.sin(f(*x))), (0, 1, 2)) for f in (ours, plain))
        for got, expected in zip(one(query, key, value), two(query, key, value), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-5)


def test_what_was_made_of_a_call_is_no_call() -> None:
    query, key, value = map(jnp.asarray, arrays())

    def total(*qkv: Any) -> Any:
        return attention(*qkv).sum()

    made = [
        jax.make_jaxpr(jax.vmap(attention))(query[None], key[None], value[None]),
        jax.make_jaxpr(jax.grad(total, (0, 1, 2)))(query, key, value),
        jax.make_jaxpr(jax.grad(total, 2))(query, key, value),
        jax.make_jaxpr(lambda *qkv: jax.jvp(attention, qkv, qkv))(query, key, value),
        jax.make_jaxpr(jax.jit(lambda *qkv: qkv[0] + 1))(query, key, value),
    ]
    for jaxpr in made:
        assert [attention_call(eqn) for eqn in jaxpr.eqns if eqn.primitive.name == "jit"]
        assert all(attention_call(eqn) is None for eqn in jaxpr.eqns)


def test_shapes_that_do_not_go_together() -> None:
    query, key, value = arrays(2)
    with pytest.raises(UserError, match=r"query has shape \(12, 4, 8\); expected \[batch, sequence, heads"):
        attention(query[0], key, value)
    with pytest.raises(UserError, match="kv_heads=3 does not divide heads=4; nearest: 2 or 4"):
        attention(query, *(np.repeat(x[:, :, :1], 3, axis=2) for x in (key, value)))
    with pytest.raises(UserError, match="do not go together"):
        attention(query, key[:, :5], value)
    with pytest.raises(UserError, match="set causal=True"):
        attention(query, key, value, window=3, causal=False)
    with pytest.raises(UserError, match="12 queries and 16 keys cannot share segment_ids"):
        attention(*arrays(keys=KEYS), segment_ids=ids(QUERIES), causal=False)
    with pytest.raises(UserError, match="ahead and prefix widen what a causal query sees"):
        attention(query, key, value, ahead=3, causal=False)
    with pytest.raises(
        UserError, match=r"bias has shape \(1, 3, 12, 12\); expected .*: \(2, 4, 12, 12\), or 1"
    ):
        attention(query, key, value, bias=np.zeros((1, 3, 12, 12), np.float32))
    with pytest.raises(UserError, match=r"sink has shape \(2,\); expected one number for each of 4 heads"):
        attention(query, key, value, sink=np.zeros(2, np.float32))
    with pytest.raises(UserError, match="key_segment_ids without segment_ids"):
        attention(query, key, value, key_segment_ids=ids(QUERIES))


SEQUENCE = 12


def drawn(heads: int, kv_heads: int) -> list[np.ndarray]:
    rng = np.random.default_rng(heads + kv_heads)
    return [rng.normal(size=(2, SEQUENCE, n, 4)).astype(np.float32) for n in (heads, kv_heads, kv_heads)]


def one_by_one(query, key, value, *, segments=None, window=None, cap=None) -> np.ndarray:
    out = np.zeros_like(query)
    group = query.shape[2] // key.shape[2]
    for row in range(query.shape[0]):
        for head in range(query.shape[2]):
            for at in range(SEQUENCE):
                seen = [
                    k
                    for k in range(at + 1)
                    if (window is None or k > at - window)
                    and (segments is None or segments[row, k] == segments[row, at])
                ]
                scores = key[row, seen, head // group] @ query[row, at, head]
                scores = scores if cap is None else cap * np.tanh(scores / cap)
                weights = np.exp(scores - scores.max())
                out[row, at, head] = (weights / weights.sum()) @ value[row, seen, head // group]
    return out


def view(segments: np.ndarray | None, window: int | None) -> View:
    index = jnp.arange(SEQUENCE)
    ids = None if segments is None else jnp.asarray(segments)
    return View(index, index, ids, ids, window)


PLAIN_CASES = [
    {},
    {"window": 3},
    {"cap": 2.0},
    {"segments": np.array([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3], np.int32)},
    {"segments": np.array([[1] * 5 + [2] * 7, [1] * 12], np.int32), "window": 4, "cap": 1.5},
]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("case", PLAIN_CASES)
def test_attention_is_softmax_over_what_is_in_view(heads: int, kv_heads: int, case: dict) -> None:
    query, key, value = drawn(heads, kv_heads)
    seen = view(case.get("segments"), case.get("window"))
    got = attend(*map(jnp.asarray, (query, key, value)), seen, cap=case.get("cap"))
    np.testing.assert_allclose(got, one_by_one(query, key, value, **case), atol=1e-5)


@pytest.mark.parametrize("case", [PLAIN_CASES[0], PLAIN_CASES[4]])
def test_chunks_change_neither_values_nor_gradients(case: dict) -> None:
    query, key, value = map(jnp.asarray, drawn(4, 2))
    seen = view(case.get("segments"), case.get("window"))

    def whole(*qkv: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(attend(*qkv, seen, cap=case.get("cap"))))

    def chunked(*qkv: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(attend_in_chunks(*qkv, seen, cap=case.get("cap"), chunk=3)))

    one, two = (jax.jit(jax.value_and_grad(f, (0, 1, 2)))(query, key, value) for f in (whole, chunked))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), one, two)


def test_long_rows_are_scored_in_chunks() -> None:
    assert query_chunk(4096, None) is None
    assert query_chunk(8192, None) == 1024
    assert query_chunk(8192 + 1, None) is None
    assert query_chunk(4096, None, packed=True) == 512
    assert query_chunk(1000, None, packed=True) is None
    assert query_chunk(512, 128) == 128
    assert query_chunk(100, 128) is None
    with pytest.raises(UserError, match="attention_chunk=5 does not divide sequence=12; nearest: 4 or 6"):
        query_chunk(12, 5)
