"""Arrays of a state that look like no parameter: whose they are, and that they lie in parts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from meshwright.sharding import Plan, declare, plan, train_step
from meshwright.sharding.paths import by_path

WIDTH, HIDDEN, ROWS = 32, 64, 16
SHAPES = {
    "up": jax.ShapeDtypeStruct((WIDTH, HIDDEN), jnp.float32),
    "down": jax.ShapeDtypeStruct((HIDDEN, WIDTH), jnp.float32),
    "even": jax.ShapeDtypeStruct((HIDDEN, HIDDEN), jnp.float32),
}
NAMES = {"up": ("embed", "mlp"), "down": ("mlp", "embed"), "even": ("embed", "mlp")}
ROW = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)


def loss(params: Any, x: Any) -> Any:
    return jnp.square(jnp.tanh(x @ params["up"]) @ params["even"] @ params["down"]).mean()


@pytest.fixture(scope="module")
def made() -> Plan:
    return declare(loss, SHAPES, ROW, topology="cpu:8", mesh={"fsdp": 4, "tensor": 2}, names=NAMES)


def spec_of(made: Plan, path: str, *shape: int) -> P:
    tree: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
    for key in reversed(path.split("/")):
        tree = {key: tree}
    return by_path(made.specs(tree))[path]


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("0/mu/up", (WIDTH, HIDDEN), P("fsdp", "tensor")),
        ("0/history/up", (5, WIDTH, HIDDEN), P(None, "fsdp", "tensor")),
        ("0/columns/up", (HIDDEN,), P("tensor")),
        ("0/kept/up", (1, HIDDEN), P(None, "tensor")),
        ("0/projection/up", (WIDTH, 4), P("fsdp")),
        ("0/other/up", (4, HIDDEN), P(None, "tensor")),
        ("0/statistics/even", (HIDDEN, HIDDEN), P("fsdp", "tensor")),
        ("0/flat/up", (WIDTH * HIDDEN,), P(("fsdp", "tensor"))),
        ("all", (2 * WIDTH * HIDDEN + HIDDEN**2,), P(("fsdp", "tensor"))),
        # Of no parameter by its path: by its shape, and by its place in a list where shapes are alike.
        ("memory/0", (HIDDEN, WIDTH), P("tensor", "fsdp")),
        ("memory/0", (3, HIDDEN, WIDTH), P(None, "tensor", "fsdp")),
        # Of none, and more than a hundredth of all parameters.
        ("blocks", (9, 16, 16), P(None, ("fsdp", "tensor"))),
        ("count", (), P()),
        ("seen", (7,), P()),
    ],
)
def test_an_array_lies_as_what_it_belongs_to(made: Plan, path: str, shape: tuple[int, ...], spec: P) -> None:
    assert spec_of(made, path, *shape) == spec


def test_what_no_axis_divides_is_whole(made: Plan) -> None:
    assert spec_of(made, "blocks", 9, 17, 15) == P()


def test_plain_data_parallelism_cuts_no_state() -> None:
    whole = declare(loss, SHAPES, ROW, topology="cpu:8", mesh={"data": 8})
    assert spec_of(whole, "blocks", 64, 64, 64) == P()
    assert spec_of(whole, "all", 2 * WIDTH * HIDDEN + HIDDEN**2) == P()


def test_paths_that_collide_are_told_apart() -> None:
    params = {"a/b": SHAPES["up"], "a": {"b": SHAPES["down"]}}
    found = declare(
        lambda p, x: jnp.square(x @ p["a/b"] @ p["a"]["b"]).mean(),
        params,
        ROW,
        topology="cpu:8",
        mesh={"fsdp": 4, "tensor": 2},
        names={"a/b": ("embed", "mlp"), "a": {"b": ("mlp", "embed")}},
    )
    state = jax.eval_shape(optax.adam(1e-3).init, params)
    assert found.specs(params) == {"a/b": P("fsdp", "tensor"), "a": {"b": P("tensor", "fsdp")}}
    assert found.specs(state)[0].mu == found.specs(params)
    assert Plan.from_dict(found.to_dict()) == found


@pytest.mark.devices(8)
@pytest.mark.numerics
@pytest.mark.parametrize("searched", [False, True])
def test_a_bare_array_is_trained_in_parts(searched: bool) -> None:
    def init(key: Any) -> Any:
        return jax.random.normal(key, (WIDTH, HIDDEN))

    def one(w: Any, x: Any) -> Any:
        return jnp.square(x @ w).mean()

    optimizer = optax.adam(1e-2)
    shape, x = jax.eval_shape(init, jax.random.key(0)), jnp.linspace(-1, 1, ROWS * WIDTH).reshape(ROWS, WIDTH)
    if searched:
        found = plan(one, shape, x, topology="cpu:8", optimizer=optimizer)
    else:
        found = declare(one, shape, x, topology="cpu:8", mesh={"fsdp": 8}, names=("embed", "mlp"))
    step = train_step(found, one, init, x, optimizer, mesh=found.make_mesh())
    state, metrics = step.update(step.init(jax.random.key(0)), x)
    for leaf in (state["params"], state["optimizer"][0].mu):
        assert leaf.addressable_shards[0].data.size == leaf.size // 8

    w = init(jax.random.key(0))
    value, gradient = jax.value_and_grad(one)(w, x)
    changes, _ = optimizer.update(gradient, optimizer.init(w), w)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(state["params"], w + changes, rtol=1e-4, atol=1e-6)
