"""A backward pass in two: bit for bit the gradients of the whole, by the same products, each made once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import draws
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.extend import core
from meshwright.sharding.transform.pipeline.split import Halves, split

LAYERS, ROWS, WIDTH, HIDDEN = 3, 8, 16, 32
# Products of a layer's weights, of which each has a gradient that is one product more.
WEIGHTS = 2


def arguments() -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = {
        "up": (LAYERS, WIDTH, HIDDEN),
        "down": (LAYERS, HIDDEN, WIDTH),
        "shared": (WIDTH, WIDTH),
        "last": (WIDTH, WIDTH),
        "x": (ROWS, WIDTH),
    }
    made = {
        name: draws.normal(key, shape) * 0.3 for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return {"scale": jnp.ones((LAYERS, WIDTH)), **made}


def layer(x: Any, own: Any) -> Any:
    h = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * own["scale"]
    return x + jax.nn.silu(h @ own["up"]) @ own["down"]


@jax.custom_vjp
def by_hand(x: Any, own: Any) -> Any:
    return layer(x, own)


by_hand.defvjp(lambda x, own: jax.vjp(layer, x, own), lambda pull, dy: pull(dy))


def scanned(one: Callable[[Any, Any], Any], **how: Any) -> Callable[[Any], Any]:
    def run(args: Any) -> Any:
        own = {name: args[name] for name in ("up", "down", "scale")}
        return lax.scan(lambda x, own: (one(x, own), None), args["x"], own, **how)[0]

    return run


def singly(args: Any) -> Any:
    """Layers one at a time, cut out of all, as stages run them whose slots are not all filled."""

    def one(x: Any, number: Any) -> Any:
        own = {name: lax.dynamic_slice_in_dim(args[name], number, 1) for name in ("up", "down", "scale")}
        return lax.scan(lambda x, own: (layer(x, own), None), x, own)[0], None

    return lax.scan(one, args["x"], jnp.arange(LAYERS))[0]


def shared(args: Any) -> Any:
    """A weight that all layers have, which adds up over the scan, and one that is outside of it."""
    x = lax.scan(lambda x, up: (x + jnp.tanh(x @ args["shared"]) @ up @ up.T, None), args["x"], args["up"])[0]
    return jnp.tanh(x @ args["last"])


def halves(run: Callable[[Any], Any]) -> tuple[Halves, Callable[..., Any], list[Any]]:
    args = arguments()
    names = [name for name in args if name != "x"]
    flat = [*(args[name] for name in names), args["x"], jnp.cos(args["x"])]

    def back(*values: Any) -> list[Any]:
        *own, x, dy = values
        _, pull = jax.vjp(lambda weights, x: run({**weights, "x": x}), dict(zip(names, own, strict=True)), x)
        grown, dx = pull(dy)
        return [dx, *(grown[name] for name in names)]

    weights = [True] * len(names)
    made = split(back, flat, awaited=(True, *(False for _ in names)), again=(*weights, False, False))
    return made, back, flat


def together(made: Halves, flat: list[Any], again: int) -> list[Any]:
    first = len(made.is_late) - sum(made.is_late)
    early = jax.jit(core.jaxpr_as_fun(made.early))(*flat)
    late = iter(jax.jit(core.jaxpr_as_fun(made.late))(*flat[:again], *early[first:]))
    others = iter(early[:first])
    return [next(late) if one else next(others) for one in made.is_late]


def products(jaxpr: Any) -> int:
    found = 0
    for eqn in jaxpr.eqns:
        turns = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        found += eqn.primitive.name == "dot_general"
        found += turns * sum(map(products, core.jaxprs_in_params(eqn.params)))
    return found


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(scanned(layer), id="scanned"),
        pytest.param(scanned(layer, reverse=True, unroll=2), id="from the last on"),
        pytest.param(scanned(jax.checkpoint(jax.jit(layer))), id="made again"),
        pytest.param(scanned(by_hand), id="its own gradient"),
        pytest.param(singly, id="singly", marks=pytest.mark.slow),
        pytest.param(shared, id="shared by all layers"),
    ],
)
def test_the_halves_give_what_the_whole_gives_by_the_same_products(run):
    made, back, flat = halves(run)
    for found, wanted in zip(together(made, flat, len(flat) - 2), jax.jit(back)(*flat), strict=True):
        assert (found == wanted).all()
    whole = products(jax.make_jaxpr(back)(*flat).jaxpr)
    assert products(made.early.jaxpr) + products(made.late.jaxpr) == whole
    assert products(made.late.jaxpr) == (3 * LAYERS + 1 if run is shared else WEIGHTS * LAYERS)


def test_what_is_kept_is_what_products_of_weights_are_of_and_nothing_else():
    made, _, _ = halves(scanned(layer))
    # Gradients of arrays without products are there early: to keep what they are of would take more.
    assert made.is_late == (False, False, True, True, False, False)
    kept = sorted(one.shape for one in made.residuals)
    assert kept == 2 * [(LAYERS, ROWS, WIDTH)] + 2 * [(LAYERS, ROWS, HIDDEN)]


def test_what_is_made_of_what_is_there_again_is_made_again():
    def back(weight: Any, x: Any, dy: Any) -> list[Any]:
        half = weight.astype(jnp.bfloat16)
        return [dy @ half.T, (x.T @ dy) * half]

    args = jnp.ones((64, 64)), jnp.ones((2, 64)), jnp.ones((2, 64))
    made = split(back, args, awaited=(True, False), again=(True, False, False))
    assert [one.size for one in made.residuals] == [128, 128]
    assert (together(made, list(args), 1)[1] == back(*args)[1]).all()


def test_gradients_that_wait_for_one_another_wait_for_no_late_one() -> None:
    def back(weight: Any, x: Any, dy: Any) -> list[Any]:
        return lax.optimization_barrier([dy @ weight.T, dy.sum(axis=0), x.T @ dy, dy.T @ dy])

    args = jnp.ones((4, 5)), jnp.ones((2, 4)), jnp.ones((2, 5))
    made = split(back, args, awaited=(True, False, False, False), again=(True, False, False))
    assert made.is_late == (False, False, True, True)
    for half in (made.early, made.late):
        assert [len(eqn.invars) for eqn in half.eqns if eqn.primitive.name == "optimization_barrier"] == [2]
    assert (together(made, list(args), 1)[2] == back(*args)[2]).all()


def test_products_that_both_need_are_made_early():
    def back(weight: Any, x: Any, dy: Any) -> list[Any]:
        square = dy.T @ dy
        return [x @ square, weight @ square]

    args = jnp.ones((4, 4)), jnp.ones((2, 4)), jnp.ones((2, 4))
    made = split(back, args, awaited=(True, False), again=(True, False, False))
    assert (products(made.early.jaxpr), products(made.late.jaxpr)) == (2, 1)
