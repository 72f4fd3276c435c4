"""Mistakes at the doors of jitted functions, and derivatives of every kind of a plan's loss."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from meshwright.sharding import UserError, declare, train_step

pytestmark = pytest.mark.devices(8)

SGD = optax.sgd(1e-1)


def init(key: Any) -> Any:
    return {"w": jax.random.normal(key, (8, 8))}


def batch() -> Any:
    return {"x": np.linspace(-1, 1, 128, dtype=np.float32).reshape(16, 8)}


def loss(params: Any, batch: Any) -> Any:
    return jnp.square(jnp.tanh(batch["x"] @ params["w"])).mean()


def planned(**how: Any) -> Any:
    shapes = jax.eval_shape(init, jax.random.key(0))
    return declare(loss, shapes, batch(), topology="cpu:8", **{"mesh": {"data": 8}, **how})


def test_what_is_no_array_is_named_at_every_door() -> None:
    plan = planned()
    step = train_step(plan, loss, init, batch(), SGD, mesh=plan.make_mesh())
    state = step.init(jax.random.key(0))
    with pytest.raises(UserError, match="'f' of the batch is a function, which is no array of numbers"):
        step.update(state, {**batch(), "f": jnp.tanh})
    with pytest.raises(UserError, match="'x' of the batch is a str, which is no array of numbers"):
        step.update.lower(state, {"x": "text"})
    with pytest.raises(UserError, match="'x' of the batch is a ndarray, which is no array of numbers"):
        step.evaluate(state["params"], {"x": np.array(["a", "b"])})
    with pytest.raises(UserError, match="'w' of the parameters is a function"):
        plan.apply(loss)({"w": jnp.tanh}, batch())


def test_a_mesh_of_another_order_is_one_sentence() -> None:
    plan = planned()
    step = train_step(plan, loss, init, batch(), SGD, mesh=plan.make_mesh())
    state = step.init(jax.random.key(0))
    other = jax.sharding.Mesh(np.array(jax.devices()[::-1]), ("data",))
    with (
        pytest.raises(UserError, match=r"the same devices in another order than the plan's \(\[7, 6"),
        jax.set_mesh(other),
    ):
        step.update(state, batch())
    with jax.set_mesh(plan.make_mesh()):
        step.update(state, batch())


@pytest.mark.numerics
def test_plain_data_parallelism_is_differentiated_forward_and_back_any_number_of_times() -> None:
    params = init(jax.random.key(0))

    def all_of(function: Any) -> Any:
        def of(w: Any) -> Any:
            return function({"w": w}, batch())

        w = params["w"]
        pushed = jax.jvp(of, (w,), (w * w,))
        return pushed, jax.jvp(jax.grad(of), (w,), (w,)), jax.grad(lambda w: jax.jvp(of, (w,), (w,))[1])(w)

    want, got = jax.jit(lambda: all_of(loss))(), jax.jit(lambda: all_of(planned().apply(loss)))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), got, want)


def test_where_parts_are_gathered_or_added_up_forward_is_one_sentence() -> None:
    params = init(jax.random.key(0))
    for how in ({"mesh": {"fsdp": 8}, "names": {"w": ("embed", "mlp")}}, {"microbatches": 2}):
        made = planned(**how).apply(loss)
        with pytest.raises(UserError, match="differentiated by reverse only"):
            jax.jvp(lambda p, made=made: made(p, batch()), (params,), (params,))


def test_parts_are_worked_through_under_a_mesh_of_other_axes_and_in_batches_of_parameters() -> None:
    plan, params = planned(microbatches=2), init(jax.random.key(0))
    other = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    wanted = jax.jit(jax.value_and_grad(loss))(params, batch())
    with jax.set_mesh(other):
        found = jax.jit(jax.value_and_grad(plan.apply(loss)))(params, batch())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, wanted)
    several = jax.vmap(lambda by: plan.apply(loss)({"w": by * params["w"]}, batch()))(jnp.arange(1.0, 3.0))
    np.testing.assert_allclose(several[0], wanted[0], rtol=1e-6)


def test_other_devices_and_other_arrays_are_one_sentence() -> None:
    plan, params = planned(microbatches=2), init(jax.random.key(0))
    step = train_step(plan, loss, init, batch(), SGD, mesh=plan.make_mesh())
    few = Mesh(np.array(jax.devices()[:4]), ("x",))
    with jax.set_mesh(few):
        for call in (step.init, jax.jit(lambda _: plan.apply(loss)(params, batch()))):
            with pytest.raises(UserError, match=r"jax\.set_mesh has set has 4 devices, the plan's 8"):
                call(jax.random.key(0))
    there = jax.device_put(batch(), NamedSharding(few, PartitionSpec()))
    for call in (step.evaluate, plan.apply(loss)):
        with pytest.raises(UserError, match="'x' of the batch was put on other devices"):
            call(params, there)
    with pytest.raises(UserError, match="batch array"):
        plan.apply(loss)(params, {})
    with pytest.raises(UserError, match="is no training state: it lacks optimizer, params, step"):
        step.update(batch(), batch())


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"mesh": [8]}, "is no mapping, such as"),
        ({"mesh": {"data": "8"}}, "'data' is '8': no whole number"),
        ({"rules": "w"}, "is no mapping, such as"),
        ({"microbatches": "2"}, "microbatches='2' must be a whole number"),
        ({"attention": 3}, "must be the name of a kernel"),
        ({"recognise": 3}, "must be some of attention"),
        ({"optimizer": optax.adam}, "is none of optax's"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_arguments_of_another_kind_are_one_sentence(how: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        planned(**how)
