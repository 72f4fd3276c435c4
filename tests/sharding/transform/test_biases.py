"""Biases of attention over `context`: worked out for each block, against the plain function on one device."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshwright.sharding import Plan, declare

pytestmark = [pytest.mark.numerics, pytest.mark.devices(8)]

ROWS, SEQUENCE, HEADS, WIDTH, EMBED = 4, 32, 4, 8, 16


def alibi(params: Any, batch: Any) -> Any:
    """Slopes of heads times distances."""
    place = jnp.arange(batch["x"].shape[1])
    distance = jnp.abs(place[:, None] - place[None, :]).astype(jnp.float32)
    return -params["slopes"][None, :, None, None] * distance


def by_iota(params: Any, batch: Any) -> Any:
    """The same by counting over the scores, and of powers that heads share."""
    shape = (batch["x"].shape[1],) * 2
    rows, keys = (jax.lax.broadcasted_iota(jnp.int32, shape, n) for n in range(2))
    decay = jnp.log1p(jnp.square(params["slopes"][:, None, None] * (rows - keys)))
    return -(decay * params["scale"])[None]


def by_positions(params: Any, batch: Any) -> Any:
    """Of positions that the data has, and a learnt number of each head and place of a key."""
    place = batch["positions"]
    distance = (place[:, :, None] - place[:, None, :]).astype(jnp.float32)
    bias = params["slopes"][None, :, None, None] * jnp.tanh(distance / 4)[:, None]
    return bias + params["of_keys"][None, :, None, :] * jnp.cos(distance)[:, None]


def by_buckets(params: Any, batch: Any) -> Any:
    """A table of buckets of distances, finer the nearer, as T5 has it."""
    place = jnp.arange(batch["x"].shape[1])
    behind = place[:, None] - place[None, :]
    half = len(params["buckets"]) // 2
    far = jnp.abs(behind)
    log = jnp.log(jnp.maximum(far, 1) / (half // 2)) / np.log(32 / (half // 2)) * (half - half // 2)
    near = jnp.where(far < half // 2, far, jnp.minimum(half // 2 + log.astype(jnp.int32), half - 1))
    return jnp.take(params["buckets"], near + half * (behind < 0), axis=0).transpose(2, 0, 1)[None]


def by_one_hot(params: Any, batch: Any) -> Any:
    """A learnt number of each head and distance, as a product with its one-hot form."""
    place = jnp.arange(batch["x"].shape[1])
    behind = jnp.clip(place[None, :] - place[:, None], -7, 8) + 7
    return jnp.einsum("qkn,nh->hqk", jax.nn.one_hot(behind, 16), params["buckets"])[None]


BIASES = {"slopes": alibi, "counted": by_iota, "positions": by_positions}
TABLES = {"buckets": by_buckets, "one-hot": by_one_hot}


def loss_of(bias: Any, *, causal: bool = True, written: str = "by hand", window: int = 1 << 20) -> Any:
    def loss(params: Any, batch: Any) -> Any:
        added = bias(params, batch)
        place = jnp.arange(batch["x"].shape[1])
        behind = place[:, None] - place
        mask = (behind >= 0) & (behind < window)

        def layer(x: Any, own: Any) -> Any:
            query, key, value = (jnp.einsum("bse,ehd->bshd", x, own[name]) for name in "qkv")
            if written == "by hand":
                scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(WIDTH) + added
                scores = jnp.where(mask, scores, -1e30) if causal else scores
                out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)
            else:
                out = jax.nn.dot_product_attention(query, key, value, bias=added, is_causal=causal)
            return x + jnp.einsum("bshd,hde->bse", out, own["o"]), None

        x, _ = jax.lax.scan(layer, batch["x"], params["layers"])
        # Few numbers a sum, whose rounding is less than what is compared.
        return jnp.square(x - batch["wanted"]).mean(-1).mean(-1).mean()

    return loss


@functools.cache
def problem() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return (0.3 * rng.normal(size=shape)).astype(np.float32)

    layers = {name: normal(2, EMBED, HEADS, WIDTH) for name in "qkv"}
    layers["o"] = normal(2, HEADS, WIDTH, EMBED)
    params = {
        "layers": layers,
        "slopes": np.abs(normal(HEADS)),
        "scale": np.float32(0.7),
        "buckets": normal(16, HEADS),
        "of_keys": normal(HEADS, SEQUENCE),
    }
    batch = {
        "x": normal(ROWS, SEQUENCE, EMBED),
        "wanted": normal(ROWS, SEQUENCE, EMBED),
        "positions": np.sort(rng.integers(0, 50, (ROWS, SEQUENCE)), 1).astype(np.int32),
    }
    return params, batch


def planned(loss: Any, mesh: dict[str, int], way: str | None) -> Plan:
    params, batch = problem()
    return declare(loss, params, batch, topology="cpu:8", mesh=mesh, context=way)


def check(loss: Any, plan: Plan) -> Any:
    """Compare a plan with the plain loss, and return its compiled program."""
    params, batch = problem()
    value, gradients = jax.jit(jax.value_and_grad(loss))(params, batch)
    on = plan.make_mesh()
    placed = jax.device_put((params, batch), (plan.shardings(params, on), plan.shardings(batch, on, "batch")))
    compiled = jax.jit(jax.value_and_grad(plan.apply(loss))).lower(*placed).compile()
    found, learnt = compiled(*placed)
    assert abs(found - value) <= 1e-6 * abs(value)
    for (path, one), own in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(learnt), strict=True):
        error = np.linalg.norm(own - one) / (np.linalg.norm(one) + 1e-30)
        assert error <= 1e-5, (jax.tree_util.keystr(path), error)
    return compiled


@pytest.mark.parametrize("name", ["slopes", "counted", *TABLES])
@pytest.mark.parametrize("way", ["gathered", "ring", "heads"])
def test_a_bias_of_distances_goes_over_context(name: str, way: str) -> None:
    loss = loss_of((BIASES | TABLES)[name])
    plan = planned(loss, {"data": 2, "context": 4}, way)
    assert plan.context == way
    assert not any("bias" in note for note in plan.notes), plan.notes
    check(loss, plan)


@pytest.mark.parametrize(
    ("mesh", "way"),
    [({"context": 2, "tensor": 2, "data": 2}, "gathered"), ({"fsdp": 2, "context": 4}, "ring")],
)
@pytest.mark.parametrize("written", ["by hand", "library"])
def test_positions_of_the_data_and_numbers_of_keys_go_with_their_rows(
    mesh: dict[str, int], way: str, written: str
) -> None:
    loss = loss_of(by_positions, causal=way != "ring", written=written)
    plan = planned(loss, mesh, way)
    assert plan.context == way
    check(loss, plan)


def test_a_bias_is_worked_out_for_a_part_of_heads_that_are_traded() -> None:
    loss = loss_of(by_positions, written="library")
    check(loss, planned(loss, {"context": 2, "tensor": 2, "data": 2}, "heads"))


@pytest.mark.parametrize("name", ["slopes", "buckets"])
def test_a_bias_is_worked_out_for_what_comes_from_neighbours(name: str) -> None:
    loss = loss_of((BIASES | TABLES)[name], window=5)
    plan = planned(loss, {"context": 8}, None)
    assert plan.context == "neighbours"
    check(loss, plan)


@pytest.mark.parametrize("mesh", [{"stage": 2, "context": 2, "data": 2}, {"stage": 2, "context": 4}])
def test_a_bias_goes_over_context_in_stages_and_microbatches(mesh: dict[str, int]) -> None:
    loss = loss_of(by_positions)
    params, batch = problem()
    plan = declare(
        loss, params, batch, topology="cpu:8", mesh=mesh, context="gathered", microbatches=2, interleave=1
    )
    check(loss, plan)


@pytest.mark.numerics(False)
@pytest.mark.parametrize("name", BIASES | TABLES)
@pytest.mark.parametrize("way", ["gathered", "ring"])
def test_no_array_of_all_queries_and_keys_is_compiled(name: str, way: str) -> None:
    params, _ = problem()
    params = {**params, "of_keys": jax.ShapeDtypeStruct((HEADS, 4096), jnp.float32)}
    rows = jax.ShapeDtypeStruct((2, 4096, EMBED), jnp.float32)
    batch = {"x": rows, "wanted": rows, "positions": jax.ShapeDtypeStruct((2, 4096), jnp.int32)}
    loss = loss_of((BIASES | TABLES)[name])
    plan = declare(loss, params, batch, topology="cpu:4", mesh={"context": 4}, context=way)
    on = plan.make_mesh(jax.devices()[:4])
    shapes = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        (params, batch),
        (plan.shardings(params, on), plan.shardings(batch, on, "batch")),
    )
    text = jax.jit(jax.value_and_grad(plan.apply(loss))).lower(*shapes).compile().as_text()
    sizes = (math.prod(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text))
    # Scores of a block of each row and head; those of a device's queries are sixteen times as many.
    assert max(sizes) <= 2 * HEADS * 512 * 512
