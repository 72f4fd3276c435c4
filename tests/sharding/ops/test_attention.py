"""The attention that a program calls by name: its values, and that its equation is told from all others."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshwright.sharding import UserError
from meshwright.sharding.ops import attention
from meshwright.sharding.ops.attention import attention_call

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
) -> np.ndarray:
    """Return attention one query at a time."""
    key_segment_ids = segment_ids if key_segment_ids is None else key_segment_ids
    group = query.shape[2] // key.shape[2]
    out = np.zeros((*query.shape[:3], value.shape[3]))
    for row, at, head in np.ndindex(*query.shape[:3]):
        seen = [
            place
            for place in range(key.shape[1])
            if (not causal or place <= at)
            and (window is None or place > at - window)
            and (segment_ids is None or key_segment_ids[row, place] == segment_ids[row, at])
        ]
        scores = key[row, seen, head // group] @ query[row, at, head] * (scale or query.shape[-1] ** -0.5)
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        weights = np.exp(scores - scores.max())
        out[row, at, head] = (weights / weights.sum()) @ value[row, seen, head // group]
    return out


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
    with pytest.raises(UserError, match="key_segment_ids without segment_ids"):
        attention(query, key, value, key_segment_ids=ids(QUERIES))
