"""Losses that say in types how their arrays lie, on a mesh of explicit axes: planned as if they did not."""

from __future__ import annotations

from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, auto_axes, reshard
from jax.sharding import PartitionSpec as P
from meshwright.sharding import UserError, declare, plan, train_step

pytestmark = [pytest.mark.devices(8), pytest.mark.numerics]

ROWS, WIDTH, LAYERS = 8, 8, 4
X = np.linspace(-1, 1, ROWS * 4 * WIDTH, dtype=np.float32).reshape(ROWS, 4, WIDTH)
OVER_ROWS = P("x", None, None)


def mesh(devices: int = 8) -> Any:
    sizes = (4, 2) if devices == 8 else (1, 1)
    return jax.make_mesh(sizes, ("x", "y"), (AxisType.Explicit,) * 2, devices=jax.devices()[:devices])


def init(key: Any) -> dict[str, Any]:
    keys = iter(jax.random.split(key, 2 * LAYERS + 1))
    layers = [{n: draws.normal(next(keys), (WIDTH, WIDTH)) for n in ("up", "down")} for _ in range(LAYERS)]
    return {
        "layers": layers,
        "scanned": draws.normal(next(keys), (3, WIDTH, WIDTH)) / 3,
        "scale": jnp.float32(0.7),
    }


@jax.custom_vjp
def scaled(x: Any, scale: Any) -> Any:
    return reshard(x * scale, OVER_ROWS)


# Gradients that are none of the functions', so that a rule left out shows.
scaled.defvjp(
    lambda x, scale: (scaled(x, scale), (x, scale)),
    lambda kept, g: (reshard(2 * g * kept[1], OVER_ROWS), jnp.sum(g * kept[0])),
)


@jax.custom_jvp
def bent(x: Any) -> Any:
    return reshard(jnp.tanh(x), OVER_ROWS)


@bent.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return bent(*primals), reshard(3 * tangents[0] * jnp.cos(primals[0]), OVER_ROWS)


def loss(params: Any, x: Any) -> Any:
    soft = auto_axes(lambda h: jax.nn.softmax(h, -1), out_sharding=OVER_ROWS)
    x = reshard(x, OVER_ROWS)
    for layer in params["layers"]:
        h = jnp.einsum("btd,df->btf", x, layer["up"], out_sharding=P("x", None, "y"))
        h = jnp.reshape(jax.nn.relu(h), (ROWS, 4, 2, 4), out_sharding=P("x", None, None, None))

        @jax.checkpoint
        def summed(x: Any, h: Any, down: Any) -> Any:
            return x + jnp.einsum("btf,fd->btd", soft(h), reshard(down, P("y", None)), out_sharding=OVER_ROWS)

        x = scaled(summed(x, h.reshape(x.shape), layer["down"]), params["scale"])

    def turn(x: Any, w: Any) -> Any:
        return bent(jax.lax.cond(w[0, 0] > 0, jnp.sin, jnp.cos, x @ reshard(w, P(None, None)))), None

    x, _ = jax.lax.scan(turn, x, params["scanned"])
    return jnp.mean(x**2), {"sum": x.sum()}


def expected(params: Any) -> Any:
    with jax.set_mesh(mesh()):
        return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(loss, has_aux=True))(params, X))


@pytest.mark.parametrize(
    "declared",
    [
        {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}, "microbatches": 2},
        {"mesh": {"data": 2, "fsdp": 2, "stage": 2}, "microbatches": 2},
    ],
    ids=["parts", "stages"],
)
def test_a_loss_written_for_explicit_axes_gives_its_own_values(declared: dict[str, Any]) -> None:
    params = init(jax.random.key(0))
    with jax.set_mesh(mesh()):
        made = declare(loss, params, X, topology="cpu:8", **declared)
        planned = made.apply(loss)
    assert any("written out one after another run as scans" in note for note in made.notes)
    found = jax.jit(jax.value_and_grad(planned, has_aux=True))(params, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), found, expected(params))


def test_a_step_of_such_a_loss_runs_under_its_own_mesh() -> None:
    params = init(jax.random.key(0))
    shapes = jax.eval_shape(init, jax.random.key(0))
    with jax.set_mesh(mesh(1)):
        found = plan(loss, shapes, X, topology="cpu:8", optimizer=optax.sgd(1e-2))
    with jax.set_mesh(mesh()):
        step = train_step(found, loss, init, X, optax.sgd(1e-2), mesh=found.make_mesh())
    state, metrics = step.update(step.init(jax.random.key(0)), X)
    (value, _), gradients = expected(params)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    after = jax.tree.map(lambda old, change: old - 1e-2 * change, params, gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), state["params"], after)


def test_a_manual_region_and_an_array_from_outside_keep_their_values() -> None:
    outside = jax.device_put(np.arange(WIDTH, dtype=np.float32), NamedSharding(mesh(), P("y")))

    def over_rows(w: Any) -> Any:
        return jax.lax.psum(jnp.sum(w**2), "x")

    def function(w: Any, x: Any) -> Any:
        penalty = jax.shard_map(over_rows, in_specs=P("x"), out_specs=P())(reshard(w, P("x", None)))
        return jnp.mean((x @ w + reshard(outside, P(None))) ** 2) + penalty

    w = draws.normal(jax.random.key(1), (WIDTH, WIDTH))
    with jax.set_mesh(mesh()):
        made = declare(function, w, X, topology="cpu:8", mesh={"fsdp": 8})
        planned = made.apply(function)
        value, gradient = jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(function))(w, X))
    found = jax.jit(jax.value_and_grad(planned))(w, X)
    np.testing.assert_allclose(found[0], value, rtol=1e-5)
    np.testing.assert_allclose(found[1], gradient, rtol=1e-5)


def test_a_region_over_some_explicit_axes_is_one_sentence() -> None:
    def function(w: Any, x: Any) -> Any:
        region = jax.shard_map(
            lambda w: jax.lax.psum(w.sum(), "x"), in_specs=P("x"), out_specs=P(), axis_names={"x"}
        )
        return jnp.mean((x @ w) ** 2) + region(reshard(w, P("x", None)))

    with (
        jax.set_mesh(mesh()),
        pytest.raises(UserError, match="leaves out y of its mesh, whose axes are explicit"),
    ):
        plan(function, jnp.ones((WIDTH, WIDTH)), X, topology="cpu:8")


def test_what_a_region_counts_is_known_under_a_mesh_that_is_set() -> None:
    # JAX computes nothing at once for the devices of a region where a mesh is set.
    rows = jax.make_mesh((8,), ("x",), (AxisType.Auto,))

    def sorted_rows(w: Any, x: Any) -> Any:
        moved = jnp.argsort(x.sum(-1)) // 2
        return jax.lax.ragged_dot(x + moved[:, None], w[None], jnp.array([len(x)], jnp.int32))

    def function(w: Any, x: Any) -> Any:
        specs: Any = {"in_specs": (P(), P("x")), "out_specs": P("x"), "check_vma": False}
        return jnp.mean(jax.shard_map(sorted_rows, mesh=rows, **specs)(w, x) ** 2)

    x = np.linspace(-1, 1, 2 * ROWS * WIDTH, dtype=np.float32).reshape(2 * ROWS, WIDTH)
    with jax.set_mesh(rows), pytest.raises(UserError, match="a sort has moved meet some that it has not"):
        declare(function, jnp.eye(WIDTH), x, topology="cpu:8", mesh={"data": 8}, microbatches=2)
