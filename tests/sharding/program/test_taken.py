"""Stacked layers of which a loop takes some, in any order, or again: layers all the same, for stages too."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshwright.sharding import declare
from meshwright.sharding.program.jaxpr import shapes_of
from meshwright.sharding.program.tracing import trace

LAYERS, WIDTH = 6, 8


def init() -> Any:
    rng = np.random.default_rng(0)
    up = rng.normal(size=(LAYERS, WIDTH, 2 * WIDTH)) * 0.3
    return {"up": np.float32(up), "down": np.float32(rng.normal(size=(LAYERS, 2 * WIDTH, WIDTH)) * 0.3)}


def rows() -> Any:
    return np.float32(np.random.default_rng(1).normal(size=(16, WIDTH)))


def layer(own: Any, x: Any) -> Any:
    return x + jnp.tanh(x @ own["up"]) @ own["down"]


def at(params: Any, which: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[which], params)


def scanned(params: Any, x: Any) -> Any:
    return jax.lax.scan(lambda x, own: (layer(own, x), None), x, params)[0]


def some(params: Any, x: Any) -> Any:
    return scanned(at(params, slice(1, 5)), x).mean()


def every_second(params: Any, x: Any) -> Any:
    return scanned(at(params, slice(None, None, 2)), x).mean()


def in_order(params: Any, x: Any) -> Any:
    return scanned(at(params, np.array([5, 3, 1, 0, 2, 4])), x).mean()


def there_and_back(params: Any, x: Any) -> Any:
    """Half of the layers, what they give kept for the other half."""
    x, kept = jax.lax.scan(lambda x, own: (layer(own, x), x), x, at(params, slice(3)))
    other = at(params, slice(3, None)), kept[::-1]
    return jax.lax.scan(lambda x, own: (layer(own[0], x + own[1]), None), x, other)[0].mean()


def in_a_loop(params: Any, x: Any) -> Any:
    for n in range(LAYERS):
        x = layer(at(params, n), x)
    return x.mean()


def in_a_loop_backwards(params: Any, x: Any) -> Any:
    for n in reversed(range(0, LAYERS, 2)):
        x = layer(at(params, n), x)
    return x.mean()


def apart() -> Any:
    return [at(init(), n) for n in range(LAYERS)]


def each_twice(params: Any, x: Any) -> Any:
    for own in params:
        x = layer(own, layer(own, x))
    return x.mean()


def half_of_them_twice(params: Any, x: Any) -> Any:
    for own in (*params[:4], *params[:4]):
        x = layer(own, x)
    return x.mean()


LOSSES = {
    some: (init, 4),
    every_second: (init, 3),
    in_order: (init, 6),
    there_and_back: (init, 3),
    in_a_loop: (init, 6),
    in_a_loop_backwards: (init, 3),
    each_twice: (apart, 6),
    half_of_them_twice: (apart, 8),
}
CASES = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)


@CASES
def test_layers_that_a_loop_takes_are_those_of_its_parameters(loss: Any) -> None:
    made, count = LOSSES[loss]
    program = trace(loss, *shapes_of((made(), rows())), recognise=("layers",))
    layers = [dim for dim in program.dims if dim.stacked]
    assert [dim.size for dim in layers] == [count]
    taken = {index for stack in program.stacks for index in stack.arguments}
    lying = {one.index for one in program.parameters if (layers[0].id,) in one.dims}
    read = 8 if loss is half_of_them_twice else len(program.parameters)
    assert len(taken | lying) == read


def test_a_loop_over_the_rows_of_a_stack_walks_the_stack_itself() -> None:
    program = trace(in_a_loop, *shapes_of((init(), rows())), recognise=("layers",))
    assert not program.stacks
    assert not [one for one in program.scope.equations if one.primitive in ("concatenate", "slice")]


def by_data(params: Any, x: Any) -> Any:
    return scanned(at(params, jnp.argsort(x[0, :LAYERS])), x).mean()


def test_layers_that_the_data_picks_are_not_taken_of_parameters_alone() -> None:
    program = trace(by_data, *shapes_of((init(), rows())), recognise=("layers",))
    assert not program.stacks


# Means of terms of either sign: in code that is not optimised their sums round by more than 1e-6.
@pytest.mark.numerics(optimised=True)
@pytest.mark.devices(4)
@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(one, marks=() if one is in_order else pytest.mark.slow, id=one.__name__)
        for one in LOSSES
        if one is not in_a_loop
    ],
)
def test_stages_give_the_plain_functions_gradients(loss: Any) -> None:
    """The layers that are not taken stay without a gradient."""
    params, x = LOSSES[loss][0](), rows()
    plan = declare(loss, params, x, topology="cpu:4", mesh={"stage": 2, "fsdp": 2}, microbatches=2)
    mesh = plan.make_mesh(devices=jax.devices()[:4])
    placed = jax.device_put((params, x), (plan.shardings(params, mesh), plan.shardings(x, mesh, "batch")))
    value, found = jax.jit(jax.value_and_grad(plan.apply(loss, mesh=mesh)))(*placed)
    wanted, expected = jax.jit(jax.value_and_grad(loss))(params, x)
    assert abs(value - wanted) <= 1e-6 * abs(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(one - other) <= 1e-5 * np.linalg.norm(other)
