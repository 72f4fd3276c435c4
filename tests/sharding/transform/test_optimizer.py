"""Optimizers of every kind in a planned step, against the loop that one writes on one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshwright.sharding import UserError, declare, plan, train_step
from meshwright.sharding.transform.optimizer import change, extra_of, handles_nonfinite
from optax import contrib

pytestmark = pytest.mark.numerics

NAMES = {"into": ("embed", "mlp"), "out": ("mlp", "embed")}
ROWS, WIDTH = 16, 16


def init(key: Any) -> Any:
    first, second = jax.random.split(key)
    return {
        "into": draws.normal(first, (WIDTH, 32)) / 4,
        "out": draws.normal(second, (32, WIDTH)) / 6,
    }


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((jnp.tanh(batch["x"] @ params["into"]) @ params["out"] - batch["y"]) ** 2)


def batches(count: int) -> list[Any]:
    keys = jax.random.split(jax.random.key(1), 2 * count).reshape(count, 2)
    return [{"x": draws.normal(x, (ROWS, WIDTH)), "y": draws.normal(y, (ROWS, WIDTH))} for x, y in keys]


def alone(name: str, count: int) -> tuple[Any, Any]:
    """Return parameters and optimizer state after `count` steps of plain JAX."""
    optimizer = optax.with_extra_args_support(MAKES[name]())

    @jax.jit
    def update(params: Any, state: Any, batch: Any) -> Any:
        def value_fn(params: Any) -> Any:
            return loss(params, batch)

        value, gradients = jax.value_and_grad(value_fn)(params)
        extra = {"value": value, "grad": gradients, "value_fn": value_fn}
        if name == "sam":
            extra = {"grad_fn": lambda params, _: jax.grad(value_fn)(params)}
        changes, state = optimizer.update(gradients, state, params, **extra)
        return optax.apply_updates(params, changes), state

    params = jax.jit(init)(jax.random.key(0))
    state = jax.jit(optimizer.init)(params)
    for batch in batches(count):
        params, state = update(params, state, batch)
    return params, state


def plateau() -> Any:
    return optax.chain(optax.adam(1e-2), contrib.reduce_on_plateau(patience=1, cooldown=0, rtol=0.5))


MAKES = {
    "plateau": plateau,
    "lbfgs": optax.lbfgs,
    "polyak": optax.polyak_sgd,
    "backtracking": lambda: optax.chain(optax.sgd(0.1), optax.scale_by_backtracking_linesearch(5)),
    "momo": lambda: contrib.momo(0.1),
    "sam": lambda: contrib.sam(optax.sgd(0.1), optax.sgd(0.01), sync_period=2, opaque_mode=True),
}


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("name", "microbatches"),
    [
        ("plateau", 1),
        ("backtracking", 2),
        *(
            pytest.param(name, parts, marks=pytest.mark.slow)
            for name, parts in (("polyak", 2), ("momo", 1), ("sam", 2), ("lbfgs", 1), ("lbfgs", 2))
        ),
    ],
)
def test_what_an_optimizer_asks_for_is_given(name: str, microbatches: int) -> None:
    made = MAKES[name]()
    batch = batches(1)[0]
    params, state = alone(name, 3)
    planned = declare(
        loss,
        jax.eval_shape(init, jax.random.key(0)),
        batch,
        topology="cpu:8",
        mesh={"fsdp": 4, "tensor": 2},
        names=NAMES,
        microbatches=microbatches,
    )
    step = train_step(planned, loss, init, batch, made, mesh=planned.make_mesh())
    found = step.init(jax.random.key(0))
    for batch in batches(3):
        found, _ = step.update(found, jax.device_put(batch, step.batch))
    for got, wanted in zip(jax.tree.leaves(found["params"]), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    for got, wanted in zip(jax.tree.leaves(found["optimizer"]), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4)


def needs(**needed: Any) -> Any:
    """Return an optimizer of one's own that cannot do without `needed`."""
    del needed

    def update(updates: Any, state: Any, params: Any = None, *, curvature: Any, **extra: Any) -> Any:
        del params, extra
        return jax.tree.map(lambda leaf: leaf * curvature, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


@pytest.mark.once("sharding/transform/test_optimizer.py")
def test_an_optimizer_in_a_chain_is_not_given_what_it_does_not_take() -> None:
    """A chain takes any words and hands all on: SAM, which has one for none of them, says TypeError."""
    chained = optax.chain(optax.clip(1.0), contrib.sam(optax.sgd(0.1), optax.sgd(0.01), sync_period=2))
    params = jax.jit(init)(jax.random.key(0))
    batch = batches(1)[0]
    value, gradients = jax.jit(jax.value_and_grad(loss))(params, batch)
    state = chained.init(params)
    extra = extra_of(chained, lambda params: loss(params, batch), value, gradients)
    assert extra
    for got, wanted in zip(
        jax.tree.leaves(change(chained, gradients, state, params, extra)),
        jax.tree.leaves(chained.update(gradients, state, params)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.numerics(False)
@pytest.mark.devices(8)
@pytest.mark.parametrize("inside", [False, True])
def test_what_no_step_has_is_said_in_a_sentence(inside: bool) -> None:
    made = optax.chain(optax.scale(1.0), needs()) if inside else needs()
    batch = batches(1)[0]
    planned = plan(loss, jax.eval_shape(init, jax.random.key(0)), batch, topology="cpu:8")
    with pytest.raises(UserError, match="the optimizer's update needs 'curvature', which a step has not"):
        planned.train_step(loss, made)(planned.init(init, jax.random.key(0), made), batch)


@pytest.mark.numerics(False)
@pytest.mark.devices(8)
def test_an_optimizer_that_differentiates_forward_is_told_so() -> None:
    batch, made = batches(1)[0], contrib.sophia(1e-3)
    planned = plan(loss, jax.eval_shape(init, jax.random.key(0)), batch, topology="cpu:8")
    with pytest.raises(UserError, match=r"differentiates the loss forward \(jax.jvp"):
        planned.train_step(loss, made)(planned.init(init, jax.random.key(0), made), batch)


@pytest.mark.numerics(False)
@pytest.mark.parametrize(
    ("make", "itself"),
    [
        (lambda: optax.adamw(1.0), False),
        (lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1.0)), False),
        (optax.lbfgs, False),
        (lambda: contrib.muon(1.0), False),
        (lambda: optax.MultiSteps(optax.adam(1.0), 2).gradient_transformation(), False),
        (lambda: optax.inject_hyperparams(optax.adam)(1.0), False),
        (lambda: optax.apply_if_finite(optax.adam(1.0), 3), True),
        (lambda: optax.chain(optax.zero_nans(), optax.adam(1.0)), True),
        (
            lambda: optax.MultiSteps(
                optax.sgd(1.0), 2, should_skip_update_fn=optax.skip_not_finite
            ).gradient_transformation(),
            True,
        ),
        (lambda: optax.GradientTransformation(lambda params: {"loss_scale": jnp.float32(8)}, None), True),  # pyright: ignore
    ],
)
def test_which_optimizers_deal_with_nan_themselves(make: Callable[[], Any], itself: bool) -> None:
    assert handles_nonfinite(make().init({"w": jnp.ones((2, 2)), "final": jnp.ones(3)})) is itself
