"""Layers that a loop takes by number: walked as a scan walks them, the same values; else left as written."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from meshwright.sharding import declare
from meshwright.sharding.program.jaxpr import Traced, scan_parts, shapes_of
from meshwright.sharding.program.recognise import recognised

pytestmark = pytest.mark.numerics

LAYERS, WIDTH = 6, 8


def init(layers: int = LAYERS) -> Any:
    rng = np.random.default_rng(0)
    up = rng.normal(size=(layers, WIDTH, WIDTH)) * 0.3
    return {"up": np.float32(up), "scale": np.float32(1 + 0.1 * rng.normal(size=(layers, WIDTH)))}


def rows() -> Any:
    return np.float32(np.random.default_rng(1).normal(size=(16, WIDTH)))


def layer(own: Any, x: Any) -> Any:
    return x + jnp.tanh((x * own["scale"]) @ own["up"])


def at(params: Any, n: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[n], params)


def counted(params: Any, x: Any) -> Any:
    return jax.lax.fori_loop(0, LAYERS, lambda n, x: layer(at(params, n), x), x).mean()


def numbered(params: Any, x: Any) -> Any:
    """Numbers that are walked, in checkpoints, by several ways of looking up."""

    def body(x: Any, n: Any) -> Any:
        up = jax.lax.dynamic_index_in_dim(params["up"], n, keepdims=False)
        return layer({"up": up, "scale": jnp.take(params["scale"], n, axis=0)}, x), n

    x, numbers = jax.lax.scan(jax.checkpoint(body), x, jnp.arange(LAYERS))
    return x.mean() + numbers.sum()


def pairs(params: Any, x: Any) -> Any:
    """Two layers a turn, of the last but two on, cast."""

    def body(n: Any, x: Any) -> Any:
        return layer(at(params, 2 * n + 2), layer(at(params, 2 * n + 1), x) * 1.5)

    return jax.jit(lambda x: jax.lax.fori_loop(0, LAYERS // 2 - 1, body, x))(x).mean()


def backward(params: Any, x: Any) -> Any:
    """From the last layer on, in a scan that goes through numbers in reverse."""
    numbers = np.arange(LAYERS, dtype=np.int32)
    return jax.lax.scan(lambda x, n: (layer(at(params, n), x), None), x, numbers, reverse=True)[0].mean()


def within(params: Any, x: Any) -> Any:
    """Numbers that a call within a turn has part of in writing."""

    def body(n: Any, x: Any) -> Any:
        own = jax.checkpoint(lambda n, by: at(params, jnp.where(n < LAYERS - 1, n + by, 0)))
        return layer(own(n, 1), x)

    return jax.lax.fori_loop(0, LAYERS - 1, body, x).mean()


def turned(params: Any, x: Any) -> Any:
    return jax.lax.fori_loop(0, LAYERS, lambda n, x: layer(at(params, LAYERS - 1 - n), x), x).mean()


def in_another_order(params: Any, x: Any) -> Any:
    order = jnp.array([4, 0, 5, 1])
    return jax.lax.scan(lambda x, n: (layer(at(params, n), x), None), x, order)[0].mean()


def in_steps_of_five(params: Any, x: Any) -> Any:
    return jax.lax.fori_loop(0, LAYERS, lambda n, x: layer(at(params, 5 * n % LAYERS), x), x).mean()


def walks(jaxpr: Any) -> list[tuple[int, int]]:
    """Return of each loop how many matrices of floats it reads whole, and how many it walks."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            parts = scan_parts(eqn)
            avals: list[Any] = [atom.aval for atom in eqn.invars]
            arrays = [aval.ndim > 1 and aval.dtype.kind == "f" for aval in avals]
            found.append((sum(arrays[: parts.num_consts]), sum(arrays[parts.num_consts + parts.num_carry :])))
        for inner in core.jaxprs_in_params(eqn.params):
            found += walks(inner)
    return found


def read(loss: Any, params: Any, *args: Any) -> Traced:
    jaxpr, result = jax.make_jaxpr(loss, return_shape=True)(params, *args)
    return recognised(Traced(jaxpr=jaxpr, args=shapes_of((params, *args)), result=result), ("layers",))


@pytest.mark.parametrize(
    ("loss", "walked"),
    [
        (counted, 2),
        (numbered, 2),
        (pairs, 4),
        (backward, 2),
        (within, 2),
        (turned, 2),
        (in_another_order, 2),
        (in_steps_of_five, 2),
    ],
    ids=lambda one: getattr(one, "__name__", str(one)),
)
def test_layers_by_number_are_walked(loss: Any, walked: int) -> None:
    params, x = init(), rows()
    found = read(loss, params, x)
    assert walks(found.jaxpr.jaxpr) == [(0, walked)]
    assert any("by number" in note and "test_numbered.py" in note for note in found.notes)

    def again(params: Any, x: Any) -> Any:
        return core.jaxpr_as_fun(found.jaxpr)(*jax.tree.leaves((params, x)))[0]

    (value, slopes), (wanted, expected) = (jax.jit(jax.value_and_grad(f))(params, x) for f in (again, loss))
    assert value == wanted
    for one, other in zip(jax.tree.leaves(slopes), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def in_order_of_data(params: Any, x: Any) -> Any:
    order = jnp.argsort(x[0, :LAYERS])
    return jax.lax.scan(lambda x, n: (layer(at(params, n), x), None), x, order)[0].mean()


def beyond_the_last(params: Any, x: Any) -> Any:
    """The last layer twice: a number that is too large is that of the last."""
    return jax.lax.fori_loop(1, LAYERS + 1, lambda n, x: layer(at(params, n), x), x).mean()


def read_whole_too(params: Any, x: Any) -> Any:
    def body(n: Any, x: Any) -> Any:
        return layer(at(params, n), x) + params["scale"].sum() * params["up"].sum()

    return jax.lax.fori_loop(0, LAYERS, body, x).mean()


@pytest.mark.parametrize("loss", [in_order_of_data, beyond_the_last, read_whole_too])
def test_what_is_taken_otherwise_stays(loss: Any) -> None:
    found = read(loss, init(), rows())
    assert walks(found.jaxpr.jaxpr) == [(2, 0)]
    assert not found.notes


def test_layers_by_number_go_through_stages() -> None:
    shapes = shapes_of((init(), rows()))
    plan = declare(counted, *shapes, topology="cpu:2", mesh={"stage": 2}, microbatches=2)
    assert plan.params["up"].spec[0] == "stage"
