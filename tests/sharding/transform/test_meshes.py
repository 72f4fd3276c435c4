"""Meshes as users make them, and what JAX's transformations make of a planned loss."""

from __future__ import annotations

from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from meshwright.sharding import Plan, UserError, declare, train_step

pytestmark = [pytest.mark.devices(8), pytest.mark.numerics]

AXES = {"data": 2, "fsdp": 2, "tensor": 2}
EXPLICIT = (AxisType.Explicit,) * 3
X = np.linspace(-1, 1, 16 * 8, dtype=np.float32).reshape(16, 8)


def init(key: Any) -> dict[str, Any]:
    one, two = jax.random.split(key)
    return {"up": draws.normal(one, (8, 16)), "down": draws.normal(two, (16, 8))}


def loss(params: Any, x: Any) -> Any:
    return jnp.square(jnp.tanh(x @ params["up"]) @ params["down"] - x).mean()


@pytest.fixture(scope="module")
def made() -> Plan:
    names = {"up": ("embed", "mlp"), "down": ("mlp", "embed")}
    shapes = jax.eval_shape(init, jax.random.key(0))
    return declare(loss, shapes, X, topology="cpu:8", mesh=AXES, names=names)


@pytest.mark.parametrize("set_too", [False, True])
def test_a_step_runs_on_a_mesh_of_explicit_axes(made: Plan, set_too: bool) -> None:
    mesh = jax.make_mesh((2, 2, 2), ("tensor", "data", "fsdp"), axis_types=EXPLICIT)

    def run() -> Any:
        step = train_step(made, loss, init, X, optax.sgd(1e-2), mesh=mesh)
        state, metrics = step.update(step.init(jax.random.key(0)), X)
        evaluated, _ = step.evaluate(state["params"], X)
        return np.asarray(metrics["loss"]), np.asarray(evaluated)

    if set_too:
        with jax.set_mesh(mesh):
            first, second = run()
    else:
        first, second = run()
    params = init(jax.random.key(0))
    value, gradients = jax.jit(jax.value_and_grad(loss))(params, X)
    after = jax.tree.map(lambda old, change: old - 1e-2 * change, params, gradients)
    np.testing.assert_allclose([first, second], [value, loss(after, X)], rtol=1e-5)


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"a": 2, "b": 2, "c": 2}, "the mesh is a=2 x b=2 x c=2, the plan's data=2 x fsdp=2 x tensor=2"),
        ({"data": 4, "fsdp": 2}, "the mesh is data=4 x fsdp=2"),
        ({"data": 2, "fsdp": 2}, "the mesh is data=2 x fsdp=2, "),
    ],
)
def test_a_mesh_of_other_axes_is_one_sentence(made: Plan, axes: dict[str, int], said: str) -> None:
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), devices=devices)
    for use in (
        lambda: made.apply(loss, mesh),
        lambda: made.train_step(loss, optax.sgd(1e-2), mesh),
        lambda: made.init(init, jax.random.key(0), optax.sgd(1e-2), mesh),
    ):
        with pytest.raises(UserError, match=said):
            use()


def test_batches_of_parameters_and_second_derivatives_are_had(made: Plan) -> None:
    params, planned = init(jax.random.key(0)), made.apply(loss)

    def curved(one: Any) -> Any:
        return lambda params: sum(
            jnp.square(leaf).sum() for leaf in jax.tree.leaves(jax.grad(one)(params, X))
        )

    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    found = jax.jit(lambda: (jax.vmap(planned, (0, None))(many, X), jax.grad(curved(planned))(params)))()
    wanted = jax.vmap(loss, (0, None))(many, X), jax.grad(curved(loss))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, wanted)


def test_what_a_planned_loss_cannot_is_one_sentence(made: Plan) -> None:
    params, planned = init(jax.random.key(0)), made.apply(loss)
    with pytest.raises(UserError, match=r"by reverse only .*: take jax\.jacrev"):
        jax.jvp(lambda params: planned(params, X), (params,), (params,))
    mesh = jax.make_mesh((2, 2, 2), tuple(AXES), axis_types=EXPLICIT)
    with jax.set_mesh(mesh), pytest.raises(UserError, match="axes data, fsdp, tensor are explicit"):
        planned(params, X)
