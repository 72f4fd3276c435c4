"""Attention of packed rows by cuDNN, its two primitives worked out by hand, against plain attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as inside
from meshwright.sharding import declare
from meshwright.sharding.ops import attention
from meshwright.sharding.ops.kernels import kernel_facts
from meshwright.sharding.ops.segments import packed_offsets, runs, sound

pytestmark = [pytest.mark.numerics, pytest.mark.devices(8)]

BATCH, SEQUENCE, EMBED, HEADS, HEAD_DIM = 4, 512, 16, 4, 8


class ByHand:
    """A primitive of cuDNN's as its documentation reads: packed arrays by offsets in elements and lengths.

    What no run covers is left as it lay in memory, here NaN.
    """

    def __init__(self, backward: bool) -> None:
        self._backward = backward

    def bind(self, *operands: Any, **settings: Any) -> list[Any]:
        query, key, value, bias, lengths, _, of_queries, of_keys, _, _, *rest = operands
        assert settings["sliding_window_length"] is None

        def attend(query: Any, key: Any, value: Any) -> Any:
            batch, queries, heads, _ = query.shape
            key, value = (jnp.repeat(array, heads // array.shape[2], axis=2) for array in (key, value))
            if not lengths.size:
                seen = jnp.zeros((batch, 1, queries, key.shape[1])) if not bias.size else bias
                scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * settings["scale"] + seen
                return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), value)
            flat = [array.reshape(1, -1, *array.shape[2:]) for array in (query, key, value)]
            run_of_query, run_of_key = (
                _runs(offsets.ravel() // (array.shape[2] * array.shape[3]), lengths.ravel(), batch * queries)
                for offsets, array in ((of_queries, operands[0]), (of_keys, operands[1]))
            )
            same = run_of_query[:, None] == run_of_key[None]
            if settings["mask_type"] == inside.MaskType.PADDING_CAUSAL:
                same &= jnp.tril(same)
            scores = jnp.einsum("bqhd,bkhd->bhqk", *flat[:2]) * settings["scale"]
            weights = jax.nn.softmax(jnp.where(same, scores, -1e30), axis=-1)
            out = jnp.einsum("bhqk,bkhd->bqhd", weights, flat[2])
            out = jnp.where((run_of_query >= 0)[None, :, None, None], out, jnp.nan)
            return out.reshape(batch, queries, heads, -1)

        if not self._backward:
            out = attend(query, key, value)
            return [out, jnp.zeros((len(out), HEADS, SEQUENCE))] if settings["is_training"] else [out]
        return list(jax.vjp(attend, query, key, value)[1](rest[2]))


def _runs(starts: Any, lengths: Any, size: int) -> Any:
    """Return the run of each token, -1 where it is in none."""
    place = jnp.arange(size)
    found = jnp.full(size, -1)
    for n in range(lengths.size):
        found = jnp.where((place >= starts[n]) & (place < starts[n] + lengths[n]), n, found)
    return found


@pytest.fixture(autouse=True)
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inside, "_dot_product_attention_fwd_p", ByHand(backward=False))
    monkeypatch.setattr(inside, "_dot_product_attention_bwd_p", ByHand(backward=True))
    monkeypatch.setattr(inside, "check_is_flash_attention", lambda *_: None)
    monkeypatch.setattr(inside, "check_cudnn_version", lambda: 91200)
    for kernel in ("cudnn", "cudnn_packed"):
        of_tests = {"dtypes": ["float32"], "other_value_dim": "narrower"}
        monkeypatch.setitem(kernel_facts(), kernel, {**kernel_facts()[kernel], **of_tests})
    monkeypatch.setattr(inside, "get_large_negative_number", lambda dtype: jnp.asarray(-1e30, dtype))


LAYOUTS = {
    "one": np.ones((BATCH, SEQUENCE)),
    "many": np.repeat(np.arange(1, 9), SEQUENCE // 8)[None].repeat(BATCH, 0),
    "padding at the end": np.concatenate([np.full(100, 1), np.full(311, 2), np.zeros(101)])[None].repeat(
        BATCH, 0
    ),
    "rows unlike": np.stack(
        [
            np.concatenate([[7], [3], np.full(SEQUENCE - 2, 5)]),
            np.zeros(SEQUENCE),
            np.concatenate([np.zeros(9), np.full(1, 2), np.zeros(0), np.full(SEQUENCE - 10, 1)]),
            np.repeat([4, 9, 1, 2, 8, 3, 5, 6], SEQUENCE // 8),
        ]
    ),
}


def loss_of(**options: Any) -> Any:
    def loss(params: Any, batch: Any) -> Any:
        query, key, value = (
            jnp.einsum("bse,ehd->bshd", batch["x"], params[name]) for name in ("query", "key", "value")
        )
        out = attention(query, key, value, segment_ids=batch["segments"], **options)
        return jnp.mean(jnp.sin(out) * batch["x"][..., None, :1])

    return loss


def arrays(layout: str, kv_heads: int = 2, value_dim: int = HEAD_DIM) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    shapes = {
        "query": (EMBED, HEADS, HEAD_DIM),
        "key": (EMBED, kv_heads, HEAD_DIM),
        "value": (EMBED, kv_heads, value_dim),
    }
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    x = rng.normal(size=(BATCH, SEQUENCE, EMBED)).astype(np.float32)
    return params, {"x": x, "segments": LAYOUTS[layout].astype(np.int32)}


def results(layout: str, kernel: dict[str, Any], options: Any, **sizes: int) -> tuple[Any, Any]:
    """Return loss and gradients by a kernel on 8 devices, and by plain attention on one."""
    loss, (params, batch) = loss_of(**options), arrays(layout, **sizes)
    plan = declare(loss, params, batch, topology="cpu:8", mesh={"data": 4, "tensor": 2})
    assert plan.kernels == {}
    plan = dataclasses.replace(plan, kernels={"attention": kernel})
    got = jax.jit(jax.value_and_grad(plan.apply(loss, plan.make_mesh())))(params, batch)
    return got, jax.jit(jax.value_and_grad(loss))(params, batch)


def check(*found: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), *found)


@pytest.mark.parametrize(
    ("layout", "options", "sizes"),
    [
        ("one", {}, {}),
        ("many", {"scale": 0.3}, {"kv_heads": 4, "value_dim": 4}),
        ("padding at the end", {}, {}),
        ("rows unlike", {"causal": False}, {}),
    ],
)
def test_packed(layout: str, options: Any, sizes: Any) -> None:
    check(*results(layout, {"implementation": "cudnn_packed", "segments": 8}, options, **sizes))


@pytest.mark.parametrize(
    ("layout", "options", "sizes"),
    [
        ("many", {}, {"kv_heads": 1, "value_dim": 4}),
        ("rows unlike", {"window": 100}, {}),
        ("padding at the end", {"causal": False}, {}),
    ],
)
def test_masks_of_few_queries(layout: str, options: Any, sizes: Any) -> None:
    check(*results(layout, {"implementation": "cudnn"}, options, **sizes))


def test_a_call_with_a_window_has_masks_beside_packed_ones() -> None:
    check(*results("rows unlike", {"implementation": "cudnn_packed", "segments": 8}, {"window": 9}))


@pytest.mark.parametrize("segments", [2, 7])
def test_a_row_of_more_segments_is_never_passed_over(segments: int) -> None:
    (value, gradients), _ = results("many", {"implementation": "cudnn_packed", "segments": segments}, {})
    assert np.isnan(value)
    assert np.isnan(gradients["query"]).all()


@pytest.mark.once("sharding/transform/test_packed_attention.py")
def test_a_segment_that_comes_back_is_never_passed_over() -> None:
    ids = jnp.array([[1, 1, 2, 1], [1, 2, 2, 3], [0, 0, 3, 0], [5, 5, 5, 5]])
    assert sound(ids, 4).tolist() == [False, True, False, True]
    assert sound(ids, 2).tolist() == [False, False, False, True]


def test_a_row_s_end_does_not_stand_among_the_offsets() -> None:
    ids = jnp.array([[1, 1, 1, 2], [3, 3, 3, 3], [1, 2, 3, 3]])
    starts, lengths = runs(ids, 3)
    assert starts.tolist() == [[0, 3, -1], [0, -1, -1], [0, 1, 2]]
    assert lengths.tolist() == [[3, 1, 0], [4, 0, 0], [1, 1, 2]]
    offsets, counts = packed_offsets(ids, 3, per_token=10)
    assert offsets.ravel().tolist() == [0, 30, 40, 80, 90, 100, *[120] * 6]
    assert counts.ravel().tolist() == [3, 1, 4, 1, 1, 2, 0, 0, 0]
