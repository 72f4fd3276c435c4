"""Arrays of all queries and keys over `context`, and what hides keys beside a bias, against one device."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshwright.sharding import declare
from meshwright.sharding.ops.attention import attention

pytestmark = [pytest.mark.numerics, pytest.mark.devices(8)]

ROWS, SEQUENCE, HEADS, WIDTH, EMBED = 4, 16, 4, 8, 16
PLACE = np.arange(SEQUENCE)
CAUSAL = PLACE[:, None] >= PLACE


@functools.cache
def problem() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return (0.3 * rng.normal(size=shape)).astype(np.float32)

    layers = {name: normal(2, EMBED, HEADS, WIDTH) for name in "qkv"}
    layers |= {"o": normal(2, HEADS, WIDTH, EMBED), "bias": normal(2, HEADS, SEQUENCE, SEQUENCE)}
    params = {
        "layers": layers,
        "slopes": np.abs(normal(HEADS)),
        "buckets": normal(8, HEADS),
        "of_pairs": normal(6, HEADS),
        "sink": normal(HEADS),
    }
    ends = np.array([16, 5, 11, 8])[:, None]
    batch = {
        "x": normal(ROWS, SEQUENCE, EMBED),
        "wanted": normal(ROWS, SEQUENCE, EMBED),
        "pairs": normal(ROWS, SEQUENCE, SEQUENCE, 6),
        "right": ends > PLACE,
        "left": SEQUENCE - ends <= PLACE,
        "key": jax.random.key(3),
    }
    return params, batch


def of_layers(params: Any, batch: Any, own: Any) -> Any:
    """A parameter of its own in each layer."""
    return own["bias"][None]


def of_data(params: Any, batch: Any, own: Any) -> Any:
    """A projection of what the data has of each pair."""
    return jnp.einsum("bqkc,ch->bhqk", batch["pairs"], params["of_pairs"])


def of_numpy(params: Any, batch: Any, own: Any) -> Any:
    """Buckets of distances that NumPy has told before the trace."""
    return params["buckets"][np.clip(PLACE - PLACE[:, None], -4, 3) + 4].transpose(2, 0, 1)[None]


def by_einsum(params: Any, batch: Any, own: Any) -> Any:
    """Slopes of heads times distances of each row's own places."""
    place = jnp.cumsum(batch["right"], 1)
    distance = jnp.abs(place[:, :, None] - place[:, None]).astype(jnp.float32)
    return -jnp.einsum("h,bqk->bhqk", params["slopes"], distance)


def by_slopes(params: Any, batch: Any, own: Any) -> Any:
    place = jnp.arange(SEQUENCE)
    return -params["slopes"][None, :, None, None] * jnp.abs(place[:, None] - place).astype(jnp.float32)


def none(params: Any, batch: Any, own: Any) -> Any:
    return jnp.zeros((1, 1, 1, 1))


def right(scores: Any, batch: Any) -> Any:
    """Padding behind rows, added as a number of each key."""
    return scores + (1.0 - batch["right"][:, None, None].astype(jnp.float32)) * -1e9


def left(scores: Any, batch: Any) -> Any:
    """Padding before rows, so that causal queries see no key: added as a number or nothing."""
    return scores + jnp.where(CAUSAL & batch["left"][:, None, None], 0.0, -1e9)


def replaced(scores: Any, batch: Any) -> Any:
    """The same, put in the place of scores."""
    return jnp.where(CAUSAL & batch["left"][:, None, None], scores, -1e9)


def endless(scores: Any, batch: Any) -> Any:
    return jnp.where(batch["right"][:, None, None], scores, -jnp.inf)


def of_pairs(scores: Any, batch: Any) -> Any:
    """A mask of its own for every query and key."""
    return jnp.where((batch["pairs"][:, None, ..., 0] > -0.2) | np.eye(SEQUENCE, dtype=bool), scores, -1e30)


def causal(scores: Any, batch: Any) -> Any:
    return jnp.where(CAUSAL, scores, -1e30)


def near(scores: Any, batch: Any) -> Any:
    """A window of four keys."""
    return jnp.where(CAUSAL & (PLACE[:, None] - PLACE < 4), scores, -1e30)


def shown(scores: Any, batch: Any) -> Any:
    return scores


def loss_of(bias: Any, hide: Any = shown, *, drops: bool = False, sinks: bool = False) -> Any:
    def loss(params: Any, batch: Any) -> Any:
        def layer(x: Any, given: Any) -> Any:
            own, key = given
            q, k, v = (jnp.einsum("bse,ehd->bshd", x, own[name]) for name in "qkv")
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(WIDTH)
            scores = hide(scores + bias(params, batch, own), batch)
            if sinks:
                sink = jnp.broadcast_to(params["sink"][None, :, None, None], (*scores.shape[:3], 1))
                scores = jnp.concatenate([scores, sink], -1)
            weights = jax.nn.softmax(scores)
            weights = weights[..., :-1] if sinks else weights
            if drops:
                weights = jnp.where(jax.random.bernoulli(key, 0.8, weights.shape), weights / 0.8, 0)
            out = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
            return x + jnp.einsum("bshd,hde->bse", out, own["o"]), None

        x, _ = jax.lax.scan(layer, batch["x"], (params["layers"], jax.random.split(batch["key"], 2)))
        return jnp.square(x - batch["wanted"]).mean(-1).mean(-1).mean()

    return loss


def check(loss: Any, mesh: dict[str, int], way: str, given: Any = None) -> list[str]:
    """Compare a way with the plain loss; return the plan's notes on attention."""
    params, batch = given or problem()
    plan = declare(loss, params, batch, topology="cpu:8", mesh=mesh, context=way)
    value, gradients = jax.jit(jax.value_and_grad(loss))(params, batch)
    on = plan.make_mesh()
    placed = jax.device_put((params, batch), (plan.shardings(params, on), plan.shardings(batch, on, "batch")))
    found, learnt = jax.jit(jax.value_and_grad(plan.apply(loss)))(*placed)
    assert abs(found - value) <= 1e-6 * abs(value)
    for (path, one), own in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(learnt), strict=True):
        error = np.linalg.norm(own - one) / (np.linalg.norm(one) + 1e-30)
        assert error <= 1e-5, (jax.tree_util.keystr(path), error)
    return [note for note in plan.notes if note.startswith("attention")]


OVER = {"data": 2, "context": 4}


@pytest.mark.parametrize(
    ("bias", "hide", "mesh", "way"),
    [
        (of_layers, causal, OVER, "ring"),
        (of_layers, shown, {"context": 2, "tensor": 2, "data": 2}, "heads"),
        (of_data, right, OVER, "ring"),
        (of_numpy, causal, OVER, "gathered"),
        (of_layers, near, OVER, "neighbours"),
        (by_einsum, shown, OVER, "ring"),
        (none, of_pairs, OVER, "heads"),
    ],
)
def test_arrays_of_pairs_lie_along_queries(bias: Any, hide: Any, mesh: dict[str, int], way: str) -> None:
    (said,) = check(loss_of(bias, hide), mesh, way)
    what = "mask" if hide is of_pairs else "bias"
    assert said.startswith(f"attention has a {what} of all queries and keys")


@pytest.mark.parametrize(
    ("hide", "way"), [(right, "ring"), (left, "gathered"), (replaced, "heads"), (endless, "ring")]
)
def test_what_hides_keys_stands_beside_a_bias_of_places(hide: Any, way: str) -> None:
    assert not check(loss_of(by_slopes, hide), OVER, way)


@pytest.mark.parametrize("hide", [left, replaced])
def test_a_query_that_sees_no_key_beside_an_array_of_pairs_gets_what_it_got(hide: Any) -> None:
    check(loss_of(of_layers, hide, sinks=hide is left), OVER, "gathered")


def test_dropout_and_a_bias_go_round_together() -> None:
    check(loss_of(by_slopes, causal, drops=True), OVER, "ring")


@pytest.mark.parametrize(("way", "hide"), [("ring", causal), ("heads", right)])
def test_a_sink_is_in_the_sum_of_every_query(way: str, hide: Any) -> None:
    assert not check(loss_of(none, hide, sinks=True), OVER, way)


@pytest.mark.numerics(False)
def test_a_bias_that_a_call_is_given_is_followed_to_what_it_is_made_of() -> None:
    def loss(params: Any, batch: Any) -> Any:
        x = batch["x"]
        q, k, v = (jnp.einsum("bse,ehd->bshd", x, params["layers"][name][0]) for name in "qkv")
        bias = jnp.broadcast_to(by_slopes(params, batch, None), (1, HEADS, SEQUENCE, SEQUENCE))
        ids = jnp.cumsum(~batch["right"], 1).astype(jnp.int32)
        out = attention(q, k[:, :, :2], v[:, :, :2], bias=bias, segment_ids=ids, cap=5.0)
        return jnp.square(out - 1).mean((1, 3)).mean(-1).mean()

    assert not check(loss, OVER, "gathered")


def test_blocks_of_queries_add_to_the_one_row_of_a_bias_that_they_share() -> None:
    """Of 514 queries a device, which are two blocks."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 1028, 2, 4)).astype(np.float32)
    given = {"bias": rng.normal(size=(1, 2, 1, 1028)).astype(np.float32)}, {"x": x}

    def loss(params: Any, batch: Any) -> Any:
        x = batch["x"]
        mask = (jnp.sin(x[..., 0].sum(-1) * 9)[:, None, None] < 0.5) | np.eye(1028, dtype=bool)
        out = attention(x, x, x, bias=params["bias"], mask=mask, causal=False)
        return jnp.square(out).mean((2, 3)).mean(-1).mean()

    check(loss, {"data": 4, "context": 2}, "ring", given)
