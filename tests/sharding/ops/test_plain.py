"""Attention against a loop over queries in NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshwright.sharding import UserError
from meshwright.sharding.ops.plain import View, attend, attend_in_chunks, query_chunk

pytestmark = pytest.mark.numerics

SEQUENCE = 12


def arrays(heads: int, kv_heads: int) -> list[np.ndarray]:
    rng = np.random.default_rng(heads + kv_heads)
    return [rng.normal(size=(2, SEQUENCE, n, 4)).astype(np.float32) for n in (heads, kv_heads, kv_heads)]


def reference(query, key, value, *, segments=None, window=None, cap=None) -> np.ndarray:
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


CASES = [
    {},
    {"window": 3},
    {"cap": 2.0},
    {"segments": np.array([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3], np.int32)},
    {"segments": np.array([[1] * 5 + [2] * 7, [1] * 12], np.int32), "window": 4, "cap": 1.5},
]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("case", CASES)
def test_attention_is_softmax_over_what_is_in_view(heads: int, kv_heads: int, case: dict) -> None:
    query, key, value = arrays(heads, kv_heads)
    seen = view(case.get("segments"), case.get("window"))
    got = attend(*map(jnp.asarray, (query, key, value)), seen, cap=case.get("cap"))
    np.testing.assert_allclose(got, reference(query, key, value, **case), atol=1e-5)


@pytest.mark.parametrize("case", [CASES[0], CASES[4]])
def test_chunks_change_neither_values_nor_gradients(case: dict) -> None:
    query, key, value = map(jnp.asarray, arrays(4, 2))
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
    assert query_chunk(512, 128) == 128
    assert query_chunk(100, 128) is None
    with pytest.raises(UserError, match="attention_chunk=5 does not divide sequence=12; nearest: 4 or 6"):
        query_chunk(12, 5)
